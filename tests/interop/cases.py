"""The cases of the grpc project's interop-test-descriptions.md, and their standing.

A case is a function of its name. Its docstring says, for docs/interop.md, in what it
differs from the description; most do not. `ABSENT` has the cases that are not run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.interop.drivers import Conversation, Driver, End, Shape
from tests.interop.service import MESSAGES, SERVICE, STATUSES, Served, zeros

EMPTY = SERVICE + "EmptyCall"
UNARY = SERVICE + "UnaryCall"
TAKE = SERVICE + "StreamingInputCall"
GIVE = SERVICE + "StreamingOutputCall"
BOTH = SERVICE + "FullDuplexCall"
OK, INVALID_ARGUMENT = 0, 3
CANCELLED, DEADLINE_EXCEEDED, UNIMPLEMENTED = 1, 4, 12
ASKED, ANSWERED = (27182, 8, 1828, 45904), (31415, 9, 2653, 58979)
AT_ONCE, SOAK, REBUILT = 100, 50, 10
INITIAL, TRAILING = "x-grpc-test-echo-initial", "x-grpc-test-echo-trailing-bin"


@dataclass(frozen=True)
class Case:
    """One case that is run with every driver."""

    run: Callable[[Driver, Served], None]

    @property
    def name(self) -> str:
        """The name in the description."""
        return self.run.__name__

    @property
    def note(self) -> str:
        """In what it differs from the description; mostly empty."""
        return " ".join((self.run.__doc__ or "").split())


CASES: list[Case] = []


def case(run: Callable[[Driver, Served], None]) -> Callable[[Driver, Served], None]:
    """Add a function to the cases."""
    CASES.append(Case(run))
    return run


def simple(size: int = 314159, asked: int = 271828, **more: Any) -> bytes:
    """A SimpleRequest; that of large_unary where nothing else is said."""
    made = MESSAGES["SimpleRequest"](response_size=size, payload=zeros(asked), **more)
    return made.SerializeToString()


def streamed(*sizes: int, asked: int = 0, interval_us: int = 0, **more: Any) -> bytes:
    """A StreamingOutputCallRequest for answers of these sizes."""
    made = MESSAGES["StreamingOutputCallRequest"](
        response_parameters=[
            {"size": size, "interval_us": interval_us} for size in sizes
        ],
        payload=zeros(asked) if asked else None,
        **more,
    )
    return made.SerializeToString()


def given(size: int, **more: Any) -> bytes:
    """A StreamingInputCallRequest."""
    made = MESSAGES["StreamingInputCallRequest"](payload=zeros(size), **more)
    return made.SerializeToString()


def size_of(message: bytes | None, kind: str = "SimpleResponse") -> int:
    """Return the size of the payload in an answer, which is all zeros."""
    assert message is not None
    body = MESSAGES[kind].FromString(message).payload.body
    assert body == bytes(len(body))
    return len(body)


def went_well(call: Conversation) -> None:
    assert call.receive() is None
    assert call.end() == End(OK, "")


def is_large(call: Conversation) -> None:
    """Check the answer of large_unary."""
    assert size_of(call.receive()) == 314159
    went_well(call)


@case
def empty_unary(driver: Driver, served: Served) -> None:
    call = driver.call(Shape.UNARY, EMPTY)
    assert call.receive() == b""
    went_well(call)


@case
def large_unary(driver: Driver, served: Served) -> None:
    is_large(driver.call(Shape.UNARY, UNARY, simple()))


@case
def client_compressed_unary(driver: Driver, served: Served) -> None:
    """without the probe (`expect_compressed`): a handler is not told how its message
    travelled; the test looks into the server instead"""
    with_it = simple(expect_compressed={"value": True})
    is_large(driver.call(Shape.UNARY, UNARY, with_it, compressed=True))
    is_large(driver.call(Shape.UNARY, UNARY, simple(expect_compressed={})))


@case
def client_streaming(driver: Driver, served: Served) -> None:
    call = driver.call(Shape.CLIENT_STREAM, TAKE)
    for size in ASKED:
        call.send(given(size))
    call.half_close()
    assert aggregated(call) == 74922


@case
def client_compressed_streaming(driver: Driver, served: Served) -> None:
    """without the probe, as above; the two messages go in two streams, since grpcio
    cannot choose for each message"""
    for size, compressed in ((27182, True), (45904, False)):
        call = driver.call(Shape.CLIENT_STREAM, TAKE, compressed=compressed)
        call.send(given(size, expect_compressed={"value": compressed}))
        call.half_close()
        assert aggregated(call) == size


def aggregated(call: Conversation) -> int:
    """Return what a StreamingInputCall answers."""
    message = call.receive()
    assert message is not None
    went_well(call)
    answer = MESSAGES["StreamingInputCallResponse"].FromString(message)
    return int(answer.aggregated_payload_size)


@case
def server_streaming(driver: Driver, served: Served) -> None:
    call = driver.call(Shape.SERVER_STREAM, GIVE, streamed(*ANSWERED))
    for size in ANSWERED:
        assert size_of(call.receive(), "StreamingOutputCallResponse") == size
    went_well(call)


@case
def ping_pong(driver: Driver, served: Served) -> None:
    call = driver.call(Shape.BIDI, BOTH)
    for asked, answered in zip(ASKED, ANSWERED, strict=True):
        call.send(streamed(answered, asked=asked))
        assert size_of(call.receive(), "StreamingOutputCallResponse") == answered
    call.half_close()
    went_well(call)


@case
def empty_stream(driver: Driver, served: Served) -> None:
    call = driver.call(Shape.BIDI, BOTH)
    call.half_close()
    went_well(call)


@case
def custom_metadata(driver: Driver, served: Served) -> None:
    """without the echo: a handler of ours sets no metadata, neither before nor after
    its answer; what the client sends arrives (binary values are read, and dropped,
    since no policy can speak of them)"""
    metadata = ((INITIAL, "test_initial_metadata_value"), (TRAILING, b"\xab\xab\xab"))
    is_large(driver.call(Shape.UNARY, UNARY, simple(), metadata=metadata))
    call = driver.call(Shape.BIDI, BOTH, metadata=metadata)
    call.send(streamed(314159, asked=271828))
    call.half_close()
    assert size_of(call.receive(), "StreamingOutputCallResponse") == 314159
    went_well(call)
    seen = [dict(one.headers) for one in served.service.calls]
    assert [one.get(INITIAL) for one in seen] == ["test_initial_metadata_value"] * 2
    assert not any(TRAILING in one for one in seen)


@case
def status_code_and_message(driver: Driver, served: Served) -> None:
    """with each status that an error of ours has, not with UNKNOWN, which none has:
    a handler ends a call by raising one of them"""
    for code in STATUSES:
        asked = {"code": code, "message": "test status message"}
        wanted = End(code, "test status message")
        call = driver.call(Shape.UNARY, UNARY, simple(response_status=asked))
        assert call.receive() is None
        assert call.end() == wanted
        call = driver.call(Shape.BIDI, BOTH)
        call.send(streamed(response_status=asked))
        call.half_close()
        assert call.receive() is None
        assert call.end() == wanted


@case
def special_status_message(driver: Driver, served: Served) -> None:
    """with INVALID_ARGUMENT, not UNKNOWN, for the same reason"""
    text = "\t\ntest with whitespace\r\nand Unicode BMP ☺ and non-BMP 😈\t\n"
    asked = {"code": INVALID_ARGUMENT, "message": text}
    call = driver.call(Shape.UNARY, UNARY, simple(response_status=asked))
    assert call.receive() is None
    assert call.end() == End(INVALID_ARGUMENT, text)


@case
def unimplemented_method(driver: Driver, served: Served) -> None:
    call = driver.call(Shape.UNARY, SERVICE + "UnimplementedCall")
    assert call.receive() is None
    assert call.end().code == UNIMPLEMENTED


@case
def unimplemented_service(driver: Driver, served: Served) -> None:
    path = "/grpc.testing.UnimplementedService/UnimplementedCall"
    call = driver.call(Shape.UNARY, path)
    assert call.receive() is None
    assert call.end().code == UNIMPLEMENTED


@case
def cancel_after_begin(driver: Driver, served: Served) -> None:
    """the server lets go of the call at once, of grpc-js's at its deadline: Node keeps
    the RST_STREAM back (from grpcio's server as well)"""
    call = driver.call(Shape.CLIENT_STREAM, TAKE, timeout_s=1)
    call.cancel()
    assert call.receive() is None
    assert call.end().code == CANCELLED


@case
def cancel_after_first_response(driver: Driver, served: Served) -> None:
    call = driver.call(Shape.BIDI, BOTH)
    call.send(streamed(31415, asked=27182))
    assert size_of(call.receive(), "StreamingOutputCallResponse") == 31415
    call.cancel()
    assert call.receive() is None
    assert call.end().code == CANCELLED


@case
def timeout_on_sleeping_server(driver: Driver, served: Served) -> None:
    call = driver.call(Shape.BIDI, BOTH, timeout_s=0.001)
    # Not just any request: a server is quick, where a client's requests are at an end.
    call.send(streamed(9, asked=27182, interval_us=1_000_000))
    assert call.receive() is None
    assert call.end().code == DEADLINE_EXCEEDED


@case
def concurrent_large_unary(driver: Driver, served: Served) -> None:
    """with 100 calls at once, not 1,000, where the server takes 32 on a connection"""
    for call in [driver.call(Shape.UNARY, UNARY, simple()) for _ in range(AT_ONCE)]:
        is_large(call)


@case
def rpc_soak(driver: Driver, served: Served) -> None:
    """50 calls"""
    for _ in range(SOAK):
        is_large(driver.call(Shape.UNARY, UNARY, simple()))


@case
def channel_soak(driver: Driver, served: Served) -> None:
    """10 connections"""
    for _ in range(REBUILT):
        driver.reconnect()
        is_large(driver.call(Shape.UNARY, UNARY, simple()))


_NO_TOKENS = "callers are known by their certificates; no OAuth or Google tokens"
_NO_ANSWERS_COMPRESSED = (
    "answers are never compressed, as the standard allows: the size of a compressed "
    "answer tells of a secret that stands beside what the caller chose"
)
ABSENT = {
    "server_compressed_unary": _NO_ANSWERS_COMPRESSED,
    "server_compressed_streaming": _NO_ANSWERS_COMPRESSED,
    "cacheable_unary": "of caching proxies and GET; each of our connections is its "
    "caller's own, end to end",
    "compute_engine_creds": _NO_TOKENS,
    "compute_engine_channel_credentials": _NO_TOKENS,
    "google_default_credentials": _NO_TOKENS,
    "jwt_token_creds": _NO_TOKENS,
    "oauth2_auth_token": _NO_TOKENS,
    "per_rpc_creds": _NO_TOKENS,
    "orca_per_rpc, orca_oob": "of load reports to a balancer, which we have none of",
    "pick_first_unary": "of the client's choice among servers; of a server it asks "
    "large_unary",
    "long_lived_channel": "`rpc_soak` with waits between the calls, for what lies "
    "between client and server; here nothing does",
}
"""Cases that are not run, and why."""
