"""Both ends of HTTP/2, byte by byte; names of tests begin with ids of http2.toml."""

import pytest

from tests.unit.transport.http2.wire import (
    ANSWER,
    OPEN,
    REQUEST,
    RESPONSE,
    TRAILERS,
    changed,
    data,
    dialled,
    ends,
    headers,
    opened,
    pair,
    resets,
    sent,
    settle,
)
from ztserve.transport.http2 import (
    Bounds,
    Code,
    Connection,
    DataReceived,
    GoingAway,
    HeadersReceived,
    PingAnswered,
    StreamReset,
    Writable,
    encode,
    frames,
)
from ztserve.transport.http2.fields import MAX_REMEMBERED_BYTES

# --- whole exchanges ----------------------------------------------------------------


def test_a_call_goes_there_and_back():
    client, server = pair()
    stream = client.request(OPEN)
    client.data(stream, b"question", end=True)
    _, arrived = settle(client, server)
    head, body = arrived
    assert isinstance(head, HeadersReceived)
    assert (head.head.method, head.head.path) == (b"POST", REQUEST[2][1])
    assert head.head.fields == REQUEST[4:]
    assert body == DataReceived(stream, b"question", ended=True)
    server.headers(stream, ANSWER)
    server.data(stream, b"answer")
    server.headers(stream, TRAILERS, end=True)
    back, _ = settle(client, server)
    assert back[0].head.status == 200
    assert back[1] == DataReceived(stream, b"answer", ended=False)
    assert back[2] == HeadersReceived(stream, ((b"grpc-status", b"0"),), ended=True)
    assert client.open_streams == server.open_streams == 0


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9, 10, 24, 100])
def test_bytes_may_arrive_in_pieces_of_any_size(size):
    client, server = Connection(client=True), Connection(client=False)
    stream = client.request(OPEN)
    client.data(stream, b"x" * 50, end=True)
    raw, events = client.outgoing(), []
    for at in range(0, len(raw), size):
        events += server.receive(raw[at : at + size])
    assert [type(event) for event in events] == [HeadersReceived, DataReceived]
    assert events[1].data == b"x" * 50


def test_a_body_larger_than_all_windows_arrives_whole_and_in_order():
    client, server = pair(stream_window=70_000, connection_window=100_000)
    body = bytes(range(256)) * 4000
    stream = client.request(OPEN)
    client.data(stream, body, end=True)
    assert client.unsent(stream) > 0
    arrived, told = b"", []
    while client.unsent(stream):
        for event in server.receive(client.outgoing()):
            if isinstance(event, DataReceived):
                assert len(arrived) + len(event.data) <= len(body)
                arrived += event.data
                server.consumed(stream, len(event.data))
        told += client.receive(server.outgoing())
    for event in server.receive(client.outgoing()):
        arrived += getattr(event, "data", b"")
    assert arrived == body
    assert Writable(stream) in told


@pytest.mark.parametrize("size", [1, 2, 9, 10, 100])
def test_no_block_is_empty_also_where_the_last_frame_is(size):
    client, server = pair()
    stream = client.request(OPEN)
    client.data(stream, b"question")
    client.data(stream, b"", end=True)
    blocks = list(client.blocks(size))
    assert all(blocks)
    assert server.receive(b"".join(blocks))[-1] == DataReceived(stream, b"", ended=True)


def test_streams_that_wait_for_the_same_window_take_turns():
    client, server = pair(connection_window=1 << 20, stream_window=1 << 20)
    one, other = client.request(OPEN), client.request(OPEN)
    client.data(one, bytes(3 << 20), end=True)
    client.data(other, bytes(3 << 20), end=True)
    got = {one: 0, other: 0}
    for _ in range(40):
        for event in server.receive(client.outgoing()):
            if isinstance(event, DataReceived):
                got[event.stream_id] += len(event.data)
                server.consumed(event.stream_id, len(event.data))
        client.receive(server.outgoing())
    assert got[one] > 1 << 20
    assert got[other] > 1 << 20


def test_trailers_wait_for_the_data_before_them():
    client, server = pair(stream_window=70_000, connection_window=70_000)
    stream = client.request(OPEN, end=True)
    server.receive(client.outgoing())
    server.headers(stream, ANSWER)
    server.data(stream, bytes(100_000))
    server.headers(stream, TRAILERS, end=True)
    kinds = []
    while server.open_streams or not kinds:
        for event in client.receive(server.outgoing()):
            kinds.append(type(event))
            if isinstance(event, DataReceived):
                client.consumed(stream, len(event.data))
        server.receive(client.outgoing())
    kinds += [type(event) for event in client.receive(server.outgoing())]
    assert kinds[0] is kinds[-1] is HeadersReceived
    assert set(kinds[1:-1]) == {DataReceived}


def test_s8_1d_an_answer_before_the_end_of_the_request_resets_the_rest_of_it():
    client, server = pair()
    stream = client.request(OPEN)
    settle(client, server)
    server.headers(stream, encode((*RESPONSE, (b"grpc-status", b"7"))), end=True)
    client.data(stream, b"still coming")
    back, there = settle(client, server)
    assert back[0].ended
    assert StreamReset(stream, Code.NO_ERROR, "") in back
    assert there == []  # what came late is dropped
    assert not server.over


def test_s4_1a_s4_3a_a_large_block_is_sent_in_continuations():
    client = Connection(client=True)  # which knows of no larger frames yet
    server = Connection(client=False, bounds=Bounds(max_header_bytes=60_000))
    big = encode((*REQUEST, *((b"x-%d" % n, b"v" * 1000) for n in range(30))))
    client.request(big, end=True)
    raw = client.outgoing()
    assert raw.count(frames.head(frames.CONTINUATION, 4, 1, len(big) + 1 - 16384)) == 1
    (event,) = server.receive(raw)
    assert len(event.head.fields) == 32


def test_s4_3_1a_h4_2a_h4_2b_we_say_once_that_we_use_no_dynamic_table():
    client = Connection(client=True)
    client.request(OPEN)
    client.request(OPEN)
    blocks = [f[3] for f in sent(client) if f[0] == frames.HEADERS]
    assert blocks == [b"\x20" + OPEN, OPEN]


# --- 3.4 preface --------------------------------------------------------------------


def test_s3_4d_what_is_no_preface_ends_the_connection_at_its_first_byte():
    assert ends(Connection(client=False), b"G", Code.PROTOCOL_ERROR, "preface")
    assert ends(Connection(client=False), b"PRI * HTTP/1", Code.PROTOCOL_ERROR)


@pytest.mark.parametrize(
    "first",
    [
        frames.frame(frames.PING, 0, 0, bytes(8)),
        frames.SETTINGS_ACK,
        frames.window_update(0, 1),
    ],
)
def test_s3_4d_the_first_frame_is_settings(first):
    server = Connection(client=False)
    assert ends(server, frames.PREFACE + first, Code.PROTOCOL_ERROR, "first frame")
    assert ends(Connection(client=True), first, Code.PROTOCOL_ERROR, "first frame")


def test_s3_4a_s3_4b_s6_5a_both_ends_begin_with_settings():
    client, server = Connection(client=True), Connection(client=False)
    assert client.outgoing().startswith(frames.PREFACE)
    assert sent(server)[0][0] == frames.SETTINGS


# --- 4 frames -----------------------------------------------------------------------


def test_s4_1b_s5_5a_frames_of_unknown_kinds_are_ignored_and_counted():
    server = opened(idle_frames=2)
    unknown = frames.frame(0x2A, 0xFF, 7, b"anything")
    assert server.receive(unknown * 2) == []
    assert ends(server, unknown, Code.ENHANCE_YOUR_CALM)


def test_s4_1c_s4_1e_flags_without_meaning_and_the_reserved_bit_are_ignored():
    server = opened()
    ping = frames.frame(frames.PING, 0xFE, 1 << 31, b"12345678")
    assert server.receive(ping) == []
    assert sent(server) == [(frames.PING, frames.ACK, 0, b"12345678")]


def test_s4_2a_s4_2b_a_frame_larger_than_we_said_is_refused_before_it_arrives():
    server = opened(max_frame_bytes=1 << 14)
    head = frames.head(frames.DATA, 0, 1, (1 << 14) + 1)
    assert ends(server, head, Code.FRAME_SIZE_ERROR, "16385")
    server = opened(max_frame_bytes=1 << 14)
    server.receive(headers(1))
    (event,) = server.receive(data(1, bytes(1 << 14)))
    assert len(event.data) == 1 << 14


@pytest.mark.parametrize(
    ("kind", "stream_id", "size", "words"),
    [
        (frames.RST_STREAM, 1, 3, "RST_STREAM"),
        (frames.RST_STREAM, 1, 5, "RST_STREAM"),
        (frames.SETTINGS, 0, 5, "SETTINGS"),
        (frames.SETTINGS, 0, 7, "SETTINGS"),
        (frames.PING, 0, 7, "PING"),
        (frames.PING, 0, 9, "PING"),
        (frames.GOAWAY, 0, 7, "GOAWAY"),
        (frames.WINDOW_UPDATE, 0, 3, "WINDOW_UPDATE"),
        (frames.WINDOW_UPDATE, 1, 5, "WINDOW_UPDATE"),
    ],
)
def test_s4_2c_s6_4f_s6_5f_s6_7e_s6_9e_wrong_sizes_are_refused(
    kind, stream_id, size, words
):
    server = opened()
    server.receive(headers(1))
    raw = frames.frame(kind, 0, stream_id, bytes(size))
    assert ends(server, raw, Code.FRAME_SIZE_ERROR, words)


def test_s4_3a_s5_5b_s6_2b_s8_1a_a_block_is_not_interrupted():
    for between in (
        data(1, b"x"),
        headers(3),
        frames.frame(frames.PING, 0, 0, bytes(8)),
        frames.frame(0x2A, 0, 0, b""),
        frames.frame(frames.CONTINUATION, 4, 3, b""),
    ):
        server = opened()
        server.receive(headers(1, done=False))
        assert ends(server, between, Code.PROTOCOL_ERROR, "not complete")


def test_s4_3c_a_block_that_is_no_hpack_ends_the_connection():
    for block in (
        b"\xff\xff\xff\xff\xff\xff",
        b"\x80",
        b"\x3f\xff\xff\x7f",
        b"\x00\x05a",
    ):
        assert ends(opened(), headers(1, block=block), Code.COMPRESSION_ERROR)


def test_s4_3b_blocks_of_streams_that_nobody_wants_keep_the_table_in_step():
    from hpack import Encoder

    encoder, server = Encoder(), opened(max_streams=1)
    first, second, third = (
        encoder.encode((*REQUEST, (b"x-kept", b"%d" % n))) for n in (1, 2, 2)
    )
    server.receive(headers(1, block=first))
    assert resets(server, headers(3, block=second), 3, Code.REFUSED_STREAM)
    server.headers(1, ANSWER, end=True)
    server.outgoing()
    (event,) = server.receive(headers(5, block=third))
    assert event.head.fields[-1] == (b"x-kept", b"2")


# --- 5 streams ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        data(1, b"x"),
        frames.rst_stream(1, 0),
        frames.window_update(1, 1),
    ],
)
def test_s5_1a_s6_4e_frames_on_an_idle_stream_end_the_connection(raw):
    assert ends(opened(), raw, Code.PROTOCOL_ERROR, "nobody began")


def test_s5_1a_priority_on_an_idle_stream_is_ignored():
    server = opened()
    assert server.receive(frames.frame(frames.PRIORITY, 0, 5, bytes(5))) == []
    assert not server.over


def test_s5_1d_s6_1c_what_follows_the_end_of_a_stream_is_refused():
    server = opened()
    server.receive(headers(1, end=True))
    assert resets(server, data(1, b"x"), 1, Code.STREAM_CLOSED)
    server = opened()
    server.receive(headers(1, end=True))
    assert resets(server, headers(1, end=True), 1, Code.STREAM_CLOSED)
    server = opened()
    server.receive(headers(1, end=True))
    server.headers(1, ANSWER, end=True)
    assert ends(server, data(1, b"x"), Code.STREAM_CLOSED, "closed")
    server = opened()
    server.receive(headers(1, end=True))
    server.headers(1, ANSWER, end=True)
    assert ends(server, headers(1, end=True), Code.STREAM_CLOSED, "closed")


def test_s5_1f_s5_4_2a_s6_4b_late_frames_of_a_stream_that_we_reset_are_dropped():
    server = opened(connection_window=70_000, stream_window=70_000)
    server.receive(headers(1))
    server.reset(1, Code.CANCEL)
    assert sent(server) == [(frames.RST_STREAM, 0, 1, (8).to_bytes(4, "big"))]
    for _ in range(10):
        assert server.receive(data(1, bytes(16_000))) == []
    assert not server.over  # the windows would have held 70,000
    late = frames.window_update(1, 5) + frames.rst_stream(1, 0) + headers(1, end=True)
    assert server.receive(late) == []


def test_s5_1b_s5_1_1c_a_clients_streams_are_odd():
    assert ends(opened(), headers(2), Code.PROTOCOL_ERROR, "odd")


def test_s5_1b_s5_1_1a_a_server_begins_no_streams():
    for raw in (headers(2, RESPONSE), data(2, b"x")):
        assert ends(dialled(), raw, Code.PROTOCOL_ERROR, "nobody began")


def test_s5_1_2b_streams_beyond_the_limit_are_refused():
    server = opened(max_streams=2)
    server.receive(headers(1) + headers(3))
    assert resets(server, headers(5), 5, Code.REFUSED_STREAM, "too many")
    server.reset(1, Code.CANCEL)
    assert isinstance(server.receive(headers(7))[0], HeadersReceived)


def test_s5_1_2a_a_client_begins_no_more_than_it_may():
    client = dialled()
    client.receive(frames.settings({frames.MAX_CONCURRENT_STREAMS: 1}))
    assert client.can_request
    stream = client.request(OPEN, end=True)
    assert not client.can_request
    with pytest.raises(RuntimeError):
        client.request(OPEN)
    client.receive(headers(stream, RESPONSE, end=True))
    assert client.can_request


# --- 5.2, 6.9 flow control ----------------------------------------------------------


def test_s6_9_1c_data_beyond_the_window_is_refused():
    bounds = {"stream_window": 65_535, "connection_window": 65_535}
    server = opened(**bounds)
    server.receive(headers(1) + data(1, bytes(65_535)))
    raw = data(1, b"x")
    assert ends(server, raw, Code.FLOW_CONTROL_ERROR, "window")
    server = opened(stream_window=65_535)
    server.receive(headers(1) + data(1, bytes(65_535)))
    assert resets(server, raw, 1, Code.FLOW_CONTROL_ERROR)


def test_s6_9d_padding_counts_and_is_paid_back():
    server = opened(connection_window=65_535, stream_window=65_535)
    server.receive(headers(1))
    padded = data(1, b"\xff" + b"x" + bytes(255), flags=frames.PADDED)
    for _ in range(1000):
        (event,) = server.receive(padded)
        assert event.data == b"x"
        server.consumed(1, 1)
    assert not server.over


def test_s6_9_1a_an_empty_frame_that_ends_needs_no_window():
    client = dialled()
    stream = client.request(OPEN)
    client.data(stream, bytes(65_535))
    client.data(stream, b"", end=True)
    assert sent(client)[-1] == (frames.DATA, frames.END_STREAM, stream, b"")


def test_s6_9_2a_s6_9_2b_a_smaller_initial_window_may_make_a_window_negative():
    client = dialled()
    stream = client.request(OPEN)
    client.data(stream, bytes(60_000))
    client.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 10_000}))
    client.outgoing()
    client.data(stream, b"more")
    assert sent(client) == []
    client.receive(frames.window_update(stream, 50_003))
    assert sent(client) == [(frames.DATA, 0, stream, b"mor")]
    client.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 10_001}))
    assert (frames.DATA, 0, stream, b"e") in sent(client)


@pytest.mark.parametrize("stream_id", [0, 1])
def test_s6_9_1b_a_window_does_not_overflow(stream_id):
    server = opened()
    server.receive(headers(1))
    raw = frames.window_update(stream_id, frames.MOST_WINDOW)
    if stream_id:
        assert resets(server, raw, 1, Code.FLOW_CONTROL_ERROR)
    else:
        assert ends(server, raw, Code.FLOW_CONTROL_ERROR, "overflows")


def test_s6_9_2c_a_window_does_not_overflow_by_settings_either():
    server = opened()
    server.receive(headers(1) + frames.window_update(1, frames.MOST_WINDOW - 65_535))
    raw = frames.settings({frames.INITIAL_WINDOW_SIZE: 65_536})
    assert ends(server, raw, Code.FLOW_CONTROL_ERROR, "overflows")


@pytest.mark.parametrize("stream_id", [0, 1])
def test_s6_9b_an_update_by_nothing_is_refused(stream_id):
    server = opened()
    server.receive(headers(1))
    raw = frames.window_update(stream_id, 0)
    if stream_id:
        assert resets(server, raw, 1, Code.PROTOCOL_ERROR, "by 0")
    else:
        assert ends(server, raw, Code.PROTOCOL_ERROR, "by 0")


# --- 6 the kinds of frames ----------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (frames.DATA, b"x"),
        (frames.HEADERS, b""),
        (frames.PRIORITY, bytes(5)),
        (frames.RST_STREAM, bytes(4)),
    ],
)
def test_s6_1b_s6_2c_s6_3a_s6_4c_frames_of_streams_are_not_on_stream_0(kind, payload):
    raw = frames.frame(kind, frames.END_HEADERS, 0, payload)
    assert ends(opened(), raw, Code.PROTOCOL_ERROR)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [(frames.SETTINGS, b""), (frames.PING, bytes(8)), (frames.GOAWAY, bytes(8))],
)
def test_s6_5d_s6_7d_s6_8b_frames_of_the_connection_are_on_stream_0(kind, payload):
    server = opened()
    server.receive(headers(1))
    raw = frames.frame(kind, 0, 1, payload)
    assert ends(server, raw, Code.PROTOCOL_ERROR, "on a stream")


def test_s6_1d_s6_2d_padding_is_not_longer_than_its_frame():
    for payload, code in (
        (b"\x02x", Code.PROTOCOL_ERROR),
        (b"", Code.FRAME_SIZE_ERROR),
        (b"\x01", Code.PROTOCOL_ERROR),
    ):
        server = opened()
        server.receive(headers(1))
        assert ends(server, data(1, payload, flags=frames.PADDED), code)
        block = headers(1, block=payload, flags=frames.PADDED)
        assert ends(opened(), block, code)


def test_s4_2c_padding_and_priority_of_headers_are_taken_off():
    block = OPEN
    flags = frames.PADDED | frames.PRIORITIZED
    raw = headers(1, block=b"\x03" + bytes(5) + block + bytes(3), flags=flags)
    (event,) = opened().receive(raw)
    assert event.head.path == REQUEST[2][1]
    short = headers(1, block=bytes(4), flags=frames.PRIORITIZED)
    assert ends(opened(), short, Code.FRAME_SIZE_ERROR)


def test_s6_3b_priority_has_five_bytes():
    server = opened()
    server.receive(headers(1))
    raw = frames.frame(frames.PRIORITY, 0, 1, bytes(4))
    assert resets(server, raw, 1, Code.FRAME_SIZE_ERROR)


def test_s6_5c_s6_5_2i_s6_5_3c_settings_are_acknowledged_by_an_empty_frame():
    server = opened()
    server.receive(frames.settings({0x99: 7}))  # unknown: ignored
    assert sent(server) == [(frames.SETTINGS, frames.ACK, 0, b"")]
    raw = frames.frame(frames.SETTINGS, frames.ACK, 0, bytes(6))
    assert ends(server, raw, Code.FRAME_SIZE_ERROR)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        (frames.ENABLE_PUSH, 2, Code.PROTOCOL_ERROR),
        (frames.INITIAL_WINDOW_SIZE, 1 << 31, Code.FLOW_CONTROL_ERROR),
        (frames.MAX_FRAME_SIZE, (1 << 14) - 1, Code.PROTOCOL_ERROR),
        (frames.MAX_FRAME_SIZE, 1 << 24, Code.PROTOCOL_ERROR),
    ],
)
def test_s6_5e_s6_5_2c_s6_5_2f_s6_5_2h_settings_outside_their_bounds_are_refused(
    name, value, code
):
    assert ends(opened(), frames.settings({name: value}), code)


def test_s6_5_2e_a_server_may_not_enable_push():
    raw = frames.settings({frames.ENABLE_PUSH: 1})
    assert ends(dialled(), raw, Code.PROTOCOL_ERROR, "ENABLE_PUSH")
    assert (
        frames.settings({frames.ENABLE_PUSH: 0})[9:]
        in Connection(client=True).outgoing()
    )


def test_s4_1a_s6_5_3a_frames_are_as_large_as_either_end_takes():
    client = dialled(max_frame_bytes=20_000)
    client.receive(frames.settings({frames.MAX_FRAME_SIZE: 1 << 20}))
    stream = client.request(OPEN)
    client.data(stream, bytes(50_000))
    sizes = [len(f[3]) for f in sent(client) if f[0] == frames.DATA]
    assert sizes == [20_000, 20_000, 10_000]


@pytest.mark.parametrize("connection", [opened, dialled])
def test_s6_5_2b_s6_6b_s8_4a_nobody_may_push(connection):
    raw = frames.frame(frames.PUSH_PROMISE, frames.END_HEADERS, 1, bytes(4))
    assert ends(connection(), raw, Code.PROTOCOL_ERROR, "PUSH_PROMISE")


def test_s6_7a_s6_7b_s6_7c_a_ping_is_answered_and_an_answer_is_not():
    client, server = pair()
    client.ping(b"abcdefgh")
    back, _ = settle(client, server)
    assert back == [PingAnswered(b"abcdefgh")]


def test_s6_8d_a_server_that_goes_away_takes_what_is_on_its_way():
    client, server = pair()
    before = client.request(OPEN)
    settle(client, server)
    server.drain(final=False)
    crossing = client.request(OPEN)
    there = server.receive(client.outgoing())
    assert [e.stream_id for e in there] == [crossing]
    server.drain(final=True)
    late = client.request(OPEN)
    back, there = settle(client, server)
    assert GoingAway(frames.MOST_STREAM_ID, Code.NO_ERROR, b"") in back
    assert there == []
    assert (
        StreamReset(late, Code.REFUSED_STREAM, "the peer went away before it") in back
    )
    assert client.peer_leaves
    assert not client.can_request
    for stream in (before, crossing):
        server.headers(stream, ANSWER, end=True)
    back, _ = settle(client, server)
    assert [e.stream_id for e in back if isinstance(e, HeadersReceived)] == [
        before,
        crossing,
    ]


def test_s6_8c_a_later_goaway_names_no_higher_stream():
    client = dialled()
    client.receive(frames.goaway(5, 0))
    assert ends(client, frames.goaway(7, 0), Code.PROTOCOL_ERROR, "higher")


def test_s6_10c_continuation_follows_headers():
    raw = frames.frame(frames.CONTINUATION, frames.END_HEADERS, 1, b"")
    assert ends(opened(), raw, Code.PROTOCOL_ERROR, "CONTINUATION")
    server = opened()
    server.receive(headers(1))
    assert ends(server, raw, Code.PROTOCOL_ERROR, "CONTINUATION")


# --- 8 requests and responses -------------------------------------------------------


MALFORMED = {
    "upper case": changed((b"X-Y", b"1")),
    "a space in a name": changed((b"x y", b"1")),
    "an empty name": changed((b"", b"1")),
    "a colon in a name": changed((b"x:y", b"1")),
    "NUL in a value": changed((b"x", b"a\0b")),
    "LF in a value": changed((b"x", b"a\nb")),
    "CR in a value": changed((b"x", b"a\rb")),
    "a value that begins with a space": changed((b"x", b" a")),
    "a value that ends with a tab": changed((b"x", b"a\t")),
    "connection": changed((b"connection", b"close")),
    "keep-alive": changed((b"keep-alive", b"1")),
    "transfer-encoding": changed((b"transfer-encoding", b"chunked")),
    "upgrade": changed((b"upgrade", b"h2c")),
    "te": changed((b"te", b"gzip")),
    "no method": changed(without=(b":method",)),
    "no scheme": changed(without=(b":scheme",)),
    "no path": changed(without=(b":path",)),
    "an empty path": changed(path=b""),
    "a path without slash": changed(path=b"x"),
    "a path with a space": changed(path=b"/a b"),
    "another scheme": changed(scheme=b"ftp"),
    "a method with a space": changed(method=b"GE T"),
    "a pseudo-header field twice": ((b":path", b"/x"), *REQUEST),
    "one after a field": changed((b":path", b"/x")),
    "an unknown one": ((b":x", b"1"), *REQUEST),
    "one of a response": ((b":status", b"200"), *REQUEST),
    "host that differs": changed((b"host", b"other")),
    "two hosts": changed((b"host", b"127.0.0.1:1"), (b"host", b"other")),
    "content-length of no number": changed((b"content-length", b"-1")),
    "two content-lengths": changed(
        (b"content-length", b"1"), (b"content-length", b"2")
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_s8_1_1a_s8_2_1e_a_malformed_request_ends_its_stream_alone(name):
    server = opened()
    assert resets(server, headers(1, MALFORMED[name]), 1, Code.PROTOCOL_ERROR)
    assert isinstance(server.receive(headers(3))[0], HeadersReceived)


@pytest.mark.parametrize(
    "fields",
    [
        ((b"x", b"1"),),
        ((b":status", b"20"),),
        ((b":status", b"600"),),
        ((b":status", b"101"),),
        ((b":status", b"2x0"),),
        ((b":status", b"200"), (b":status", b"200")),
        ((b":path", b"/"), (b":status", b"200")),
    ],
)
def test_s8_1_1a_s8_1_1b_a_malformed_response_ends_its_stream_alone(fields):
    client = dialled()
    stream = client.request(OPEN)
    assert resets(client, headers(stream, fields), stream, Code.PROTOCOL_ERROR)


def test_s8_1e_interim_responses_are_passed_over():
    client = dialled()
    stream = client.request(OPEN)
    interim = headers(stream, ((b":status", b"103"), (b"link", b"x")))
    (event,) = client.receive(interim + headers(stream, RESPONSE))
    assert event.head.status == 200
    client = dialled()
    client.request(OPEN)
    raw = headers(stream, ((b":status", b"103"),), end=True)
    assert resets(client, raw, stream, Code.PROTOCOL_ERROR, "interim")


def test_s8_1b_s8_1c_trailers_end_the_stream_and_have_no_pseudo_header_fields():
    server = opened()
    server.receive(headers(1))
    (event,) = server.receive(headers(1, ((b"x", b"1"),), end=True))
    assert event == HeadersReceived(1, ((b"x", b"1"),), ended=True)
    server.receive(headers(3))
    raw = headers(3, ((b"x", b"1"),))
    assert resets(server, raw, 3, Code.PROTOCOL_ERROR, "do not end")
    server.receive(headers(5))
    raw = headers(5, ((b":path", b"/"),), end=True)
    assert resets(server, raw, 5, Code.PROTOCOL_ERROR, "field name")


def test_s8_1_1b_data_before_a_response_is_refused():
    client = dialled()
    stream = client.request(OPEN)
    raw = data(stream, b"x")
    assert resets(client, raw, stream, Code.PROTOCOL_ERROR, "before a head")


@pytest.mark.parametrize(
    ("length", "bodies"),
    [
        (b"3", [(b"ab", True)]),
        (b"3", [(b"abcd", False)]),
        (b"3", [(b"ab", False), (b"", True)]),
        (b"0", [(b"a", True)]),
    ],
)
def test_s8_1_1c_a_body_is_as_long_as_content_length_says(length, bodies):
    server = opened()
    server.receive(headers(1, changed((b"content-length", length))))
    raw = b"".join(data(1, body, end=end) for body, end in bodies)
    assert resets(server, raw, 1, Code.PROTOCOL_ERROR, "content-length")
    server.receive(headers(3, changed((b"content-length", b"3"))))
    assert server.receive(data(3, b"abc", end=True)) == [
        DataReceived(3, b"abc", ended=True)
    ]
    raw = headers(5, changed((b"content-length", b"3")), end=True)
    assert resets(server, raw, 5, Code.PROTOCOL_ERROR, "content-length")


# --- bounds -------------------------------------------------------------------------


def test_s10_5a_a_block_in_too_many_pieces_or_too_large_ends_the_connection():
    server = opened(max_continuations=3)
    piece = frames.frame(frames.CONTINUATION, 0, 1, b"")
    server.receive(headers(1, done=False) + 3 * piece)
    assert ends(server, piece, Code.ENHANCE_YOUR_CALM, "CONTINUATION")
    server = opened(max_header_bytes=1000)
    server.receive(headers(1, done=False, block=bytes(1600)))
    raw = frames.frame(frames.CONTINUATION, 0, 1, bytes(401))
    assert ends(server, raw, Code.ENHANCE_YOUR_CALM, "over 2000 bytes")


def test_a_head_that_is_too_large_ends_its_stream_alone():
    server = opened(max_header_bytes=1000)
    raw = headers(1, (*REQUEST, (b"x", b"v" * 800)))
    assert resets(server, raw, 1, Code.ENHANCE_YOUR_CALM, "at most 1000")
    server.receive(headers(3))
    raw = headers(3, ((b"x", b"v" * 1000),), end=True)
    assert resets(server, raw, 3, Code.ENHANCE_YOUR_CALM, "at most 1000")
    assert isinstance(server.receive(headers(5))[0], HeadersReceived)


def test_s10_5_1a_a_few_bytes_that_mean_many_fields_end_the_connection():
    bomb = headers(1, (*REQUEST, (b"x", b"v" * 3000)))
    server = opened(max_header_bytes=4000)
    server.receive(bomb)
    indexed = b"\xbe" * 6  # the entry that was just added, six times
    raw = headers(3, block=OPEN + indexed)
    assert ends(server, raw, Code.ENHANCE_YOUR_CALM, "header list")


@pytest.mark.parametrize(
    ("bound", "raw", "words"),
    [
        ("settings", frames.settings({}), "SETTINGS"),
        ("settings", frames.SETTINGS_ACK, "SETTINGS"),
        ("pings", frames.frame(frames.PING, 0, 0, bytes(8)), "PING"),
        ("pings", frames.frame(frames.PING, 1, 0, bytes(8)), "PING"),
        ("idle_frames", data(1), "nothing"),
        ("idle_frames", frames.frame(frames.PRIORITY, 0, 1, bytes(5)), "nothing"),
        ("idle_frames", frames.window_update(1, 1), "nothing"),
        ("idle_frames", frames.window_update(0, 1023), "nothing"),
        ("idle_frames", frames.goaway(9, 0), "nothing"),
    ],
)
def test_s10_5a_little_things_are_counted_and_begun_anew_by_refresh(bound, raw, words):
    server = opened(**{bound: 5})
    server.refresh()
    server.receive(headers(1))
    for _ in range(10):
        server.receive(raw * 5)
        assert not server.over
        server.refresh()
    server.receive(raw * 5)
    assert ends(server, raw, Code.ENHANCE_YOUR_CALM, words)


def test_frames_that_carry_something_let_there_be_some_that_do_not():
    server = opened(idle_frames=5)
    for stream in range(1, 2001, 2):
        raw = headers(stream) + data(stream, b"x") + frames.window_update(0, 9) * 5
        server.receive(raw)
        server.reset(stream, Code.CANCEL)
    assert not server.over
    assert ends(server, frames.window_update(0, 9) * 6, Code.ENHANCE_YOUR_CALM)


def test_s10_5a_rapid_reset_ends_the_connection():
    server = opened(resets=100)
    for stream in range(1, 201, 2):
        server.receive(headers(stream) + frames.rst_stream(stream, 8))
    assert server.open_streams == 0
    assert not server.over
    raw = headers(201) + frames.rst_stream(201, 8)
    assert ends(server, raw, Code.ENHANCE_YOUR_CALM, "reset")


def test_s10_5a_streams_that_a_peer_has_us_reset_count_as_its_own_resets():
    server = opened(resets=10)
    bad = b"".join(headers(n, MALFORMED["te"]) for n in range(1, 21, 2))
    server.receive(bad)
    assert not server.over
    assert ends(server, headers(21, MALFORMED["te"]), Code.ENHANCE_YOUR_CALM)


def test_s10_5a_the_streams_that_are_remembered_as_reset_are_bounded():
    server = opened(resets=10_000)
    for stream in range(1, 5001, 2):
        server.receive(headers(stream))
        server.reset(stream, Code.CANCEL)
    assert len(server._streams._dropped) == 1024


def test_s10_5a_blocks_that_are_remembered_are_bounded_and_end_with_the_table():
    server = opened()
    for n in range(600):
        fields = encode((*REQUEST, (b"x", b"%d" % n)))
        server.receive(headers(2 * n + 1, block=fields, end=True))
        server.headers(2 * n + 1, ANSWER, end=True)
    assert 0 < server._reader._heads.size <= MAX_REMEMBERED_BYTES
    from hpack import Encoder

    raw = headers(2001, block=Encoder().encode((*REQUEST, (b"new", b"entry"))))
    (event,) = server.receive(raw)
    assert event.head.fields[-1] == (b"new", b"entry")
    assert server._reader._heads.size == 0


def test_s10_5a_trailers_that_are_remembered_are_bounded_and_end_with_the_table():
    client = dialled()
    block = b"\x40\x01x\x01a"  # x: a, added to the table
    for n in range(2500):
        stream = client.request(OPEN)
        client.receive(headers(stream, block=ANSWER))
        trailers = encode(((b"y", b"%d" % n),))
        client.receive(headers(stream, block=trailers, end=True))
    known = client._reader._trailers
    assert 0 < known.size <= MAX_REMEMBERED_BYTES
    stream = client.request(OPEN)
    client.receive(headers(stream, block=ANSWER))
    client.receive(headers(stream, block=block, end=True))
    assert known.size == 0
    means = []
    for added in (b"", b"\x40\x01x\x01b"):
        stream = client.request(OPEN)
        client.receive(headers(stream, block=ANSWER + added))
        (event,) = client.receive(headers(stream, block=b"\xbe", end=True))
        means.append(event.head)
    assert means == [((b"x", b"a"),), ((b"x", b"b"),)]


def test_the_same_bytes_mean_what_the_table_says_now():
    """An entry that takes the place of another, under the same index."""
    server = opened()
    literal = b"\x40\x01x\x01a"  # x: a, added to the table
    server.receive(headers(1, block=OPEN + literal, end=True))
    indexed = OPEN + b"\xbe"
    one = server.receive(headers(3, block=indexed, end=True))[0]
    again = server.receive(headers(5, block=indexed, end=True))[0]
    assert one.head is again.head  # remembered
    assert one.head.fields[-1] == (b"x", b"a")
    server.receive(headers(7, block=OPEN + b"\x40\x01x\x01b", end=True))
    (event,) = server.receive(headers(9, block=indexed, end=True))
    assert event.head.fields[-1] == (b"x", b"b")


def test_s6_5_2g_bounds_that_the_standard_does_not_allow_are_refused():
    for wrong in (
        {"stream_window": 65_534},
        {"connection_window": 1 << 31},
        {"max_frame_bytes": 16_383},
        {"max_frame_bytes": 1 << 24},
    ):
        with pytest.raises(ValueError, match="expected"):
            Bounds(**wrong)


# --- what a fuzz has found ----------------------------------------------------------


def test_nothing_of_our_memory_is_told_to_a_peer_whose_block_cannot_be_read():
    server = opened()
    assert ends(server, headers(1, block=b"\xff" * 20), Code.COMPRESSION_ERROR)
    assert "0x" not in str(server.receive(b""))
    server = opened()
    server.receive(headers(1, block=b"\xff" * 20))
    assert b"memory" not in server.outgoing()


def test_a_block_has_at_most_two_updates_of_the_tables_size():
    server = opened()
    assert isinstance(server.receive(headers(1, block=b"\x20\x3e" + OPEN))[0], tuple)
    raw = headers(3, block=b"\x20\x20\x20" + OPEN)
    assert ends(server, raw, Code.COMPRESSION_ERROR)


def test_one_frame_of_settings_does_not_hold_us_up():
    server = opened()
    many = b"".join(frames.settings({4: 65_535})[9:] for _ in range(33))
    server.receive(frames.frame(frames.SETTINGS, 0, 0, many[: 6 * 32]))
    assert not server.over
    raw = frames.frame(frames.SETTINGS, 0, 0, many)
    assert ends(server, raw, Code.ENHANCE_YOUR_CALM, "in one frame")


def test_s6_9a_streams_that_wait_for_either_window_go_on_when_it_widens():
    server = opened()
    server.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 70_000}))
    for stream in (1, 3):
        server.receive(headers(stream, block=OPEN, end=True))
        server.headers(stream, ANSWER)
        server.data(stream, bytes(80_000), end=True)
    assert [server.unsent(1), server.unsent(3)] == [80_000 - 65_535, 80_000]
    assert server.receive(frames.window_update(3, 10_000)) == []
    server.receive(frames.window_update(0, 100_000))  # both waited for this one
    assert [server.unsent(1), server.unsent(3)] == [10_000, 80_000 - 80_000]
    assert server.receive(frames.window_update(0, 100_000)) == []
    assert server.receive(frames.window_update(1, 10_000)) == [Writable(1)]
