import pytest

from ztserve.authorization import PolicySet
from ztserve.errors import ConfigError

HEAD = "apiVersion: security.istio.io/v1\nkind: {kind}\n"
META = "metadata: {name: x, namespace: ml}\n"


@pytest.fixture
def refused(parse):
    def ask(text, **options) -> str:
        with pytest.raises(ConfigError) as caught:
            parse(text, **options)
        return str(caught.value)

    return ask


@pytest.fixture
def peer():
    def build(spec, name="x", namespace="ml"):
        return (
            "apiVersion: security.istio.io/v1beta1\nkind: PeerAuthentication\n"
            f"metadata: {{name: {name}, namespace: {namespace}}}\nspec: {spec}\n---\n"
        )

    return build


@pytest.fixture
def authz():
    def build(spec, metadata="name: x, namespace: ml"):
        return (
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
            f"metadata: {{{metadata}}}\nspec: {spec}\n---\n"
        )

    return build


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: AuthorizationPolicy\n" + META, "'apiVersion' is missing"),
        ("apiVersion: security.istio.io/v1\n" + META, "'kind' is missing"),
        (HEAD.format(kind="AuthorizationPolicy"), "'metadata' is missing"),
        (HEAD.format(kind="Gateway") + META, "none of AuthorizationPolicy, PeerAuth"),
        (
            "apiVersion: v1\nkind: AuthorizationPolicy\n" + META,
            "none of security.istio.io/v1",
        ),
        (
            HEAD.format(kind="RequestAuthentication") + META,
            "RequestAuthentication is refused: tokens are not verified",
        ),
        (HEAD.format(kind="AuthorizationPolicy") + META + "status: {}", "status"),
        ("- a list", "expected a mapping, found a list"),
    ],
)
def test_what_is_no_policy_of_ours_is_refused(refused, text, message):
    assert message in refused(text)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("name: x", "'namespace' is missing"),
        ("namespace: ml", "'name' is missing"),
        ("name: X, namespace: ml", "not a Kubernetes name"),
        ("name: x, namespace: ml, uid: '1'", "uid: unknown field"),
        ("name: x, namespace: ml, labels: {istio.io/rev: a}", "has no meaning here"),
        ("name: x, namespace: ml, annotations: {istio.io/dry-run: yes}", "in quotes"),
        ("name: x, namespace: ml, annotations: {istio.io/dry-run: '1'}", "true, false"),
        ("name: x, namespace: ml, annotations: {istio.io/other: 'a'}", "no meaning"),
    ],
)
def test_metadata_that_is_not_understood_is_refused(refused, authz, metadata, message):
    assert message in refused(authz("{}", metadata))


def test_labels_and_annotations_of_others_are_left_alone(parse, authz):
    meta = "name: x, namespace: ml, labels: {team: a}, annotations: {note: 'b'}"
    assert parse(authz("{}", meta)).attached == ("ALLOW ns[ml]-policy[x]",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{action: CUSTOM, rules: [{}]}", "CUSTOM is refused"),
        ("{action: PERMIT, rules: [{}]}", "'PERMIT' is none of ALLOW, DENY, AUDIT"),
        ("{action: DENY}", "DENY without rules never matches"),
        ("{action: DENY, rules: []}", "DENY without rules never matches"),
        ("{action: AUDIT}", "AUDIT without rules never matches"),
        ("{targetRefs: [{kind: Service, name: x}]}", "targetRefs are not supported"),
        ("{targetRef: {kind: Service, name: x}}", "targetRefs are not supported"),
        ("{selector: {matchExpressions: []}}", "allowed here: matchLabels"),
        ("{selector: {matchLabels: {app: '*'}}}", "'*' is not allowed"),
        ("{selector:}", "selector: expected a mapping, found empty"),
        ("{provider: {name: x}, rules: [{}]}", "provider: unknown field"),
        ("{rules: }", "rules: expected a list, found empty"),
        ("{rules: [null]}", "rules[0]: expected a mapping, found empty"),
        ("{rules: [{from: }]}", "rules[0].from: expected a list"),
        ("{rules: [{from: []}]}", "an empty list means nothing"),
        ("{rules: [{to: []}]}", "an empty list means nothing"),
        ("{rules: [{when: []}]}", "an empty list means nothing"),
        ("{rules: [{from: [{}]}]}", "'source' is missing"),
        ("{rules: [{from: [{source: {}}]}]}", "an empty source means nothing"),
        ("{rules: [{to: [{operation: {}}]}]}", "an empty operation means nothing"),
        ("{rules: [{to: [{operation: {path: [/a]}}]}]}", "did you mean 'paths'?"),
        ("{rules: [{to: [{operation: {paths: /a}}]}]}", "expected a list"),
        ("{rules: [{to: [{operation: {paths: ['']}}]}]}", "an empty string"),
        ("{rules: [{to: [{operation: {ports: [80]}}]}]}", "write it in quotes"),
        ("{rules: [{when: [{values: [a]}]}]}", "'key' is missing"),
        ("{rules: [{when: [{key: source.ip}]}]}", "needs values or notValues"),
        ("{rules: [{when: [{key: source.user, values: [a]}]}]}", "unknown key"),
        ("{rules: [{when: [{key: destination.name, values: [a]}]}]}", "unknown"),
        (
            "{rules: [{when: [{key: experimental.envoy.filters.a, values: [c]}]}]}",
            "unknown key 'experimental.envoy.filters.a'",
        ),
    ],
)
def test_a_policy_that_is_not_understood_is_refused(refused, authz, spec, message):
    assert message in refused(authz(spec))


def test_a_refusal_names_line_and_field(refused, authz):
    text = authz("{}") + authz("\n  rules:\n    - form: []\n", "name: y, namespace: ml")
    assert refused(text).startswith(
        "policy, line 11: spec.rules[0].form: unknown field (did you mean 'from'?)"
    )


def test_a_refusal_in_another_workloads_policy_counts_too(refused, authz):
    elsewhere = authz("{action: PERMIT}", "name: x, namespace: other")
    assert "PERMIT" in refused(elsewhere)


def test_the_same_policy_twice_is_refused(refused, authz):
    assert "ns[ml]-policy[x] is declared twice" in refused(authz("{}") * 2)


@pytest.mark.parametrize("spec", ["{}", "{mtls: {}}", "{mtls: {mode: UNSET}}"])
def test_an_unset_peer_authentication_is_strict(parse, peer, spec):
    assert isinstance(parse(peer(spec)), PolicySet)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{mtls: {mode: PERMISSIVE}}", "PERMISSIVE is refused: every connection"),
        ("{mtls: {mode: DISABLE}}", "DISABLE is refused: every connection"),
        ("{mtls: {mode: strict}}", "'strict' is not a mode; write STRICT"),
        ("{mtls: {modus: STRICT}}", "did you mean 'mode'?"),
        ("{portLevelMtls: {'80': {mode: STRICT}}}", "needs a selector"),
        (
            "{selector: {matchLabels: {app: model}}, portLevelMtls: {}}",
            "at least one port",
        ),
        (
            "{selector: {matchLabels: {app: model}}, portLevelMtls: {0: {}}}",
            "'0' is not a port",
        ),
        (
            "{selector: {matchLabels: {app: a}}, portLevelMtls: {80: {mode: DISABLE}}}",
            "spec.portLevelMtls.80.mode: DISABLE is refused",
        ),
    ],
)
def test_a_peer_authentication_that_is_not_strict_is_refused(
    refused, peer, spec, message
):
    assert message in refused(peer(spec))


def test_port_level_mtls_may_say_strict(parse, peer):
    spec = "{selector: {matchLabels: {app: a}}, portLevelMtls: {8080: {mode: STRICT}}}"
    assert parse(peer(spec)).attached == ()


def test_two_peer_authentications_for_the_same_workloads_are_refused(refused, peer):
    every, strict = "{}", "{mtls: {mode: STRICT}}"
    assert "the second one" in refused(peer(every, "a") + peer(strict, "b"))
    one, two = (
        "{selector: {matchLabels: {app: model}}}",
        "{selector: {matchLabels: {tier: gold}}}",
    )
    both = peer(one, "a") + peer(two, "b")
    labels = {"app": "model", "tier": "gold"}
    assert "the second one" in refused(both, labels=labels)


def test_peer_authentications_of_different_scope_stand_beside_each_other(parse, peer):
    chosen = "{selector: {matchLabels: {app: model}}}"
    text = peer("{}", "a") + peer(chosen, "b") + peer("{}", "c", "istio-system")
    assert parse(text + peer("{}", "d", "other")).attached == ()


def test_a_dry_run_of_peer_authentication_is_refused(refused, peer):
    name = "x, annotations: {istio.io/dry-run: 'true'}"
    assert "no meaning for PeerAuthentication" in refused(peer("{}", name))
