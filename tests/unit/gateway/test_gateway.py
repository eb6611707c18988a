import asyncio
import contextlib
import json
import socket
import ssl
import threading
import time

import pytest

from tests.unit.gateway.support import (
    CLI,
    DOMAIN,
    GATEWAY,
    SHOP,
    asked,
    running,
    tensor,
    text,
)
from ztserve import errors, transport
from ztserve.audit import Log, verify_log
from ztserve.authorization import PolicySet
from ztserve.errors import ConfigError, IdentityError
from ztserve.gateway import Gateway, Limits
from ztserve.identity import Identity

DOUBLED = [{"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [2.0] * 4}]
EVENTS = "text/event-stream"


class MovingSource:
    """A source whose identity the test changes."""

    def __init__(self, identity: Identity) -> None:
        self.identity: Identity | None = identity

    def current(self) -> Identity:
        if self.identity is None:
            raise IdentityError("withdrawn by the test")
        return self.identity

    def subscribe(self, callback):
        return lambda: None


def post(path: str, body: dict, *more: str) -> bytes:
    """A request, byte by byte."""
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "host: gateway",
        "content-type: application/json",
        f"content-length: {len(data)}",
        *more,
    ]
    return "\r\n".join((*lines, "", "")).encode() + data


# --- who may come in ----------------------------------------------------------------


@pytest.mark.slow
def test_liveness_alone_needs_no_certificate(edge):
    assert edge.ask("GET", "/v2/health/live", anonymous=True)[0::2] == (
        200,
        {"live": True},
    )
    for method, path in [
        ("GET", "/v2/health/ready"),
        ("GET", "/v2"),
        ("GET", "/anything"),
        ("POST", "/v1/predict"),
        ("POST", "/v1/stream"),
        ("POST", "/v2/health/live"),
    ]:
        body = b"{}" if method == "POST" else None
        status, headers, told = edge.ask(method, path, body, anonymous=True)
        assert (status, headers["connection"]) == (401, "close")
        assert told["error"].startswith("show a client certificate")
        assert len(told["call_id"]) == 32
    assert edge.service.calls == []
    assert edge.counted() == {"no client certificate": 6}


def test_a_verified_caller_is_answered_and_recorded(edge):
    status, headers, answer = edge.ask("POST", "/v1/predict", tensor())
    assert status == 200
    assert answer == {"model_name": "digits", "outputs": DOUBLED}
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    (record,) = edge.records()
    assert record["api"] == {
        "operation": "/v1/predict",
        "request": {"uid": headers["x-call-id"]},
    }
    assert record["status"] == "released"
    assert record["actor"]["user"]["uid"] == CLI
    assert record["unmapped"]["policy"]["rule"] == "ns[ml-api]-policy[edge]-rule[0]"
    assert record["unmapped"]["model"]["name"] == "digits"
    assert record["unmapped"]["bytes_out"] == int(headers["content-length"])
    assert {"authorization", "receive", "forwarding"} == set(
        record["unmapped"]["stages_us"]
    )
    assert verify_log(edge.log).status == "self-consistent"


def test_the_deployment_is_told_who_called(edge):
    edge.ask("POST", "/v1/predict", tensor())
    (call,) = edge.service.calls
    assert call.peer.id == GATEWAY
    assert (call.caller.issuer, call.caller.subject) == (DOMAIN, CLI)
    assert call.caller.proof == f"x509-svid, asserted by {GATEWAY}"


def test_who_is_not_named_in_policy_is_refused_before_the_body_is_read(edge):
    shop = edge.authority.issue(SHOP)
    with edge.socket(shop) as tls:
        head = post("/v1/predict", tensor()).partition(b"\r\n\r\n")[0]
        tls.sendall(head + b"\r\n\r\n")  # and no body at all
        answer = tls.recv(65536)
    assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
    assert b"this identity may not do this" in answer
    assert b"policy" not in answer
    (record,) = edge.records()
    assert record["status_code"] == "Denied"
    assert SHOP in record["status_detail"]


def test_a_path_that_is_none_is_judged_like_any_other(edge):
    assert edge.ask("POST", "/v1/other", tensor())[0] == 404
    assert edge.ask("POST", "/elsewhere", tensor())[0] == 403
    assert edge.ask("GET", "/v2/models/digits")[0] == 404
    codes = [record["status_code"] for record in edge.records()]
    assert codes == ["NotFound", "Denied", "NotFound"]


# --- what is answered ---------------------------------------------------------------


def test_ready_asks_the_deployments(edge):
    assert edge.ask("GET", "/v2/health/ready")[0::2] == (200, {"ready": True})
    assert edge.service.calls[0].operation.title == "/v2/health/ready"


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/predict", "/v2/models/digits/infer"])
def test_every_name_of_predict_is_answered(edge, path):
    body = {**tensor(rows=2), "id": "mine", "model_version": "3"}
    status, _, answer = edge.ask("POST", path, body)
    assert (status, answer["id"], answer["model_version"]) == (200, "mine", "3")
    assert answer["outputs"][0]["data"] == [2.0] * 8


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/v1/stream", "/v2/models/digits/stream"])
def test_every_name_of_stream_is_answered_in_events(edge, path):
    status, headers, body = edge.ask("POST", path, text("hello"))
    assert (status, headers["content-type"]) == (200, EVENTS)
    assert headers["x-call-id"]
    events = body.decode().removesuffix("\n\n").split("\n\n")
    assert [json.loads(one.removeprefix("data: ")) for one in events] == [
        {
            "model_name": "digits",
            "outputs": [
                {"name": "hello", "datatype": "BYTES", "shape": [1], "data": ["piece"]}
            ],
        }
    ] * 3
    begun, ended = edge.records()
    assert (begun["status"], ended["status"]) == ("unfinished", "released")
    assert ended["unmapped"]["bytes_out"] > 0


def test_a_stream_that_is_refused_at_once_has_the_status_of_the_refusal(edge):
    status, headers, told = edge.ask("POST", "/v1/stream", text("raise Withheld"))
    assert (status, headers["content-type"]) == (422, "application/json")
    assert told["error"] == "told"


def test_a_stream_that_fails_later_ends_in_an_error_event(edge):
    status, headers, body = edge.ask("POST", "/v1/stream", text("fail"))
    last = body.decode().removesuffix("\n\n").split("\n\n")[-1]
    assert status == 200
    name, _, data = last.partition("\n")
    assert name == "event: error"
    assert json.loads(data.removeprefix("data: ")) == {
        "error": "no more of this",
        "call_id": headers["x-call-id"],
    }
    assert edge.records()[-1]["status_code"] == "Withheld"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        ("Denied", 403, "told"),
        ("InvalidInput", 400, "told"),
        ("NotFound", 404, "told"),
        ("Withheld", 422, "told"),
        ("InferenceError", 500, "the model failed on this request"),
        ("AuditError", 500, "the model failed on this request"),
    ],
)
def test_errors_are_told_in_public_words_with_the_call_id(
    edge, error, status, sentence
):
    found, headers, told = edge.ask("POST", "/v1/predict", text(f"raise {error}"))
    assert found == status
    assert told == {"error": sentence, "call_id": headers["x-call-id"]}
    assert "secret" not in json.dumps(told)
    (record,) = edge.records()
    assert record["api"]["request"]["uid"] == told["call_id"]


def test_input_that_is_not_understood_names_its_field(edge):
    status, _, told = edge.ask("POST", "/v1/predict", tensor(data=["a", "b"]))
    assert status == 400
    assert told["error"] == ("input 'x': data has 2 elements, shape [1, 4] has 4")
    assert edge.service.calls == []


def test_a_large_body_is_answered(edge):
    rows = 20_000
    status, _, answer = edge.ask("POST", "/v1/predict", tensor(rows=rows))
    assert status == 200
    assert len(answer["outputs"][0]["data"]) == rows * 4


# --- several deployments ------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_found_by_its_name_or_its_deployments(authority, tmp_path):
    with running(authority, tmp_path, models=("digits", "chat")) as edge:
        for name, model in [
            ("digits", "digits"),
            ("chat", "chat"),
            ("chat-service", "chat"),
        ]:
            for path, body in [
                ("/v1/predict", {**tensor(), "model_name": name}),
                (f"/v2/models/{name}/infer", tensor()),
                (f"/v2/models/{name}/infer", {**tensor(), "model_name": name}),
            ]:
                status, _, answer = edge.ask("POST", path, body)
                assert (status, answer["model_name"]) == (200, model)
        assert len(edge.services["chat-service"].calls) == 6
        status, _, told = edge.ask("POST", "/v1/predict", tensor())
        assert (status, told["error"][:21]) == (400, "model_name is missing")
        for body in ({**tensor(), "model_name": "other"},):
            assert edge.ask("POST", "/v1/predict", body)[0] == 404
        body = {**tensor(), "model_name": "chat"}
        status, _, told = edge.ask("POST", "/v2/models/digits/infer", body)
        assert (status, told["error"]) == (
            400,
            "model_name is another one than the path has",
        )


@pytest.mark.slow
def test_a_policy_on_one_model_holds_whatever_name_it_is_called_by(authority, tmp_path):
    rules = "[{from: [{source: {principals: [cluster.local/ns/dev/sa/cli]}}]}]"
    head = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
    policy = (
        head
        + f"metadata: {{name: all, namespace: ml-api}}\nspec: {{rules: {rules}}}\n"
        + head
        + "metadata: {name: no-chat, namespace: ml-api}\nspec: {action: DENY, "
        + "rules: [{to: [{operation: {paths: [/v2/models/chat/infer]}}]}]}\n"
    )
    models = ("digits", "chat")
    with running(authority, tmp_path, policy=policy, models=models) as edge:
        for path, name in [
            ("/v1/predict", "chat"),
            ("/v1/predict", "chat-service"),
            ("/v2/models/chat/infer", ""),
            ("/v2/models/chat-service/infer", ""),
        ]:
            body = {**tensor(), "model_name": name}
            assert edge.ask("POST", path, body)[0] == 403, (path, name)
        body = {**tensor(), "model_name": "digits"}
        assert edge.ask("POST", "/v1/predict", body)[0] == 200
        assert edge.services["chat-service"].calls == []


# --- the connection -----------------------------------------------------------------


@pytest.mark.slow
def test_one_connection_serves_many_requests(edge):
    with edge.https() as connection:
        for _ in range(20):
            assert asked(connection, "POST", "/v1/predict", tensor())[0] == 200
        assert asked(connection, "POST", "/v1/stream", text("hello"))[0] == 200
        assert asked(connection, "GET", "/v2/health/ready")[0] == 200
        status, headers, _ = asked(
            connection, "GET", "/v2/health/live", headers={"connection": "close"}
        )
        assert (status, headers["connection"]) == (200, "close")
        assert connection.sock is None or connection.sock.recv(1) == b""


def test_requests_sent_ahead_are_answered_in_order(edge):
    bodies = [tensor(rows=1), tensor(rows=3), tensor(rows=2)]
    sent = b"".join(post("/v1/predict", body) for body in bodies[:2])
    answer = edge.raw(sent + post("/v1/predict", bodies[2], "connection: close"))
    parts = answer.split(b"HTTP/1.1 200 OK\r\n")[1:]
    counts = [
        len(json.loads(part.partition(b"\r\n\r\n")[2])["outputs"][0]["data"])
        for part in parts
    ]
    assert counts == [4, 12, 8]


def test_a_request_may_come_byte_by_byte(edge):
    with edge.socket() as tls:
        for byte in post("/v1/predict", tensor(), "connection: close"):
            tls.sendall(bytes([byte]))
        answer = b""
        while piece := tls.recv(65536):
            answer += piece
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_client_that_waits_is_told_to_continue_only_if_it_may(edge):
    request = post("/v1/predict", tensor(), "expect: 100-continue")
    head, _, body = request.partition(b"\r\n\r\n")
    with edge.socket() as tls:
        tls.sendall(head + b"\r\n\r\n")
        assert tls.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        tls.sendall(body)
        assert tls.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
    with edge.socket(edge.authority.issue(SHOP)) as tls:
        tls.sendall(head + b"\r\n\r\n")
        answer = tls.recv(65536)
        assert answer.startswith(b"HTTP/1.1 403 Forbidden\r\n")
        assert b"connection: close" in answer


def test_a_client_that_goes_away_ends_its_call(edge):
    with edge.socket() as tls:
        tls.sendall(post("/v1/predict", text("wait")))
        assert edge.service.running.wait(5)
    ends = time.monotonic() + 5
    while not edge.records() and time.monotonic() < ends:
        time.sleep(0.02)
    assert edge.records()[-1]["status"] == "cancelled"


def test_a_client_that_leaves_a_stream_ends_it(edge):
    with edge.socket() as tls:
        tls.sendall(post("/v1/stream", text("endless")))
        assert b"data: " in tls.recv(65536) + tls.recv(65536)
    ends = time.monotonic() + 5
    while not edge.service.outcomes and time.monotonic() < ends:
        time.sleep(0.02)
    assert edge.service.outcomes
    assert edge.records()[-1]["status"] == "cancelled"


# --- identity that changes ----------------------------------------------------------


def test_a_new_svid_is_shown_to_the_next_connection(authority, tmp_path):
    first, second = authority.issue(GATEWAY), authority.issue(GATEWAY)
    source = MovingSource(Identity(first, authority.bundles))
    with running(authority, tmp_path, source=source) as edge, edge.socket() as older:
        source.identity = Identity(second, authority.bundles)
        with edge.socket() as newer:
            shown = [one.getpeercert(binary_form=True) for one in (older, newer)]
            assert shown == [first.chain_der[0], second.chain_der[0]]
        older.sendall(post("/v1/predict", tensor(), "connection: close"))
        assert older.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.slow
def test_without_an_identity_nothing_is_answered(authority, tmp_path):
    source = MovingSource(Identity(authority.issue(GATEWAY), authority.bundles))
    with running(authority, tmp_path, source=source) as edge, edge.socket() as older:
        source.identity = None
        with pytest.raises((ssl.SSLError, ConnectionError)):
            edge.socket()
        older.sendall(post("/v1/predict", tensor(), "connection: close"))
        answer = older.recv(65536)
        assert answer.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"no valid identity now" in answer
        assert edge.counted() == {"the gateway has no valid identity now": 1}


@pytest.mark.slow
def test_a_root_that_is_dropped_takes_its_clients_along(authority, tmp_path):
    other = type(authority)("b.example")
    both = {**authority.bundles, **other.bundles}
    svid = authority.issue(GATEWAY)
    source = MovingSource(Identity(svid, both))
    rule = "{from: [{source: {principals: [b.example/ns/x/sa/y]}}]}"
    policy = (
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
        f"metadata: {{name: b, namespace: ml-api}}\nspec: {{rules: [{rule}]}}\n"
    )
    guest = other.issue("spiffe://b.example/ns/x/sa/y")
    options = {"policy": policy, "federated": ("b.example",), "source": source}
    with (
        running(authority, tmp_path, **options) as edge,
        edge.https(guest) as connection,
        edge.socket(guest) as streaming,
    ):
        assert asked(connection, "POST", "/v1/predict", tensor())[0] == 200
        streaming.sendall(post("/v1/stream", text("endless")))
        assert streaming.recv(65536)
        source.identity = Identity(svid, authority.bundles)
        assert asked(connection, "POST", "/v1/predict", tensor())[0] == 401
        began = time.monotonic()
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while streaming.recv(65536):
                assert time.monotonic() - began < 4
        assert time.monotonic() - began < 4


# --- life -----------------------------------------------------------------------------


def gateway(authority, tmp_path, **options) -> Gateway:
    policies = PolicySet.parse("", trust_domain=DOMAIN, namespace="ml-api")
    made = {
        "source": authority.source(GATEWAY),
        "policies": policies,
        "deployments": {
            "x": transport.AsyncClient(
                "127.0.0.1:1", source=authority.source(GATEWAY), server_id=SHOP
            )
        },
        "log": Log(tmp_path / "audit" / f"{time.monotonic_ns()}.jsonl", origin={}),
        "address": ("127.0.0.1", 0),
        **options,
    }
    return Gateway(**made)


@pytest.mark.slow
def test_it_stops_cleanly_and_lets_what_runs_end(authority, tmp_path):
    with running(authority, tmp_path, grace_s=5) as edge:
        answers = []

        def ask() -> None:
            answers.append(edge.ask("POST", "/v1/predict", text("wait"))[0])

        thread = threading.Thread(target=ask)
        thread.start()
        assert edge.service.running.wait(5)
        stopping = threading.Thread(target=edge.gateway.stop, args=(5,))
        stopping.start()
        time.sleep(0.2)
        with pytest.raises((ConnectionError, ssl.SSLError)):
            edge.socket()
        edge.service.go.set()
        thread.join(5)
        stopping.join(5)
        assert answers == [200]
        assert not stopping.is_alive()
        edge.gateway.stop()


@pytest.mark.slow
def test_what_does_not_end_within_the_grace_is_cut_off(authority, tmp_path):
    with running(authority, tmp_path) as edge, edge.socket() as tls:
        tls.sendall(post("/v1/predict", text("wait")))
        assert edge.service.running.wait(5)
        began = time.monotonic()
        edge.gateway.stop(0.2)
        assert time.monotonic() - began < 3
        assert edge.records()[-1]["status"] == "cancelled"


def test_starting_twice_or_on_a_port_that_is_taken_is_refused(authority, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()[:2]
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1"):
            gateway(authority, tmp_path, address=address).start()
    one = gateway(authority, tmp_path)
    one.start()
    with pytest.raises(ConfigError, match="started already"):
        one.start()
    one.stop()
    one.stop()


def test_without_deployment_or_identity_it_does_not_start(authority, tmp_path):
    with pytest.raises(ConfigError, match="no deployment to route to"):
        gateway(authority, tmp_path, deployments={})
    source = MovingSource(Identity(authority.issue(GATEWAY), authority.bundles))
    source.identity = None
    with pytest.raises(IdentityError, match="withdrawn"):
        gateway(authority, tmp_path, source=source)


@pytest.mark.parametrize("value", [0, -1, True])
def test_no_limit_can_be_switched_off(value):
    with pytest.raises(ConfigError, match="no limit can be switched off"):
        Limits(max_connections=value)


@pytest.mark.slow
def test_a_deployment_that_is_away_is_told_as_such(authority, tmp_path):
    allow = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n"
    allow += "metadata: {name: a, namespace: ml-api}\nspec: {rules: [{}]}\n"
    with running(authority, tmp_path, policy=allow) as edge:
        deployments = edge.gateway._routes._deployments
        there = deployments["digits-service"]
        deployments["digits-service"] = transport.AsyncClient(
            "127.0.0.1:1",
            source=authority.source(GATEWAY),
            server_id=f"spiffe://{DOMAIN}/ns/ml-inference/sa/away",
            model="digits",
        )
        asyncio.run_coroutine_threadsafe(there.close(), edge.gateway._loop).result()
        assert edge.ask("GET", "/v2/health/ready")[0::2] == (503, {"ready": False})
        status, headers, told = edge.ask("POST", "/v1/predict", tensor())
        assert (status, headers["retry-after"]) == (503, "1")
        assert "127.0.0.1" not in told["error"]


def test_a_call_that_cannot_be_recorded_is_not_answered(edge, monkeypatch):
    def fail(self, record):
        raise errors.AuditError("the disk is full of secrets")

    monkeypatch.setattr(Log, "_write", fail)
    status, _, told = edge.ask("POST", "/v1/predict", tensor())
    assert (status, told["error"]) == (500, "internal error")
