import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from ztserve.authorization import AccessRequest, Decision, PolicySet
from ztserve.errors import ConfigError, Denied
from ztserve.types import Call, Caller, Operation, Peer, operations

LOCAL = "dev.ztserve.internal"
GATEWAY = f"spiffe://{LOCAL}/ns/ml-api/sa/api-gateway"
OTHER = f"spiffe://{LOCAL}/ns/web/sa/shop"
EXAMPLES = Path(__file__).parents[3] / "examples" / "policies"


def source(fields: str) -> str:
    return f"- from: [{{source: {{{fields}}}}}]"


def operation(fields: str) -> str:
    return f"- to: [{{operation: {{{fields}}}}}]"


def when(key: str, **values: list) -> str:
    given = ", ".join(f"{name}: {value}" for name, value in values.items())
    return f"- when: [{{key: '{key}', {given}}}]"


def request(**fields) -> AccessRequest:
    return AccessRequest(
        **{"principal": GATEWAY, "method": "POST", "path": "/v1/predict", **fields}
    )


# --- the order of policies ------------------------------------------------------------


def test_without_any_policy_nobody_may(parse):
    expected = Decision(allowed=False, rule="no policy", action="DENY")
    assert parse("").decide(request()) == expected


def test_without_an_allow_policy_nobody_may(parse, policy):
    text = policy(operation("methods: [PUT]"), action="DENY")
    assert parse(text).decide(request()).rule == "no ALLOW policy"


def test_an_empty_spec_and_empty_rules_match_never(parse, policy):
    head = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
    for name, spec in [("a", "spec: {}"), ("b", ""), ("c", "spec: {rules: []}")]:
        text = head + f"metadata: {{name: {name}, namespace: ml}}\n{spec}\n"
        assert not parse(text).decide(request()).allowed
        text += "---\n" + policy(name="everyone")
        assert parse(text).decide(request()).allowed


def test_an_empty_rule_matches_everybody(parse, policy):
    decision = parse(policy()).decide(request(principal=OTHER, path="/any"))
    assert decision == Decision(
        allowed=True, rule="ns[ml]-policy[p]-rule[0]", action="ALLOW"
    )


def test_deny_goes_before_allow_and_names_its_rule(parse, policy):
    refused = "\n".join([operation("paths: [/a]"), operation("paths: [/b]")])
    policies = parse(policy() + policy(refused, action="DENY", name="d"))
    assert policies.decide(request()).allowed
    decision = policies.decide(request(path="/b"))
    assert decision == Decision(
        allowed=False, rule="ns[ml]-policy[d]-rule[1]", action="DENY"
    )


def test_a_decision_is_false_where_it_refuses(parse, policy):
    assert parse(policy()).decide(request())
    assert not parse("").decide(request())


def test_no_allow_rule_matches_names_the_policies_that_were_asked(parse, policy):
    rules = operation("paths: [/other]")
    text = "".join(policy(rules, name=f"p{i}") for i in range(5))
    assert parse(text).decide(request()).rule == (
        "no ALLOW rule matches (ns[ml]-policy[p0], ns[ml]-policy[p1], "
        "ns[ml]-policy[p2] and 2 more)"
    )


def test_audit_and_dry_runs_are_recorded_and_change_nothing(parse, policy):
    dry = ", annotations: {istio.io/dry-run: 'true'}"
    text = (
        policy()
        + policy(action="AUDIT", name="audit")
        + policy(action="DENY", name="deny", annotations=dry)
        + policy(operation("paths: [/x]"), name="allow", annotations=dry)
    )
    assert parse(text).decide(request()) == Decision(
        allowed=True,
        rule="ns[ml]-policy[p]-rule[0]",
        action="ALLOW",
        shadow=(
            "AUDIT ns[ml]-policy[audit]-rule[0]",
            "DENY ns[ml]-policy[deny]-rule[0]",
            "ALLOW ns[ml]-policy[allow]: no rule matches",
        ),
    )
    only = policy(name="allow", annotations=dry)
    decision = parse(only).decide(request())
    assert (decision.allowed, decision.rule) == (False, "no policy")
    assert decision.shadow == ("ALLOW ns[ml]-policy[allow]-rule[0]",)


def test_a_request_without_identity_or_operation_is_refused_whatever_policy_says(
    parse, policy
):
    policies = parse(policy())
    assert policies.decide(request(principal="")).rule == "no identity"
    assert policies.decide(request(principal="ns/x/sa/y")).rule == "no identity"
    assert policies.decide(request(path=frozenset())).rule == "no operation"


# --- which policies are attached ------------------------------------------------------


def test_policies_attach_by_namespace_root_namespace_and_selector(parse, policy):
    app, tier = "{matchLabels: {app: model}}", "{matchLabels: {app: model, tier: a}}"
    text = (
        policy(name="a")
        + policy(name="b", namespace="other")
        + policy(name="c", namespace="istio-system")
        + policy(name="d", selector=app)
        + policy(name="e", selector=tier)
        + policy(name="f", selector="{}", action="AUDIT")
    )
    attached = (
        "ALLOW ns[ml]-policy[a]",
        "ALLOW ns[istio-system]-policy[c]",
        "ALLOW ns[ml]-policy[d]",
        "AUDIT ns[ml]-policy[f] (shadow)",
    )
    assert parse(text).attached == attached
    tiered = parse(text, labels={"app": "model", "tier": "a"}, root_namespace="root")
    assert tiered.attached == (
        "ALLOW ns[ml]-policy[a]",
        "ALLOW ns[ml]-policy[d]",
        "ALLOW ns[ml]-policy[e]",
        "AUDIT ns[ml]-policy[f] (shadow)",
    )


# --- sources --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("principals: ['*']", True),
        (f"principals: [{LOCAL}/ns/ml-api/sa/api-gateway]", True),
        ("principals: [cluster.local/ns/ml-api/sa/api-gateway]", True),
        ("principals: [cluster.local/ns/ml-api/sa/*]", True),
        ("principals: ['*/sa/api-gateway']", True),
        (f"principals: [{LOCAL}/*]", True),
        ("principals: [old.internal/ns/ml-api/sa/api-gateway]", False),
        ("principals: [cluster.local/ns/ml-api/sa/api-gatewa]", False),
        ("principals: [cluster.local/ns/ml-api/sa/API-gateway]", False),
        ("namespaces: [ml-api]", True),
        ("namespaces: ['ml-*']", True),
        ("namespaces: [ml]", False),
        ("serviceAccounts: [ml-api/api-gateway]", True),
        ("serviceAccounts: [api-gateway]", False),
        (f"trustDomains: [{LOCAL}]", True),
        ("trustDomains: ['dev.*']", True),
        ("trustDomains: ['*']", True),
        ("trustDomains: [internal]", False),
        ("notPrincipals: [cluster.local/ns/ml-api/sa/api-gateway]", False),
        ("notPrincipals: [cluster.local/ns/web/sa/shop]", True),
        ("notNamespaces: [ml-api]", False),
        ("notServiceAccounts: [ml-api/api-gateway]", False),
        (f"notTrustDomains: [{LOCAL}]", False),
        ("namespaces: [ml-api], notPrincipals: ['*/sa/api-gateway']", False),
        ("namespaces: [ml-api], ipBlocks: [10.0.0.0/8]", False),
        ("ipBlocks: [127.0.0.0/8]", True),
        ("notIpBlocks: [127.0.0.0/8]", False),
        ("remoteIpBlocks: [127.0.0.1]", True),
        ("notRemoteIpBlocks: [127.0.0.1]", False),
        ("requestPrincipals: ['*']", False),
        ("notRequestPrincipals: ['*']", True),
    ],
)
def test_sources(allows, fields, expected):
    assert allows(source(fields), source_ip="127.0.0.1") is expected


def test_the_local_trust_domain_has_aliases(allows):
    alias = {"options": {"aliases": ("old.internal",)}}
    old = "spiffe://old.internal/ns/ml-api/sa/api-gateway"
    for domain in (LOCAL, "cluster.local", "old.internal"):
        rule = source(f"principals: [{domain}/ns/ml-api/sa/api-gateway]")
        assert allows(rule, **alias, principal=old)
        assert allows(rule, **alias, principal=GATEWAY)
        assert allows(rule, principal=old) is (domain == "old.internal")
    assert allows(source(f"trustDomains: [{LOCAL}]"), **alias, principal=old)


def test_sources_and_their_values_are_alternatives(allows):
    rule = "- from: [{source: {namespaces: [a, web]}}, {source: {namespaces: [b]}}]"
    assert allows(rule, principal=OTHER)
    assert allows(rule, principal=f"spiffe://{LOCAL}/ns/b/sa/x")
    assert not allows(rule)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (f"spiffe://{LOCAL}/ns/a/sa/b", "leave out the scheme"),
        ("*/ns/*/sa/x", "one '*' may stand"),
        ("*/ns/a/*", "one '*' may stand"),
        ("cluster.local/ns/a*", "leaves out names of the local trust domain"),
    ],
)
def test_a_principal_that_could_match_nothing_is_refused(parse, policy, value, message):
    for action in ("ALLOW", "DENY"):
        with pytest.raises(ConfigError, match=message.replace("*", r"\*")):
            parse(policy(source(f"principals: ['{value}']"), action=action))


def test_service_accounts_beside_principals_are_refused(parse, policy):
    rule = source("serviceAccounts: [a], principals: [x]")
    with pytest.raises(ConfigError, match="can't stand beside"):
        parse(policy(rule))


def test_an_address_that_is_not_known_passes_no_allow_and_every_deny(allows):
    for fields in ("ipBlocks: [10.0.0.0/8]", "notIpBlocks: [10.0.0.0/8]"):
        assert not allows(source(fields), source_ip="")
        assert not allows(source(fields), action="DENY", source_ip="")


def test_the_remote_address_is_the_peers_own_unless_a_proxy_is_trusted(allows):
    rule = source("remoteIpBlocks: [10.0.0.0/8]")
    assert allows(rule, source_ip="10.1.1.1")
    assert not allows(rule, source_ip="10.1.1.1", remote_ip="8.8.8.8")
    assert allows(rule, source_ip="8.8.8.8", remote_ip="10.1.1.1")


# --- operations -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ("methods: [POST]", True),
        ("methods: [post]", False),
        ("methods: ['*']", True),
        ("notMethods: [POST]", False),
        ("notMethods: [GET]", True),
        ("paths: [/v1/predict]", True),
        ("paths: [/v1/*]", True),
        ("paths: ['/{*}/predict']", True),
        ("paths: [/v1/predict/]", False),
        ("paths: [/v1]", False),
        ("notPaths: [/v1/predict]", False),
        ("notPaths: [/v1/stream]", True),
        ("paths: [/v1/*], notPaths: ['*/predict']", False),
        ("ports: ['8443']", True),
        ("ports: ['443']", False),
        ("notPorts: ['8443']", False),
        ("hosts: [MODEL.internal]", True),
        ("hosts: ['*.internal']", True),
        ("hosts: [model]", False),
        ("notHosts: ['model.*']", False),
        ("methods: [POST], paths: [/v1/stream]", False),
    ],
)
def test_operations(allows, fields, expected):
    asked = {"host": "model.internal", "port": 8443}
    assert allows(operation(fields), **asked) is expected


def test_query_and_fragment_are_no_part_of_the_path(allows):
    rule = operation("paths: [/v1/predict]")
    assert allows(rule, path="/v1/predict?x=1")
    assert allows(rule, path="/v1/predict#x")


def test_paths_match_if_any_name_does_and_not_paths_only_if_none_does(allows):
    names = frozenset({"/v1/predict", "/v2/models/m/infer", "/inference.X/ModelInfer"})
    for name in names:
        assert allows(operation(f"paths: [{name}]"), path=names)
        assert not allows(operation(f"notPaths: [{name}]"), path=names)
    assert not allows(operation("paths: [/v1/stream]"), path=names)


# --- conditions -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("source.principal", ["cluster.local/ns/ml-api/sa/api-gateway"], True),
        ("source.principal", ["cluster.local/ns/web/sa/shop"], False),
        ("source.namespace", ["ml-api"], True),
        ("source.serviceAccount", ["ml-api/api-gateway"], True),
        ("source.trustDomain", [LOCAL], True),
        ("source.trustDomain", ["x"], False),
        ("source.ip", ["10.0.0.0/8"], True),
        ("remote.ip", ["10.0.0.0/8"], True),
        ("destination.ip", ["10.9.0.0/16"], True),
        ("destination.port", ["8443"], True),
        ("connection.sni", ["model.internal"], True),
        ("request.auth.principal", ["https://i/alice"], True),
        ("request.auth.audiences", ["model"], True),
        ("request.auth.presenter", ["app"], True),
        ("request.auth.claims[groups]", ["admin"], True),
        ("request.auth.claims[a][b]", ["c"], True),
        ("request.auth.claims[a][c]", ["c"], False),
        ("request.headers[X-Team]", ["blue"], True),
        ("request.headers[x-team]", ["*"], True),
        ("request.headers[x-other]", ["*"], False),
    ],
)
def test_conditions(allows, key, values, expected):
    asked = {
        "source_ip": "10.1.1.1",
        "destination_ip": "10.9.1.1",
        "port": 8443,
        "sni": "model.internal",
        "headers": {"x-team": "blue"},
        "claims": {
            "iss": "https://i",
            "sub": "alice",
            "aud": ["model"],
            "azp": "app",
            "groups": ["dev", "admin"],
            "a": {"b": "c"},
        },
    }
    assert allows(when(key, values=values), **asked) is expected
    assert allows(when(key, notValues=values), **asked) is not expected


def test_all_conditions_must_hold_beside_source_and_operation(allows):
    rule = (
        "- from: [{source: {namespaces: [ml-api]}}]\n"
        "  to: [{operation: {methods: [POST]}}]\n"
        "  when:\n"
        "  - {key: source.ip, values: [10.0.0.0/8]}\n"
        "  - {key: 'request.headers[x]', values: [a]}\n"
        "  - {key: destination.port, values: ['1']}\n"
    )
    asked = {"source_ip": "10.1.1.1", "headers": {"x": "a"}, "port": 1}
    assert allows(rule, **asked)
    for other in (
        {"principal": OTHER},
        {"method": "GET"},
        {"source_ip": "1.1.1.1"},
        {"headers": {}},
        {"port": 2},
    ):
        assert not allows(rule, **{**asked, **other})


def test_a_header_is_found_whatever_its_case_and_repeats_are_joined(allows):
    rule = when("request.headers[X-Team]", values=["blue,red"])
    assert allows(rule, headers={"X-TEAM": "blue", "x-team": "red"})
    assert not allows(rule, headers={"x-team": "blue"})


@pytest.mark.parametrize(
    "key",
    [
        "request.headers[:path]",
        "request.headers[:authority]",
        "request.headers[zt-caller-bin]",
        "request.headers[a][b]",
        "request.headers[]",
        "request.headers[a",
        "request.auth.claims[]",
        "request.auth.claims[a]b",
    ],
)
def test_a_key_that_cannot_be_enforced_is_refused(parse, policy, key):
    with pytest.raises(ConfigError, match="policy, line"):
        parse(policy(when(key, values=["a"])))


# --- operations that the workload has -------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        "paths: [/v1/predct]",
        "notPaths: [/v1/predct]",
        "paths: [/v1/predict, /v3/*]",
        "paths: ['/v2/models/{*}/outfer']",
        "paths: [/v2/models/other/infer]",
    ],
)
def test_a_path_that_no_operation_bears_is_refused(parse, policy, fields):
    for action in ("ALLOW", "DENY"):
        with pytest.raises(ConfigError, match="no operation here bears"):
            parse(
                policy(operation(fields), action=action),
                operations=operations("digits").values(),
            )


def test_a_path_that_is_never_called_with_these_methods_is_refused(parse, policy):
    fields = "methods: [POST], paths: [/inference.GRPCInferenceService/ServerReady]"
    with pytest.raises(ConfigError, match="no call has this path and one of these"):
        parse(
            policy(operation(fields), action="DENY"),
            operations=operations("digits").values(),
        )


def test_paths_of_other_workloads_are_left_alone(parse, policy):
    text = policy(operation("paths: [/elsewhere]"), namespace="other")
    assert parse(text, operations=operations("digits").values()).attached == ()


def test_what_a_call_does_not_carry_is_refused_where_calls_are_judged(parse, policy):
    for key in ("destination.ip", "connection.sni"):
        rules = when(key, values=["10.0.0.1"])
        parse(policy(rules))
        with pytest.raises(ConfigError, match="not known of a call"):
            parse(policy(rules), operations=operations("digits").values())


# --- authorize ------------------------------------------------------------------------


def call(principal=GATEWAY, *, name="ModelInfer", **fields) -> Call:
    now = datetime.now(UTC)
    peer = Peer(principal, 1, now, now, "00")
    fields = {"caller": None, "operation": operations("digits")[name], **fields}
    return Call(id="1", peer=peer, deadline=0.0, **fields)


def test_authorize_judges_a_call_under_all_names_of_its_operation(parse, policy):
    for name in operations("digits")["ModelInfer"].names:
        policies = parse(policy(operation(f"paths: [{name}]")))
        assert policies.authorize(call()).rule == "ns[ml]-policy[p]-rule[0]"


def test_authorize_refuses_with_a_reason_that_the_caller_is_not_told(parse, policy):
    policies = parse(policy(source("namespaces: [web]")))
    with pytest.raises(Denied) as caught:
        policies.authorize(call())
    assert caught.value.public == "this identity may not do this"
    assert caught.value.reason == (
        f"{GATEWAY} may not POST /v1/predict: no ALLOW rule matches (ns[ml]-policy[p])"
    )


def test_authorize_knows_the_caller_behind_the_peer(parse, policy):
    rule = when("request.auth.claims[sub]", values=["alice"])
    policies = parse(policy(rule))
    forged = {"sub": "alice"}
    assert policies.authorize(call(caller=Caller("td", "alice"))).allowed
    for caller in (None, Caller("td", "bob"), Caller("td", "bob", forged)):
        with pytest.raises(Denied):
            policies.authorize(call(caller=caller))


def test_authorize_knows_host_port_address_and_headers(parse, policy):
    rules = (
        "- from: [{source: {ipBlocks: [10.0.0.0/8]}}]\n"
        "  to: [{operation: {hosts: [model], ports: ['1']}}]\n"
        "  when: [{key: 'request.headers[x]', values: [a]}]\n"
    )
    policies = parse(policy(rules))
    asked = {"source_ip": "10.0.0.1", "host": "model", "port": 1, "headers": {"x": "a"}}
    assert policies.authorize(call(**asked)).allowed
    for missing in asked:
        with pytest.raises(Denied):
            policies.authorize(call(**{k: v for k, v in asked.items() if k != missing}))


# --- the set itself -------------------------------------------------------------------


def test_the_digest_is_of_the_source_text(parse, policy):
    one, two = parse(policy()), parse(policy() + "# more\n")
    assert len(one.digest) == 64
    assert one.digest == parse(policy()).digest != two.digest


def test_the_views_of_many_peers_are_bounded_and_stay_right(parse, policy):
    policies = parse(policy(source("principals: [cluster.local/ns/a/sa/s7]")))
    for i in range(3000):
        principal = f"spiffe://{LOCAL}/ns/a/sa/s{i}"
        assert policies.decide(request(principal=principal)).allowed is (i == 7)
    assert len(policies._views) <= 1024


def test_several_threads_may_ask_at_once(parse, policy):
    policies = parse(policy(source("namespaces: ['a1*']")))
    wrong = []

    def ask(thread: int) -> None:
        for i in range(2000):
            name = f"a{(thread * 7919 + i) % 1500}"
            principal = f"spiffe://{LOCAL}/ns/{name}/sa/x"
            decision = policies.decide(request(principal=principal))
            if decision.allowed is not name.startswith("a1"):
                wrong.append(name)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("name", ["", "Upper", "spiffe://x", "a/b"])
def test_a_trust_domain_of_another_form_is_refused(parse, name):
    for option in ({"trust_domain": name}, {"aliases": [name]}, {"federated": [name]}):
        with pytest.raises(ConfigError, match="not the name of a trust domain"):
            parse("", **option)


# --- the example files ----------------------------------------------------------------


def example(*names: str, app: str, namespace: str, **options) -> PolicySet:
    return PolicySet.load(
        [EXAMPLES / name for name in names],
        trust_domain=LOCAL,
        namespace=namespace,
        labels={"app": app},
        **options,
    )


def test_the_seeds_policy_lets_only_the_gateway_predict_and_stream():
    offered = operations("digits")
    policies = example(
        "seed.yaml",
        app="inference-service",
        namespace="ml-inference",
        operations=offered.values(),
    )
    peers = (GATEWAY, OTHER, f"spiffe://{LOCAL}/ns/dev/sa/cli")
    allowed = {
        (peer, name)
        for peer in peers
        for name, one in offered.items()
        if policies.decide(AccessRequest(peer, one.method, one.names)).allowed
    }
    assert allowed == {(GATEWAY, "ModelInfer"), (GATEWAY, "ModelStreamInfer")}
    for app, namespace in [("other", "ml-inference"), ("inference-service", "other")]:
        elsewhere = example("seed.yaml", app=app, namespace=namespace)
        assert elsewhere.decide(request()).rule == "no policy"


def test_the_developers_policy_lets_the_command_line_in_beside_the_seeds():
    cli = f"spiffe://{LOCAL}/ns/dev/sa/cli"
    watch = Operation("GET", frozenset({"/ztserve.v1.Directory/Watch"}), "watch")
    both = ("seed.yaml", "developer.yaml")
    for app in ("inference-service", "chat"):
        offered = operations("digits").values()
        policies = example(*both, app=app, namespace="ml-inference", operations=offered)
        for one in offered:
            assert policies.authorize(call(cli, operation=one)).allowed
        assert policies.authorize(call(name="ServerReady")).allowed
        assert policies.authorize(call(name="ModelMetadata")).allowed
        with pytest.raises(Denied):
            policies.authorize(call(OTHER))
    door = example(*both, app="directory", namespace="ztserve", operations=[watch])
    model = f"spiffe://{LOCAL}/ns/ml-inference/sa/digits"
    for principal in (cli, GATEWAY, model):
        assert door.authorize(call(principal, operation=watch)).allowed
    with pytest.raises(Denied):
        door.authorize(call(OTHER, operation=watch))
    edge = example(*both, app="api-gateway", namespace="ml-api")
    for one in operations("digits").values():
        assert edge.authorize(call(cli, operation=one)).allowed
        with pytest.raises(Denied):
            edge.authorize(call(OTHER, operation=one))
