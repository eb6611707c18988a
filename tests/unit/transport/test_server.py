import threading
import time

import grpc
import pytest

from tests.unit.transport.support import (
    CLI,
    DOMAIN,
    GATEWAY,
    INFER,
    SERVER,
    STREAM,
    Echo,
    MovingSource,
    Served,
    message,
    refused,
    serving,
)
from ztserve.errors import (
    ConfigError,
    DeadlineExceeded,
    IdentityError,
    InvalidInput,
)
from ztserve.identity import Identity
from ztserve.transport import Client, Limits, Server, callers, inference_methods
from ztserve.transport.v1 import inference_pb2 as pb
from ztserve.types import Caller

Code = grpc.StatusCode


def call(channel, path: str = INFER, body: bytes | None = None, **more) -> bytes:
    return channel.unary_unary(path)(
        message() if body is None else body, timeout=10, **more
    )


def error_of(channel, *args, **more) -> tuple[grpc.StatusCode, str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, *args, **more)
    return refused(caught.value)


# --- who called --------------------------------------------------------------------


def test_a_call_tells_who_asked_for_what_and_from_where(served: Served) -> None:
    with served.channel() as channel:
        before = time.monotonic()
        call(channel, metadata=(("x-team", "red"), ("zt-secret", "1")))
    [seen] = served.service.calls
    assert seen.peer.id == CLI
    assert seen.caller is None
    assert seen.operation.title == "/v1/predict"
    assert INFER in seen.operation.names
    assert seen.headers["x-team"] == "red"
    assert not any(name.startswith("zt-") for name in seen.headers)
    assert (seen.host, seen.port) == (served.host, served.port)
    assert seen.source_ip == "127.0.0.1"
    assert seen.source_port > 0
    assert len(seen.id) == 32
    assert before < seen.deadline <= time.monotonic() + 10
    assert seen.notes == ()


def test_the_deadline_is_bounded_for_those_who_give_none(authority) -> None:
    with (
        serving(authority, limits=Limits(max_call_s=3)) as served,
        served.channel() as channel,
    ):
        channel.unary_unary(INFER)(message())
        channel.unary_unary(INFER)(message(), timeout=9)
    for seen in served.service.calls:
        assert seen.deadline <= time.monotonic() + 3


def test_a_delegates_word_about_its_caller_is_taken(authority) -> None:
    ada = Caller("https://issuer", "ada", {"role": "doctor"}, "jwt")
    header = callers.written(ada, audience=SERVER, request=message())
    with (
        serving(authority, delegates=[GATEWAY]) as served,
        served.channel(authority.issue(GATEWAY)) as channel,
    ):
        call(channel, metadata=((callers.HEADER, header),))
    [seen] = served.service.calls
    assert seen.caller is not None
    assert seen.caller.subject == "ada"
    assert seen.caller.proof == f"jwt, asserted by {GATEWAY}"


def test_a_call_that_the_caller_left_is_seen_as_cancelled(served: Served) -> None:
    with served.channel() as channel:
        future = channel.unary_unary(INFER).future(message(t="wait"))
        assert served.service.running.acquire(timeout=5)
        [seen] = served.service.calls
        assert not seen.cancelled()
        future.cancel()
        until = time.monotonic() + 5
        while not seen.cancelled() and time.monotonic() < until:
            time.sleep(0.01)
        assert seen.cancelled()


# --- what is refused ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("Denied", Code.PERMISSION_DENIED),
        ("InvalidInput", Code.INVALID_ARGUMENT),
        ("NotFound", Code.NOT_FOUND),
        ("Overloaded", Code.RESOURCE_EXHAUSTED),
        ("DeadlineExceeded", Code.DEADLINE_EXCEEDED),
        ("Withheld", Code.FAILED_PRECONDITION),
        ("Interrupted", Code.ABORTED),
    ],
)
def test_a_refusal_tells_its_public_sentence_only(served, name, code) -> None:
    with served.channel() as channel:
        told = error_of(channel, body=message(t=f"raise {name}"))
    assert told == (code, "the public sentence", name)


@pytest.mark.parametrize("name", ["InferenceError", "AuditError", "RuntimeError"])
def test_a_failure_tells_the_call_id_only(served: Served, name: str, caplog) -> None:
    with served.channel() as channel:
        code, told, _ = error_of(channel, body=message(t=f"raise {name}"))
    assert code is Code.INTERNAL
    assert served.service.calls[0].id in told
    assert "secret" not in told


def test_another_model_or_version_is_not_found(served: Served) -> None:
    with served.channel() as channel:
        code, told, _ = error_of(channel, body=message("digits"))
        assert (code, told) == (
            Code.NOT_FOUND,
            "model 'digits' is not served here; this is 'echo'",
        )
        other = pb.ModelInferRequest(model_name="echo", model_version="9")
        code, told, _ = error_of(channel, body=other.SerializeToString())
        assert (code, told.split(";")[1]) == (Code.NOT_FOUND, " this is '3'")
        call(channel, body=message(""))
    assert len(served.service.outcomes) == 3


def test_an_unknown_method_is_unimplemented(served: Served) -> None:
    with served.channel() as channel:
        code, *_ = error_of(channel, "/inference.GRPCInferenceService/ModelConfig")
    assert code is Code.UNIMPLEMENTED


@pytest.mark.slow
def test_a_message_beyond_the_limit_is_refused_and_recorded(authority) -> None:
    limits = Limits(max_message_bytes=10_000)
    with serving(authority, limits=limits) as served, served.channel() as channel:
        for size in (20_000, 200_000):
            code, words, _ = error_of(channel, body=message(t="x" * size))
            assert code is Code.INVALID_ARGUMENT
            assert "the limit is 10000" in words
        call(channel, body=message(t="x" * 9_000))
        *beyond, last = served.service.outcomes
    assert [type(one) for one in beyond] == [InvalidInput, InvalidInput]
    assert last == "released"


def test_a_call_without_a_message_is_refused(served: Served) -> None:
    with served.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.stream_unary(INFER)(iter(()), timeout=5)
    assert refused(caught.value)[1] == "the call carried no message"


@pytest.mark.slow
def test_a_body_that_does_not_arrive_in_time_ends_the_call(authority) -> None:
    stop = threading.Event()

    def slowly():
        stop.wait(10)
        return iter(())

    with serving(authority, limits=Limits(body_s=0.5)) as served:
        with served.channel() as channel:
            begun = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                channel.stream_unary(INFER)(_lazily(slowly), timeout=8)
            assert time.monotonic() - begun < 3
            assert caught.value.code() is Code.CANCELLED
            stop.set()
        until = time.monotonic() + 2
        while not served.service.outcomes and time.monotonic() < until:
            time.sleep(0.01)
    [outcome] = served.service.outcomes
    assert isinstance(outcome, DeadlineExceeded)
    assert outcome.public == "the request did not arrive within 0.5 s"


def _lazily(make):
    yield from make()


# --- too much at once -----------------------------------------------------------------


def test_calls_beyond_the_limit_are_overloaded_at_once_and_health_is_told(
    authority,
) -> None:
    limits = Limits(max_in_flight=2, max_in_flight_per_principal=2)
    with serving(authority, limits=limits) as served, served.channel() as channel:
        held = [channel.unary_unary(INFER).future(message(t="wait")) for _ in range(2)]
        for _ in held:
            assert served.service.running.acquire(timeout=5)
        begun = time.monotonic()
        code, told, name = error_of(channel)
        assert time.monotonic() - begun < 1
        assert (code, name) == (Code.RESOURCE_EXHAUSTED, "Overloaded")
        assert "try again later" in told
        [refusal] = served.refusals
        assert refusal.path == INFER
        assert refusal.peer is not None
        assert "limit is 2" in refusal.error.reason
        call(channel, "/inference.GRPCInferenceService/ServerLive", b"")
        served.service.go.set()
        for one in held:
            one.result(timeout=5)
        call(channel)
        assert served.server.in_flight == 0


def test_one_principal_leaves_room_for_others(authority) -> None:
    limits = Limits(max_in_flight=4, max_in_flight_per_principal=1)
    with (
        serving(authority, limits=limits) as served,
        served.channel() as one,
        served.channel(authority.issue(GATEWAY)) as other,
    ):
        held = one.unary_unary(INFER).future(message(t="wait"))
        assert served.service.running.acquire(timeout=5)
        assert "you have too many calls" in error_of(one)[1]
        call(other)
        served.service.go.set()
        held.result(timeout=5)


def test_a_flood_is_never_queued_without_bound(authority) -> None:
    limits = Limits(max_in_flight=2, max_in_flight_per_principal=2)
    with serving(authority, limits=limits) as served, served.channel() as channel:
        multi = channel.unary_unary(INFER)
        held = [multi.future(message(t="wait"), timeout=20) for _ in range(60)]
        until = time.monotonic() + 10
        while sum(one.done() for one in held) < 58 and time.monotonic() < until:
            time.sleep(0.02)
        assert sum(one.done() for one in held) == 58
        served.service.go.set()
        codes = [one.exception(timeout=5) for one in held]
    assert sum(error is None for error in codes) == 2
    assert {e.code() for e in codes if e is not None} == {Code.RESOURCE_EXHAUSTED}


# --- streams -------------------------------------------------------------------------


def pieces(channel, messages, **more):
    stream = channel.stream_stream(STREAM)(iter(messages), timeout=10, **more)
    return [pb.ModelStreamInferResponse.FromString(one) for one in stream]


def test_each_message_of_a_stream_is_a_call_of_its_own(served: Served) -> None:
    with served.channel() as channel:
        got = pieces(channel, [message(t="a"), message(t="b")])
    assert [m.infer_response.raw_output_contents[0][4:] for m in got] == [b"a"] * 3 + [
        b"b"
    ] * 3
    assert {m.infer_response.id for m in got} == {"own"}
    first, second = served.service.calls
    assert first.id != second.id
    assert first.operation.title == second.operation.title == "/v1/stream"
    assert served.service.outcomes == ["released", "released"]


def test_what_is_wrong_with_one_message_is_told_in_its_place(served: Served) -> None:
    with served.channel() as channel:
        got = pieces(
            channel, [message(t="raise InvalidInput"), b"\xff", message(t="fine")]
        )
    assert [m.error_message for m in got[:2]] == [
        "the public sentence",
        "the message is not a valid ModelInferRequest: see the Open Inference "
        "Protocol, version 2",
    ]
    assert got[0].infer_response.parameters["zt-error"].string_param == "InvalidInput"
    assert len(got) == 5


def test_what_concerns_the_whole_stream_ends_it(served: Served) -> None:
    with served.channel() as channel, pytest.raises(grpc.RpcError) as caught:
        pieces(channel, [message(t="raise Denied"), message(t="fine")])
    assert refused(caught.value) == (
        Code.PERMISSION_DENIED,
        "the public sentence",
        "Denied",
    )
    assert len(served.service.calls) == 1


def test_a_stream_has_a_bounded_number_of_messages(authority) -> None:
    with (
        serving(authority, limits=Limits(max_stream_messages=2)) as served,
        served.channel() as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        pieces(channel, [message(t="a")] * 3)
    assert "at most 2 requests" in refused(caught.value)[1]
    assert len(served.service.calls) == 2


@pytest.mark.slow
def test_a_silent_stream_is_ended(authority) -> None:
    stop = threading.Event()

    def messages():
        yield message(t="a")
        stop.wait(10)

    with serving(authority, limits=Limits(stream_idle_s=0.5)) as served:
        with served.channel() as channel:
            begun = time.monotonic()
            with pytest.raises(grpc.RpcError) as caught:
                list(channel.stream_stream(STREAM)(messages(), timeout=8))
            stop.set()
        assert time.monotonic() - begun < 3
        assert caught.value.code() is Code.CANCELLED
        until = time.monotonic() + 2
        while served.server.in_flight and time.monotonic() < until:
            time.sleep(0.01)
        assert served.server.in_flight == 0


def test_a_caller_that_leaves_a_stream_ends_the_work(authority) -> None:
    with serving(authority, Echo(pieces=10**9)) as served:
        with served.channel() as channel:
            stream = channel.stream_stream(STREAM)(iter([message()]))
            next(stream)
            stream.cancel()
            until = time.monotonic() + 5
            while served.server.in_flight and time.monotonic() < until:
                time.sleep(0.01)
        assert served.server.in_flight == 0
        assert isinstance(served.service.outcomes[0], GeneratorExit)


# --- asking ---------------------------------------------------------------------------


def test_health_and_metadata_are_judged_and_told(
    served: Served, client: Client
) -> None:
    assert client.ready()
    about = client.metadata()
    assert (about.model, about.version) == ("echo", "3")
    assert about.digest == "sha256:" + "a" * 64
    assert about.inputs == (("x", "FP32", (-1, 4)),)
    base = "/inference.GRPCInferenceService/"
    with served.channel() as channel:
        live = pb.ServerLiveResponse.FromString(call(channel, base + "ServerLive", b""))
        assert live.live
        asked = pb.ModelReadyRequest(name="echo").SerializeToString()
        told = call(channel, base + "ModelReady", asked)
        assert pb.ModelReadyResponse.FromString(told).ready
        named = pb.ServerMetadataResponse.FromString(
            call(channel, base + "ServerMetadata", b"")
        )
        assert named.name == "ztserve"
        asked = pb.ModelReadyRequest(name="other").SerializeToString()
        assert error_of(channel, base + "ModelReady", asked)[0] is Code.NOT_FOUND
        served.service.denied = frozenset((CLI,))
        for name in ("ServerLive", "ServerReady", "ServerMetadata", "ModelMetadata"):
            assert error_of(channel, base + name, b"")[0] is Code.PERMISSION_DENIED
    titles = {seen.operation.title for seen in served.service.calls}
    assert "/v2/health/live" in titles
    assert "/v2/models/echo" in titles


# --- starting and stopping ------------------------------------------------------------


def test_a_port_range_is_used_and_exhausted(authority) -> None:
    with serving(authority) as served:
        ports = range(served.port, served.port + 3)
        servers = []
        for _ in range(2):
            server = Server(
                inference_methods(Echo(), "echo"), source=authority.source(SERVER)
            )
            assert server.start("127.0.0.1", ports)[1] in ports
            servers.append(server)
        last = Server((), source=authority.source(SERVER))
        with pytest.raises(ConfigError, match=r"no free port on 127\.0\.0\.1 in range"):
            last.start("127.0.0.1", ports)
        for server in servers:
            server.stop(0)


def test_a_server_without_an_identity_does_not_start(authority) -> None:
    source = MovingSource(Identity(authority.issue(SERVER), authority.bundles))
    source.move(None)
    with pytest.raises(IdentityError, match="withdrawn by the test"):
        Server((), source=source).start("127.0.0.1")


def test_a_server_starts_once(served: Served) -> None:
    with pytest.raises(ConfigError, match="started already"):
        served.server.start("127.0.0.1")


@pytest.mark.slow
def test_stopping_lets_running_calls_end_and_takes_no_new_ones(authority) -> None:
    with serving(authority) as served, served.channel() as channel:
        held = channel.unary_unary(INFER).future(message(t="wait"))
        assert served.service.running.acquire(timeout=5)
        stopping = threading.Thread(target=served.server.stop, args=(5,))
        stopping.start()
        time.sleep(0.2)
        with served.channel() as another:
            assert error_of(another)[0] is Code.UNAVAILABLE
        served.service.go.set()
        assert held.result(timeout=5)
        stopping.join(timeout=5)
        assert not stopping.is_alive()
        served.server.stop(0)


@pytest.mark.slow
def test_a_call_that_outlasts_the_grace_is_cut(authority) -> None:
    with serving(authority) as served, served.channel() as channel:
        held = channel.unary_unary(INFER).future(message(t="wait"))
        assert served.service.running.acquire(timeout=5)
        begun = time.monotonic()
        served.server.stop(0.3)
        assert time.monotonic() - begun < 4
        assert held.exception(timeout=5).code() is not Code.OK


def test_it_serves_ipv6_too(authority) -> None:
    server = Server(inference_methods(Echo(), "echo"), source=authority.source(SERVER))
    host, port = server.start("::1")
    with Client(
        f"[{host}]:{port}", source=authority.source(CLI), server_id=SERVER
    ) as client:
        assert client.infer({"t": "hi"}) == {"t": "hi"}
    server.stop(0)


def test_federated_callers_are_known_by_their_own_domain(authority) -> None:
    from ztserve.testing import ThrowAwayAuthority

    partner = ThrowAwayAuthority("partner.example")
    source = authority.source(SERVER, federated=partner.bundles)
    caller = "spiffe://partner.example/ns/x/sa/y"
    with (
        serving(authority, source=source) as served,
        served.channel(partner.issue(caller)) as channel,
    ):
        call(channel)
    assert served.service.calls[0].peer.id == caller
    assert DOMAIN not in caller
