"""Ways around a policy, each shown to work where the control is left out."""

import fnmatch
from datetime import UTC, datetime

import pytest
import yaml

from ztserve.authorization import AccessRequest, PolicySet, fields, match
from ztserve.errors import ConfigError, Denied
from ztserve.transport.arrival import sorted_out
from ztserve.types import Call, Caller, Peer, operations

LOCAL = "dev.ztserve.internal"
GATEWAY = f"spiffe://{LOCAL}/ns/ml-api/sa/api-gateway"
STRANGER = f"spiffe://{LOCAL}/ns/web/sa/shop"
OFFERED = operations("digits")


def policy(action: str, rule: str, name: str = "p") -> str:
    return (
        "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: {name}, namespace: ml}}\n"
        f"spec: {{action: {action}, rules: [{rule}]}}\n"
    )


def policies(text: str, **options) -> PolicySet:
    return PolicySet.parse(text, trust_domain=LOCAL, namespace="ml", **options)


def denies(text: str, **request) -> bool:
    asked = {"principal": GATEWAY, "method": "POST", "path": "/v1/predict", **request}
    return not policies(text).decide(AccessRequest(**asked)).allowed


EVERYONE = policy("ALLOW", "{}", "everyone")


# --- one operation, several names -----------------------------------------------------


@pytest.mark.parametrize("denied", sorted(OFFERED["ModelInfer"].names))
@pytest.mark.parametrize("called", sorted(OFFERED["ModelInfer"].names))
def test_a_deny_on_one_name_holds_for_a_call_by_another(denied, called):
    text = EVERYONE + policy("DENY", f"{{to: [{{operation: {{paths: [{denied}]}}}}]}}")
    operation = OFFERED["ModelInfer"]
    assert denies(text, path=operation.names)
    if called != denied:  # judged by the called name alone, the attack works
        assert not denies(text, path=called)


@pytest.mark.parametrize("spared", sorted(OFFERED["ModelInfer"].names))
def test_not_paths_holds_for_every_name(spared):
    rule = f"{{to: [{{operation: {{notPaths: [{spared}]}}}}]}}"
    names = OFFERED["ModelInfer"].names
    assert denies(policy("ALLOW", rule), path=names)
    assert any(not denies(policy("ALLOW", rule), path=name) for name in names)


def test_a_deny_by_the_wires_method_cannot_be_written_without_effect():
    # On the gRPC wire every call is a POST; as an operation this one is a GET.
    path = "/inference.GRPCInferenceService/ModelMetadata"
    rule = f"{{to: [{{operation: {{methods: [POST], paths: [{path}]}}}}]}}"
    text = EVERYONE + policy("DENY", rule)
    one = OFFERED["ModelMetadata"]
    assert not denies(text, method=one.method, path=one.names)
    with pytest.raises(ConfigError, match="no call has this path and one of these"):
        policies(text, operations=OFFERED.values())


# --- paths that look alike ------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v1/predict/",
        "/v1/predict//",
        "//v1/predict",
        "/v1//predict",
        "/V1/Predict",
        "/v1/predict.json",
        "/v1/predict;x",
        "/v1/predict%00",
        "/v1/predict\n",
        "/v1/./predict",
        "/v1/x/../predict",
        "/v1%2fpredict",
        "v1/predict",
        "/v1/predict ",
        "https://model/v1/predict",
    ],
)
def test_a_path_that_only_looks_alike_is_another_one(path):
    rule = "{to: [{operation: {paths: [/v1/predict]}}]}"
    assert denies(policy("ALLOW", rule), path=path)
    assert not denies(policy("ALLOW", rule), path="/v1/predict")


def test_a_prefix_ends_where_it_is_written():
    allow = policy("ALLOW", "{to: [{operation: {paths: ['/v1/*']}}]}")
    assert denies(allow, path="/v1")
    assert denies(allow, path="/v1x/predict")
    assert denies(allow, path="/v2/v1/predict")


def test_a_typing_error_in_a_deny_is_not_a_hole():
    rule = "{to: [{operation: {paths: [/v1/predct]}}]}"
    text = EVERYONE + policy("DENY", rule)
    assert not denies(text, path=OFFERED["ModelInfer"].names)
    with pytest.raises(ConfigError, match=r"no operation here bears '/v1/predct'"):
        policies(text, operations=OFFERED.values())


# --- policies that say less than they seem to -----------------------------------------


def test_no_policy_and_a_policy_that_selects_others_admit_nobody():
    assert denies("")
    other = policy("ALLOW", "{}").replace("namespace: ml", "namespace: mi")
    assert denies(other)


def test_an_empty_source_or_a_misspelt_field_never_means_everybody():
    # Each of these, read leniently, leaves a rule without the condition it had.
    for rule in (
        "{from: []}",
        "{from: }",
        "{from: [{}]}",
        "{from: [{source: }]}",
        "{from: [{source: {}}]}",
        "{from: [{source: {principals: []}}]}",
        "{from: [{source: {principal: [x]}}]}",
        "{form: [{source: {principals: [x]}}]}",
        "{when: [{key: source.user, values: [x]}]}",
        "{when: [{key: 'experimental.envoy.filters.a[b]', values: [x]}]}",
    ):
        lenient = yaml.safe_load(policy("ALLOW", rule))["spec"]["rules"][0]
        assert not any(
            (s.get("source") or {}).get("principals") for s in lenient.get("from") or []
        )
        with pytest.raises(ConfigError):
            policies(policy("ALLOW", rule))


def test_a_second_key_of_the_same_name_does_not_replace_the_first():
    text = policy("DENY", "{}").replace("action: DENY", "action: DENY, action: ALLOW")
    assert yaml.safe_load(text)["spec"]["action"] == "ALLOW"
    with pytest.raises(ConfigError, match="stands here twice"):
        policies(text)


def test_only_not_principals_does_not_admit_who_has_no_identity():
    rule = "{from: [{source: {notPrincipals: [cluster.local/ns/web/sa/shop]}}]}"
    assert not denies(policy("ALLOW", rule))
    for nobody in ("", "anonymous"):
        assert denies(policy("ALLOW", rule), principal=nobody)


def test_custom_target_refs_and_request_authentication_are_not_passed_over():
    text = EVERYONE + policy("CUSTOM", "{}")
    with pytest.raises(ConfigError, match="CUSTOM is refused"):
        policies(text)
    narrowed = policy("DENY", "{}").replace("spec: {", "spec: {targetRefs: [], ")
    with pytest.raises(ConfigError, match="targetRefs"):
        policies(EVERYONE + narrowed)
    token = policy("ALLOW", "{}").replace(
        "AuthorizationPolicy", "RequestAuthentication"
    )
    with pytest.raises(ConfigError, match="RequestAuthentication is refused"):
        policies(EVERYONE + token)


def test_a_billion_laughs_are_refused_before_they_unfold():
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    with pytest.raises(ConfigError, match="anchors and aliases"):
        policies("\n".join(lines))


# --- other trust domains --------------------------------------------------------------

FOREIGN = "spiffe://b.example/ns/ml-api/sa/api-gateway"
UNPINNED = [
    "{from: [{source: {namespaces: [ml-api]}}]}",
    "{from: [{source: {serviceAccounts: [ml-api/api-gateway]}}]}",
    "{from: [{source: {principals: ['*/ns/ml-api/sa/api-gateway']}}]}",
    "{from: [{source: {principals: ['*']}}]}",
    "{from: [{source: {trustDomains: ['*']}}]}",
    "{from: [{source: {notPrincipals: [x/ns/a/sa/b]}}]}",
    "{from: [{source: {requestPrincipals: ['*']}}]}",
    "{to: [{operation: {methods: [POST]}}]}",
    "{when: [{key: source.namespace, values: [ml-api]}]}",
    "{}",
]


@pytest.mark.parametrize("rule", UNPINNED)
def test_a_federated_domain_cannot_borrow_our_namespaces(rule):
    # Istio's own pattern for `namespaces` does take the foreign ID for ours.
    assert fnmatch.fnmatchcase(FOREIGN, "*/ns/ml-api/*")
    text = policy("ALLOW", rule)
    with pytest.raises(ConfigError, match=r"also admit b\.example; add principals"):
        policies(text, federated=("b.example",))
    assert denies(text, principal=FOREIGN, claims={"iss": "i", "sub": "s"})


def test_a_federated_domain_is_admitted_by_its_name_only():
    pinned = "{from: [{source: {namespaces: [ml-api], trustDomains: [b.example]}}]}"
    exact = "{from: [{source: {principals: [b.example/ns/ml-api/sa/api-gateway]}}]}"
    for rule in (pinned, exact):
        allowed = policies(policy("ALLOW", rule), federated=("b.example",))
        asked = AccessRequest(FOREIGN, "POST", "/v1/predict")
        assert allowed.decide(asked).allowed
        assert not allowed.decide(asked._replace(principal=GATEWAY)).allowed


@pytest.mark.parametrize("name", ["cluster.local", LOCAL, "old.internal"])
def test_federating_with_a_name_that_policies_take_for_ours_is_refused(name):
    with pytest.raises(ConfigError, match="would pass for ours"):
        policies("", federated=(name,), aliases=("old.internal",))


def test_a_deny_reaches_every_trust_domain():
    rule = "{from: [{source: {namespaces: [ml-api]}}]}"
    exact = "{from: [{source: {principals: [b.example/ns/ml-api/sa/api-gateway]}}]}"
    text = policy("ALLOW", exact) + policy("DENY", rule, "d")
    assert denies(text, principal=FOREIGN)


def test_an_id_that_only_contains_ours_is_another_one():
    rule = "{from: [{source: {principals: [cluster.local/ns/ml-api/sa/api-gateway]}}]}"
    for principal in (
        GATEWAY + "x",
        GATEWAY + "/x",
        GATEWAY.replace("sa/", "sa//"),
        GATEWAY.upper(),
        "spiffe://evil.example/" + GATEWAY.removeprefix("spiffe://"),
        "spiffe://cluster.local/ns/ml-api/sa/api-gateway",
    ):
        assert denies(policy("ALLOW", rule), principal=principal)


# --- what a caller writes itself ------------------------------------------------------


def call(headers: dict[str, str], caller: Caller | None = None) -> Call:
    now = datetime.now(UTC)
    peer = Peer(STRANGER, 1, now, now, "00")
    return Call("1", peer, caller, OFFERED["ModelInfer"], 0.0, headers)


def test_headers_do_not_change_who_the_peer_or_the_caller_is():
    forged = {
        "x-forwarded-client-cert": f"URI={GATEWAY}",
        "x-forwarded-for": "10.0.0.1",
        "forwarded": "for=10.0.0.1",
        ":authority": "model",
        ":path": "/v2/health/live",
        "zt-caller-bin": '{"sub": "alice"}',
        "authorization": "Bearer e30.e30.",
    }
    gateway = f"{LOCAL}/ns/ml-api/sa/api-gateway"
    for rule in (
        f"{{from: [{{source: {{principals: [{gateway}]}}}}]}}",
        "{from: [{source: {remoteIpBlocks: [10.0.0.0/8]}}]}",
        "{from: [{source: {requestPrincipals: ['*']}}]}",
        "{to: [{operation: {hosts: [model]}}]}",
        "{to: [{operation: {paths: [/v2/health/live]}}]}",
        "{when: [{key: 'request.auth.claims[sub]', values: [alice]}]}",
    ):
        with pytest.raises(Denied):
            policies(policy("ALLOW", rule)).authorize(call(forged))


def test_a_policy_cannot_be_made_to_trust_the_headers_that_carry_identity():
    for name in ("zt-caller-bin", ":path", ":authority", ":method"):
        rule = f"{{when: [{{key: 'request.headers[{name}]', values: [x]}}]}}"
        with pytest.raises(ConfigError, match="name one header"):
            policies(policy("ALLOW", rule))


def test_a_claim_named_like_the_subject_does_not_replace_it():
    rule = "{when: [{key: 'request.auth.claims[sub]', values: [alice]}]}"
    mallory = Caller("td", "mallory", {"sub": "alice", "iss": "https://i"})
    with pytest.raises(Denied):
        policies(policy("ALLOW", rule)).authorize(call({}, mallory))
    alice = Caller("td", "alice")
    assert policies(policy("ALLOW", rule)).authorize(call({}, alice)).allowed


def test_a_denied_header_is_found_however_it_is_spelt():
    rule = "{when: [{key: 'request.headers[x-canary]', values: ['*']}]}"
    text = EVERYONE + policy("DENY", rule)
    for name in ("x-canary", "X-Canary", "X-CANARY"):
        assert denies(text, headers={name: ""})
    assert not denies(text, headers={"x-canary2": "1"})


def test_an_address_written_as_ipv6_is_still_denied():
    rule = "{from: [{source: {ipBlocks: [10.0.0.0/8]}}]}"
    text = EVERYONE + policy("DENY", rule)
    assert denies(text, source_ip="::ffff:10.1.2.3")
    assert denies(text, source_ip="::ffff:0a01:0203")
    assert not denies(text, source_ip="192.0.2.1")


# --- a DENY that could match nothing ------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ('{when: [{key: "request.headers[x-evil-bin]", values: ["1"]}]}', "-bin"),
        ('{when: [{key: "request.headers[x y]", values: ["1"]}]}', "no call has"),
        (
            '{from: [{source: {principals: ["cluster.local/ns/web/sa/shop "]}}]}',
            "principal",
        ),
    ],
)
def test_a_deny_that_can_match_nothing_is_refused(rule, why):
    with pytest.raises(ConfigError, match=why):
        policies(EVERYONE + policy("DENY", rule))


def test_taken_as_it_is_such_a_deny_lets_the_call_in(monkeypatch):
    monkeypatch.setattr(
        fields, "_header_name", lambda node: match.bracketed(node, "request.headers")[0]
    )
    rule = '{when: [{key: "request.headers[x-evil-bin]", values: ["1"]}]}'
    headers, _ = sorted_out((("x-evil-bin", b"1"),))
    assert not denies(EVERYONE + policy("DENY", rule), headers=headers)
