"""What RFC 9113 demands, section by section, beside what test_connection.py shows.

Names of tests begin with ids of tests/contract/http2.toml.
"""

import itertools

import pytest
from hpack import Decoder, Encoder

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
    Ended,
    GoingAway,
    HeadersReceived,
    PingAnswered,
    StreamReset,
    encode,
    frames,
)

SMALL = {"stream_window": 65_535, "connection_window": 65_535}


def asked(**bounds):
    """A client that has asked on stream 1, and may go on."""
    client = dialled(**bounds)
    assert client.request(OPEN) == 1
    client.outgoing()
    return client


def called(**bounds):
    """A server that was asked on stream 1, by a client that may go on."""
    server = opened(**bounds)
    (event,) = server.receive(headers(1))
    assert event.stream_id == 1
    return server


def continuation(stream_id, payload=b"", flags=0):
    return frames.frame(frames.CONTINUATION, flags, stream_id, payload)


def window_updates(connection, stream_id):
    return sum(
        int.from_bytes(payload, "big")
        for kind, _, stream, payload in sent(connection)
        if kind == frames.WINDOW_UPDATE and stream == stream_id
    )


def data_sent(connection):
    """Bytes of DATA that are to be sent, by stream."""
    found = {}
    for kind, _, stream, payload in sent(connection):
        if kind == frames.DATA:
            found[stream] = found.get(stream, 0) + len(payload)
    return found


# --- 3 the beginning ----------------------------------------------------------------


def test_s3_4a_a_client_begins_with_24_octets_and_settings():
    raw = Connection(client=True).outgoing()
    assert raw[:24] == b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    kind, flags, stream = raw[27], raw[28], raw[29:33]
    assert (kind, flags, stream) == (frames.SETTINGS, 0, bytes(4))


@pytest.mark.parametrize("client", [True, False])
def test_s3_4c_the_peers_settings_are_acknowledged_after_our_own(client):
    connection = Connection(client=client)
    connection.receive((b"" if client else frames.PREFACE) + frames.settings({}))
    first, *others = sent(connection)
    assert first[:2] == (frames.SETTINGS, 0)
    assert others[-1] == (frames.SETTINGS, frames.ACK, 0, b"")


@pytest.mark.parametrize("at", range(24))
def test_s3_4d_each_octet_of_the_preface_counts(at):
    wrong = bytearray(frames.PREFACE)
    wrong[at] ^= 1
    raw = bytes(wrong) + frames.settings({})
    assert ends(Connection(client=False), raw, Code.PROTOCOL_ERROR, "preface")


def test_s3_4d_settings_without_the_24_octets_are_no_preface_of_a_client():
    raw = frames.settings({})
    assert ends(Connection(client=False), raw, Code.PROTOCOL_ERROR, "preface")


def test_s3_4d_an_answer_of_http_1_is_no_preface_of_a_server():
    raw = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    assert ends(Connection(client=True), raw, Code.PROTOCOL_ERROR, "first frame")


# --- 4 frames -----------------------------------------------------------------------


def test_s4_1a_frames_have_16384_octets_until_the_peer_allows_more():
    server = called()
    server.headers(1, encode((*RESPONSE, (b"x", b"v" * 40_000))))
    server.data(1, bytes(40_000))
    found = sent(server)
    sizes = [len(payload) for *_, payload in found]
    assert max(sizes) == 1 << 14
    assert sum(sizes) > 80_000
    assert [kind for kind, *_ in found] == [1, 9, 9, 0, 0, 0]


def test_s4_1b_s5_5a_what_is_unknown_changes_nothing():
    """On any stream, of any length, between the frames of a call."""
    server = opened()
    unknown = b"".join(
        frames.frame(kind, 0xFF, stream, bytes(size))
        for kind, stream, size in itertools.product(
            (0x0A, 0x10, 0xFF), (0, 1, 2, 9), (0, 1, 4, 8)
        )
    )
    events = server.receive(
        unknown + headers(1) + unknown + data(1, b"x", end=True) + unknown
    )
    assert [type(event) for event in events] == [HeadersReceived, DataReceived]
    assert sent(server) == []


def test_s4_1c_flags_of_other_types_mean_nothing():
    server = opened()
    others = frames.END_HEADERS | frames.END_STREAM | frames.PADDED | frames.PRIORITIZED
    (event,) = server.receive(
        headers(1, block=OPEN[:5], done=False) + continuation(1, OPEN[5:], others)
    )
    assert event.head.path == REQUEST[2][1]
    assert not event.ended  # END_STREAM of CONTINUATION is none
    flags = frames.END_HEADERS | frames.PRIORITIZED | 0xC2
    (event,) = server.receive(data(1, b"\x01\x02\x03", flags=flags))
    assert event == DataReceived(1, b"\x01\x02\x03", ended=False)
    assert (
        server.receive(frames.frame(frames.WINDOW_UPDATE, 0xFF, 1, b"\0\0\4\0")) == []
    )
    assert server.receive(frames.frame(frames.PRIORITY, 0xFF, 1, bytes(5))) == []
    server.outgoing()
    server.receive(frames.frame(frames.SETTINGS, 0xFE, 0, b""))
    assert sent(server) == [(frames.SETTINGS, frames.ACK, 0, b"")]
    (event,) = server.receive(frames.frame(frames.GOAWAY, 0xFF, 0, bytes(8)))
    assert event == GoingAway(0, 0, b"")
    (event,) = server.receive(frames.frame(frames.RST_STREAM, 0xFF, 1, bytes(4)))
    assert event == StreamReset(1, 0, "")
    assert not server.over


MEANT = {
    frames.DATA: frames.END_STREAM,
    frames.HEADERS: frames.END_STREAM | frames.END_HEADERS,
    frames.CONTINUATION: frames.END_HEADERS,
    frames.SETTINGS: frames.ACK,
    frames.PING: frames.ACK,
    frames.GOAWAY: 0,
    frames.RST_STREAM: 0,
    frames.WINDOW_UPDATE: 0,
}
"""The flags that may be set; nothing of ours is padded, has a priority, or pushes."""


def test_s4_1d_s4_1e_s8_4_1a_only_flags_with_a_meaning_are_sent():
    bounds = Bounds(**SMALL, max_header_bytes=40_000, max_frame_bytes=1 << 14)
    client, server = (Connection(client=one, bounds=bounds) for one in (True, False))
    found = []

    def carry():
        moved = True
        while moved:
            moved = False
            for source, target in ((client, server), (server, client)):
                raw = source.outgoing()
                rest = raw.removeprefix(frames.PREFACE)
                moved = moved or bool(raw)
                while rest:
                    end = 9 + int.from_bytes(rest[:3], "big")
                    found.append((rest[3], rest[4], rest[5:9], rest[9:end]))
                    rest = rest[end:]
                for event in target.receive(raw):
                    if isinstance(event, DataReceived):
                        target.consumed(event.stream_id, len(event.data))

    big = encode((*RESPONSE, (b"x", b"v" * 30_000)))
    for _ in range(3):
        stream = client.request(OPEN)
        client.data(stream, bytes(50_000))
        client.headers(stream, TRAILERS, end=True)
        carry()
        server.headers(stream, big)
        server.data(stream, bytes(50_000), end=True)
        carry()
    client.ping(bytes(8))
    client.reset(client.request(OPEN), Code.CANCEL)
    carry()
    server.drain(final=False)
    server.end()
    carry()
    assert {kind for kind, *_ in found} == set(MEANT)
    for kind, flags, stream, payload in found:
        assert flags & ~MEANT[kind] == 0, (kind, flags)
        assert stream[0] < 0x80
        if kind in (frames.WINDOW_UPDATE, frames.GOAWAY):
            assert payload[0] < 0x80


def test_s4_1e_the_reserved_bit_of_each_field_is_ignored():
    reserved = 1 << 31
    client = asked()
    client.data(1, bytes(65_535))
    client.data(1, b"more")
    client.outgoing()
    client.receive(frames.window_update(reserved, reserved | 10_000))
    assert data_sent(client) == {}
    client.receive(frames.window_update(reserved | 1, reserved | 3))
    assert data_sent(client) == {1: 3}
    (event,) = client.receive(frames.goaway(reserved | 1, 0))
    assert event == GoingAway(1, 0, b"")
    (event,) = client.receive(headers(reserved | 1, RESPONSE))
    assert event.stream_id == 1


@pytest.mark.parametrize("made", [opened, dialled])
@pytest.mark.parametrize("kind", [*range(10), 0x2A])
def test_s4_2b_no_frame_of_any_type_is_larger_than_we_allow(made, kind):
    connection = made(max_frame_bytes=1 << 14)
    head = frames.head(kind, 0, 1, (1 << 14) + 1)
    assert ends(connection, head, Code.FRAME_SIZE_ERROR)


def unwanted(state):
    """A server, and the stream on which it does not want the next HEADERS."""
    server = called(max_streams=2, resets=10)
    if state == "reset by us":
        server.reset(1, Code.CANCEL)
        return server, 1
    if state == "ended":
        server.receive(data(1, end=True))
        return server, 1
    if state == "malformed":
        server.receive(headers(1, changed((b"te", b"gzip")), end=True))
        return server, 1
    if state == "too many":
        server.receive(headers(3, end=True))
        return server, 5
    raise AssertionError(state)


@pytest.mark.parametrize("state", ["reset by us", "ended", "malformed", "too many"])
def test_s4_3b_s5_1f_a_block_that_is_not_wanted_is_read(state):
    server, stream = unwanted(state)
    encoder = Encoder()
    encoder.header_table_size = 4096
    first = encoder.encode(((b"x-kept", b"1"),))
    second = encoder.encode(((b"x-kept", b"1"),))
    assert len(second) == 1  # by its index alone
    server.receive(headers(stream, block=OPEN + first, end=True))
    assert not server.over
    server.reset(1, Code.CANCEL)
    (event,) = server.receive(headers(7, block=OPEN + second))
    assert event.head.fields[-1] == (b"x-kept", b"1")


@pytest.mark.parametrize("made", [called, asked])
def test_s4_3c_a_decoding_error_ends_either_end(made):
    for block in (b"\x80", b"\xff\x00", b"\x00\x05a", b"\x3f\xe2\x1f"):
        raw = headers(1, block=block, end=True)
        assert ends(made(), raw, Code.COMPRESSION_ERROR)


@pytest.mark.parametrize("size", [0, 100, 4095])
def test_s4_3_1a_a_smaller_table_of_the_peers_is_kept_to(size):
    server = opened()
    server.receive(frames.settings({frames.HEADER_TABLE_SIZE: size}) + headers(1))
    server.headers(1, ANSWER)
    server.headers(1, TRAILERS, end=True)
    blocks = [payload for kind, *_, payload in sent(server) if kind == frames.HEADERS]
    decoder = Decoder()
    decoder.max_allowed_table_size = size  # and of 4096 until the block says less
    assert decoder.decode(blocks[0], raw=True) == list(RESPONSE)
    assert decoder.decode(blocks[1], raw=True) == [(b"grpc-status", b"0")]


# --- 5 streams ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "stream_id"), [(opened, 1), (opened, 2), (asked, 2), (asked, 3)]
)
@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (frames.DATA, b"x"),
        (frames.RST_STREAM, bytes(4)),
        (frames.PUSH_PROMISE, bytes(4)),
        (frames.WINDOW_UPDATE, b"\0\0\4\0"),
        (frames.WINDOW_UPDATE, bytes(4)),
        (frames.CONTINUATION, b""),
    ],
)
def test_s5_1a_s6_4e_an_idle_stream_of_either_end(made, stream_id, kind, payload):
    raw = frames.frame(kind, frames.END_HEADERS, stream_id, payload)
    assert ends(made(), raw, Code.PROTOCOL_ERROR)


def test_s5_1b_s5_1_1c_headers_do_not_begin_a_stream_that_the_peer_cannot_begin():
    server = opened()
    server.receive(headers(9))
    assert ends(server, headers(2), Code.PROTOCOL_ERROR)
    assert ends(opened(), headers(1_000_000), Code.PROTOCOL_ERROR)
    assert ends(asked(), headers(3, RESPONSE), Code.PROTOCOL_ERROR)
    assert ends(asked(), headers(2, RESPONSE), Code.PROTOCOL_ERROR)


def test_s5_1d_s6_1c_what_follows_the_end_of_an_answer_is_refused():
    for raw in (data(1, b"x"), data(1, end=True), headers(1, RESPONSE, end=True)):
        client = asked()
        client.receive(headers(1, RESPONSE, end=True))
        assert resets(client, raw, 1, Code.STREAM_CLOSED)


@pytest.mark.parametrize("made", [called, asked])
def test_s5_1d_s6_9c_what_may_follow_the_end_of_the_peers_half(made):
    connection = made()
    end = data(1, end=True) if made is called else headers(1, RESPONSE, end=True)
    connection.receive(end)
    connection.outgoing()
    assert connection.receive(frames.window_update(1, 5)) == []
    assert connection.receive(frames.frame(frames.PRIORITY, 0, 1, bytes(5))) == []
    assert sent(connection) == []
    assert connection.receive(frames.rst_stream(1, 8)) == [StreamReset(1, 8, "")]


def closed(how):
    """A server whose stream 1 is closed, and which may have had more to say on it."""
    server = called()
    if how == "by both ends":
        server.receive(data(1, end=True))
        server.headers(1, ANSWER, end=True)
        return server
    server.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 20}))
    server.headers(1, ANSWER)
    server.data(1, bytes(100_000), end=True)  # more than the connection's window holds
    if how == "by the peer's reset":
        server.receive(frames.rst_stream(1, 8))
    elif how == "by our reset":
        server.reset(1, Code.CANCEL)
    elif how == "by a malformed trailer":
        server.receive(headers(1, ((b"X", b"1"),), end=True))
    elif how == "by the end of the connection":
        server.end()
    assert server.unsent(1) == 0
    return server


@pytest.mark.parametrize(
    "how",
    [
        "by both ends",
        "by the peer's reset",
        "by our reset",
        "by a malformed trailer",
        "by the end of the connection",
    ],
)
def test_s5_1e_s6_4a_nothing_is_sent_on_a_closed_stream(how):
    server = closed(how)
    server.outgoing()
    server.headers(1, ANSWER)
    server.headers(1, TRAILERS, end=True)
    server.data(1, b"x", end=True)
    server.reset(1, Code.CANCEL)
    server.consumed(1, 500_000)
    server.receive(frames.window_update(0, 1 << 20))
    server.receive(frames.window_update(1, 1 << 20))
    server.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 21}))
    assert [frame for frame in sent(server) if frame[2] != 0] == []


def test_s5_1f_s5_4_2a_s6_4b_all_data_that_the_windows_had_room_for_may_be_late():
    server = called()
    server.reset(1, Code.CANCEL)
    server.receive(data(1, bytes(200)) * (Bounds().stream_window // 200))
    assert not server.over


def test_s5_1f_s5_4_2a_s6_4b_resets_that_are_not_remembered_are_late_too():
    server = opened()
    for stream in range(1, 2 * 1100, 2):
        server.receive(headers(stream))
        server.reset(stream, Code.CANCEL)
    assert server.receive(data(1, b"x") + headers(1, end=True)) == []
    assert not server.over


def test_s5_1g_nothing_is_sent_after_our_end_or_on_an_idle_stream():
    client = dialled()
    stream = client.request(OPEN, end=True)
    assert len(sent(client)) == 1
    client.headers(stream, TRAILERS, end=True)
    client.data(stream, b"x")
    for idle in (2, 3, 99):
        client.headers(idle, OPEN)
        client.data(idle, b"x", end=True)
        client.reset(idle, Code.CANCEL)
        client.consumed(idle, 200_000)
    assert [frame for frame in sent(client) if frame[2] != 0] == []


def test_s5_1g_what_comes_after_an_end_that_waits_for_a_window_is_not_sent():
    client = asked()
    client.data(1, bytes(65_536), end=True)
    client.data(1, b"x")
    client.headers(1, TRAILERS, end=True)
    client.receive(frames.window_update(0, 10) + frames.window_update(1, 10))
    found = sent(client)
    assert sum(len(payload) for kind, *_, payload in found if kind == 0) == 65_536
    assert found[-1] == (frames.DATA, frames.END_STREAM, 1, b"\0")


def test_s5_1_1a_s5_1_1b_a_clients_streams_are_odd_and_grow():
    client = dialled()
    assert [client.request(OPEN) for _ in range(3)] == [1, 3, 5]
    client.reset(5, Code.CANCEL)
    assert client.request(OPEN) == 7
    assert [stream for kind, _, stream, _ in sent(client) if kind == 1] == [1, 3, 5, 7]


def test_s5_1_1b_when_the_numbers_are_used_up_no_stream_is_begun():
    client = dialled()
    client._streams.next_id = frames.MOST_STREAM_ID
    assert client.request(OPEN, end=True) == frames.MOST_STREAM_ID
    assert not client.can_request


def test_s5_1_1c_a_number_lower_than_one_before_it_is_unexpected():
    server = opened()
    server.receive(headers(5))
    assert ends(server, headers(3), Code.PROTOCOL_ERROR)


@pytest.mark.parametrize("value", [0, 1, 3])
def test_s5_1_2a_a_client_keeps_to_the_streams_it_may_have_at_once(value):
    client = dialled()
    client.receive(frames.settings({frames.MAX_CONCURRENT_STREAMS: value}))
    for _ in range(value):
        client.request(OPEN)
    assert not client.can_request
    with pytest.raises(RuntimeError):
        client.request(OPEN)
    client.receive(frames.settings({frames.MAX_CONCURRENT_STREAMS: value + 1}))
    client.request(OPEN)
    assert not client.can_request


def test_s5_1_2a_a_limit_below_what_is_open_holds_for_new_streams():
    client = dialled()
    for _ in range(3):
        client.request(OPEN)
    client.receive(frames.settings({frames.MAX_CONCURRENT_STREAMS: 2}))
    client.reset(1, Code.CANCEL)
    assert not client.can_request
    client.reset(3, Code.CANCEL)
    assert client.can_request


def test_s5_1_2b_s8_7a_half_closed_streams_count_and_the_refused_one_is_not_told():
    server = opened(max_streams=1)
    server.receive(headers(1, end=True))
    events = server.receive(headers(3) + headers(5, end=True))
    assert [(type(event), event.stream_id) for event in events] == [
        (StreamReset, 3),
        (StreamReset, 5),
    ]
    refused = Code.REFUSED_STREAM.to_bytes(4, "big")
    assert sent(server) == [(3, 0, 3, refused), (3, 0, 5, refused)]


def test_s5_4a_s5_4_1a_s8_7b_an_error_is_reported_after_what_came_before_it():
    server = opened()
    events = server.receive(headers(1) + data(7, b"x") + headers(3))
    assert [type(event) for event in events] == [HeadersReceived, Ended]
    assert events[1].code is Code.PROTOCOL_ERROR
    (goaway,) = sent(server)
    assert goaway[0] == frames.GOAWAY
    assert goaway[3][:8] == bytes((0, 0, 0, 1, 0, 0, 0, 1))


def test_s5_4a_an_error_of_the_connection_is_reported_of_a_stream_in_error_too():
    server = called()
    server.receive(data(1, end=True))
    raw = data(1, b"\x09", flags=frames.PADDED)  # closed, and padded beyond its end
    assert ends(server, raw, Code.PROTOCOL_ERROR, "padding")


def test_s5_4_1a_after_an_error_nothing_goes_on():
    client = asked()
    assert ends(client, frames.window_update(0, 0), Code.PROTOCOL_ERROR)
    assert client.receive(headers(1, RESPONSE)) == []
    assert not client.can_request
    assert client.open_streams == 0
    client.data(1, b"x", end=True)
    client.drain(final=True)
    client.end(Code.INTERNAL_ERROR)
    assert sent(client) == []


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_s5_4_2b_a_reset_is_not_answered_by_a_reset(end, times):
    server = opened()
    server.receive(headers(1, end=end))
    server.receive(frames.rst_stream(1, Code.CANCEL) * times)
    assert sent(server) == []
    server.receive(headers(3))
    server.reset(3, Code.CANCEL)
    server.outgoing()
    server.receive(frames.rst_stream(3, Code.CANCEL) * times)
    assert sent(server) == []


# --- 6.1 to 6.4 DATA, HEADERS, PRIORITY, RST_STREAM ---------------------------------


@pytest.mark.parametrize("how", ["by both ends", "by the peer's reset"])
def test_s6_1c_data_on_a_closed_stream_is_refused(how):
    assert ends(closed(how), data(1, b"x"), Code.STREAM_CLOSED)


@pytest.mark.parametrize("made", [opened, asked])
@pytest.mark.parametrize("kind", [frames.DATA, frames.HEADERS, frames.PUSH_PROMISE])
def test_s6_1b_s6_2c_s6_6b_neither_end_takes_them_on_stream_0(made, kind):
    raw = frames.frame(kind, frames.END_HEADERS | frames.END_STREAM, 0, OPEN)
    assert ends(made(), raw, Code.PROTOCOL_ERROR, "stream 0")


@pytest.mark.parametrize("pad", [0, 1, 255])
def test_s6_1d_s6_2d_a_frame_may_be_all_padding_and_its_length(pad):
    padding = bytes((pad,))
    server = opened()
    raw = headers(1, block=padding + OPEN + bytes(pad), flags=frames.PADDED)
    (event,) = server.receive(raw)
    assert event.head.path == REQUEST[2][1]
    (event,) = server.receive(data(1, padding + bytes(pad), flags=frames.PADDED))
    assert event == DataReceived(1, b"", ended=False)
    if pad:  # an octet less than it says
        raw = data(1, padding + bytes(pad - 1), flags=frames.PADDED)
        assert ends(server, raw, Code.PROTOCOL_ERROR, "padding")


def test_s6_2d_padding_of_headers_is_not_longer_than_its_frame():
    for body in (bytes((1,)), bytes((9,)) + OPEN[:8], b"\xff" + OPEN):
        raw = headers(1, block=body, flags=frames.PADDED)
        assert ends(opened(), raw, Code.PROTOCOL_ERROR, "padding")


@pytest.mark.parametrize("made", [opened, asked])
def test_s6_2b_s4_3a_nothing_interrupts_the_block_of_either_end(made):
    for between in (
        data(1, b"x"),
        headers(1, RESPONSE),
        frames.rst_stream(1, 8),
        frames.settings({}),
        frames.window_update(1, 1),
        frames.frame(frames.PRIORITY, 0, 1, bytes(5)),
        frames.frame(frames.PUSH_PROMISE, 4, 1, bytes(4)),
        frames.goaway(0, 0),
        continuation(3, b"", frames.END_HEADERS),
    ):
        connection = made()
        connection.receive(headers(1, block=b"\x88", done=False))
        assert ends(connection, between, Code.PROTOCOL_ERROR, "not complete")


@pytest.mark.parametrize("size", [0, 4, 6])
def test_s6_3b_priority_of_the_wrong_size_ends_its_stream(size):
    server = called()
    raw = frames.frame(frames.PRIORITY, 0, 1, bytes(size))
    assert resets(server, raw, 1, Code.FRAME_SIZE_ERROR)
    assert isinstance(server.receive(headers(3))[0], HeadersReceived)


def test_s6_4d_an_idle_stream_is_not_reset():
    for made, idle in ((opened, 5), (opened, 2), (asked, 3)):
        connection = made()
        connection.receive(frames.frame(frames.PRIORITY, 0, idle, bytes(4)))
        assert [frame for frame in sent(connection) if frame[0] == 3] == []


def test_s6_4a_what_waited_is_not_sent_after_the_peers_reset():
    client = asked()
    client.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 1 << 20}))
    client.data(1, bytes(100_000), end=True)
    client.outgoing()
    client.receive(frames.rst_stream(1, 8) + frames.window_update(0, 1 << 20))
    assert sent(client) == []


def test_s6_4b_s5_4_2a_a_client_is_prepared_for_what_was_on_its_way():
    client = asked(**SMALL)
    client.reset(1, Code.CANCEL)
    late = headers(1, RESPONSE) + data(1, b"x" * 10) + frames.window_update(1, 1)
    late += headers(1, ((b"grpc-status", b"0"),), end=True) + frames.rst_stream(1, 0)
    assert client.receive(late) == []
    assert not client.over
    assert [frame[0] for frame in sent(client)] == [frames.RST_STREAM]


# --- 6.5 SETTINGS -------------------------------------------------------------------


def test_s6_5b_all_settings_have_their_effect():
    client = dialled()
    client.receive(
        frames.settings(
            {
                frames.HEADER_TABLE_SIZE: 0,
                frames.ENABLE_PUSH: 0,
                frames.MAX_CONCURRENT_STREAMS: 1,
                frames.INITIAL_WINDOW_SIZE: 40_000,
                frames.MAX_FRAME_SIZE: 1 << 15,
                frames.MAX_HEADER_LIST_SIZE: 1 << 14,
            }
        )
    )
    client.request(OPEN)
    client.data(1, bytes(50_000))
    assert not client.can_request
    assert [(kind, len(payload)) for kind, *_, payload in sent(client)] == [
        (frames.SETTINGS, 0),
        (frames.HEADERS, 1 + len(OPEN)),
        (frames.DATA, 1 << 15),
        (frames.DATA, 40_000 - (1 << 15)),
    ]


@pytest.mark.parametrize("value", [0, 1])
def test_s6_5b_s6_5_2c_a_client_may_enable_push_which_we_do_not_use(value):
    server = opened()
    assert server.receive(frames.settings({frames.ENABLE_PUSH: value})) == []
    assert sent(server) == [(frames.SETTINGS, frames.ACK, 0, b"")]
    raw = frames.settings({frames.ENABLE_PUSH: value + 2})
    assert ends(server, raw, Code.PROTOCOL_ERROR, "ENABLE_PUSH")


@pytest.mark.parametrize("size", [1, 6, 12])
def test_s6_5c_neither_end_takes_an_acknowledgement_with_a_payload(size):
    raw = frames.frame(frames.SETTINGS, frames.ACK, 0, bytes(size))
    assert ends(opened(), raw, Code.FRAME_SIZE_ERROR)
    assert ends(dialled(), raw, Code.FRAME_SIZE_ERROR)


def test_s6_5d_s6_7d_s6_8b_a_client_takes_none_of_them_on_a_stream():
    for kind, size in ((frames.SETTINGS, 0), (frames.PING, 8), (frames.GOAWAY, 8)):
        raw = frames.frame(kind, 0, 1, bytes(size))
        assert ends(asked(), raw, Code.PROTOCOL_ERROR, "on a stream")


def test_s6_5_2d_s6_5_2g_what_we_ask_for_is_allowed():
    for client, size in itertools.product((True, False), (1 << 14, (1 << 24) - 1)):
        made = Connection(client=client, bounds=Bounds(max_frame_bytes=size))
        payload = sent(made)[0][3]
        asks = {
            int.from_bytes(payload[at : at + 2], "big"): int.from_bytes(
                payload[at + 2 : at + 6], "big"
            )
            for at in range(0, len(payload), 6)
        }
        assert asks[frames.MAX_FRAME_SIZE] == size
        assert asks.get(frames.ENABLE_PUSH, 0) == 0
        assert asks[frames.INITIAL_WINDOW_SIZE] < 1 << 31


def test_s6_5_2f_s6_5_2h_the_ends_of_what_is_allowed_are_allowed():
    for values in (
        {frames.INITIAL_WINDOW_SIZE: (1 << 31) - 1},
        {frames.INITIAL_WINDOW_SIZE: 0},
        {frames.MAX_FRAME_SIZE: 1 << 14},
        {frames.MAX_FRAME_SIZE: (1 << 24) - 1},
        {frames.MAX_CONCURRENT_STREAMS: (1 << 32) - 1},
    ):
        client = asked()
        assert client.receive(frames.settings(values)) == []
        assert not client.over
    for name in (frames.INITIAL_WINDOW_SIZE, frames.MAX_FRAME_SIZE):
        raw = frames.settings({name: (1 << 32) - 1})
        assert ends(
            dialled(), raw, Code[{4: "FLOW_CONTROL_ERROR"}.get(name, "PROTOCOL_ERROR")]
        )


def test_s6_5_2i_s5_5a_unknown_settings_are_ignored_among_others():
    client = dialled()
    unknown = dict.fromkeys((0, 7, 8, 9, 65535), (1 << 32) - 1)
    client.receive(frames.settings({**unknown, frames.MAX_CONCURRENT_STREAMS: 0}))
    assert not client.over
    assert not client.can_request
    assert sent(client) == [(frames.SETTINGS, frames.ACK, 0, b"")]


def test_s6_5_3b_the_last_of_several_values_counts():
    client = asked()
    first = frames.settings({frames.INITIAL_WINDOW_SIZE: 10})
    second = frames.settings({frames.INITIAL_WINDOW_SIZE: 4})
    client.receive(frames.frame(frames.SETTINGS, 0, 0, first[9:] + second[9:]))
    client.data(1, b"0123456789")
    assert data_sent(client) == {1: 4}


def test_s6_5_3b_each_value_is_judged_before_the_next():
    wide = frames.settings({frames.INITIAL_WINDOW_SIZE: frames.MOST_WINDOW})
    narrow = frames.settings({frames.INITIAL_WINDOW_SIZE: 1})
    client = asked()
    client.receive(frames.window_update(1, 1))
    raw = frames.frame(frames.SETTINGS, 0, 0, wide[9:] + narrow[9:])
    assert ends(client, raw, Code.FLOW_CONTROL_ERROR)


def test_s6_5_3a_s6_5_3c_settings_are_acknowledged_before_anything_by_them():
    client = asked()
    client.data(1, bytes(65_536))
    client.receive(frames.window_update(0, 10))
    client.outgoing()
    client.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 65_536}))
    assert sent(client) == [
        (frames.SETTINGS, frames.ACK, 0, b""),
        (frames.DATA, 0, 1, b"\0"),
    ]


def test_s6_5_3c_each_settings_frame_is_acknowledged_and_no_acknowledgement():
    server = opened()
    server.receive(frames.settings({}) * 3 + frames.SETTINGS_ACK)
    assert sent(server) == [(frames.SETTINGS, frames.ACK, 0, b"")] * 3


# --- 6.6 to 6.8 PUSH_PROMISE, PING, GOAWAY ------------------------------------------


@pytest.mark.parametrize("made", [called, asked])
@pytest.mark.parametrize("stream_id", [1, 2, 3])
def test_s6_6b_s6_5_2b_s8_4a_a_push_on_any_stream_ends_the_connection(made, stream_id):
    payload = bytes((0, 0, 0, 2)) + OPEN
    raw = frames.frame(frames.PUSH_PROMISE, frames.END_HEADERS, stream_id, payload)
    assert ends(made(), raw, Code.PROTOCOL_ERROR)


def test_s6_7a_s6_7b_pings_are_answered_in_order_by_the_same_octets():
    client = asked()
    client.ping(b"mine----")
    theirs = [b"%08d" % n for n in range(5)]
    client.receive(b"".join(frames.frame(frames.PING, 0, 0, each) for each in theirs))
    assert sent(client) == [
        (frames.PING, 0, 0, b"mine----"),
        *((frames.PING, frames.ACK, 0, each) for each in theirs),
    ]


@pytest.mark.parametrize("size", [0, 7, 9])
def test_s6_7a_we_send_no_ping_of_another_size(size):
    with pytest.raises(ValueError, match="8"):
        asked().ping(bytes(size))


def test_s6_7c_an_answer_that_nobody_asked_for_is_not_answered():
    for made in (opened, dialled):
        connection = made()
        raw = frames.frame(frames.PING, frames.ACK, 0, b"12345678")
        assert connection.receive(raw) == [PingAnswered(b"12345678")]
        assert sent(connection) == []


def test_s6_8a_after_goaway_no_stream_is_begun():
    client = asked()
    client.receive(frames.goaway(1, Code.NO_ERROR))
    assert client.peer_leaves
    assert not client.can_request
    with pytest.raises(RuntimeError):
        client.request(OPEN)
    (event,) = client.receive(headers(1, RESPONSE))  # which goes on
    assert event.head.status == 200


@pytest.mark.parametrize("last", [frames.MOST_STREAM_ID, 9, 3])
def test_s6_8a_after_goaway_no_stream_is_begun_though_its_number_would_do(last):
    client = asked()
    client.receive(frames.goaway(last, Code.NO_ERROR))
    assert client.peer_leaves
    assert not client.can_request


@pytest.mark.parametrize("code", [Code.NO_ERROR, Code.PROTOCOL_ERROR])
def test_s6_8c_a_goaway_names_no_higher_stream_than_one_before_it(code):
    server = called()
    server.drain(final=True)
    server.receive(headers(3) + headers(5))
    server.drain(final=False)
    server.drain(final=True)
    server.end(code)
    last = [payload[:4] for kind, *_, payload in sent(server) if kind == frames.GOAWAY]
    assert set(last) == {(1).to_bytes(4, "big")}


def test_s6_8d_streams_that_are_not_taken_are_read_and_counted():
    server = called(**SMALL)
    encoder = Encoder()
    block = encoder.encode(((b"x-kept", b"1"),))
    again = encoder.encode(((b"x-kept", b"1"),))
    server.drain(final=True)
    server.outgoing()
    raw = headers(3, block=OPEN + block) + data(3, bytes(16_000)) * 4
    assert server.receive(raw) == []
    assert window_updates(server, 0) >= 64_000 - 65_535 // 4  # counted, and paid back
    (event,) = server.receive(headers(1, block=again, end=True))
    assert event == HeadersReceived(1, ((b"x-kept", b"1"),), ended=True)


# --- 5.2, 6.9 windows ---------------------------------------------------------------


def test_s5_2_1a_s6_9_1a_s6_9_2a_no_window_is_overdrawn():
    client = dialled()
    client.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 1000}))
    for stream in (1, 3):
        client.request(OPEN)
        client.data(stream, bytes(100_000))
    assert data_sent(client) == {1: 1000, 3: 1000}
    client.receive(frames.window_update(1, 500) + frames.window_update(0, 10))
    assert data_sent(client) == {1: 500}
    # By 99,000 for each of the two streams, and for the connection by nothing.
    client.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 100_000}))
    assert sum(data_sent(client).values()) == 65_535 + 10 - 2500
    client.receive(frames.window_update(0, 7))
    assert sum(data_sent(client).values()) == 7
    client.receive(frames.window_update(0, 1 << 20))
    client.receive(frames.window_update(1, 1 << 20))
    client.receive(frames.window_update(3, 1 << 20))
    data_sent(client)
    assert client.unsent(1) == client.unsent(3) == 0


def test_s6_9_1a_streams_share_the_connections_window():
    client = asked()
    client.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 100_000}))
    client.request(OPEN)
    client.data(1, bytes(50_000))
    client.data(3, bytes(50_000))  # for which its own window has room
    assert data_sent(client) == {1: 50_000, 3: 15_535}


def test_s6_9_2a_the_window_of_a_new_stream_is_the_new_one():
    client = asked()
    client.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 3}))
    client.request(OPEN)
    client.data(1, b"12345")
    client.data(3, b"12345")
    assert data_sent(client) == {1: 3, 3: 3}


def test_s6_9_2b_a_negative_window_takes_its_whole_debt_before_anything_is_sent():
    client = asked()
    client.data(1, bytes(1000))
    client.receive(frames.settings({frames.INITIAL_WINDOW_SIZE: 0}))
    client.data(1, b"x" * 10)
    client.outgoing()
    for _ in range(4):
        client.receive(frames.window_update(1, 250))
        assert data_sent(client) == {}  # at 0 at last, from -1000
    client.receive(frames.window_update(1, 1))
    assert data_sent(client) == {1: 1}


@pytest.mark.parametrize("made", [opened, dialled])
def test_s6_9a_all_but_data_is_taken_when_the_windows_are_empty(made):
    connection = made(**SMALL)
    if made is dialled:
        connection.request(OPEN)
        connection.request(OPEN)
    fields = REQUEST if made is opened else RESPONSE
    connection.receive(headers(1, fields) + data(1, bytes(65_535)))
    connection.outgoing()
    (event,) = connection.receive(headers(3, fields))
    assert event.stream_id == 3
    (event,) = connection.receive(headers(1, ((b"x", b"1"),), end=True))
    assert event.ended
    connection.receive(
        frames.frame(frames.PING, 0, 0, bytes(8))
        + frames.settings({})
        + frames.window_update(0, 1024)
        + frames.frame(frames.PRIORITY, 0, 3, bytes(5))
    )
    kinds = [(kind, flags) for kind, flags, *_ in sent(connection)]
    assert (frames.PING, frames.ACK) in kinds
    assert (frames.SETTINGS, frames.ACK) in kinds
    assert connection.receive(frames.rst_stream(3, 8)) == [StreamReset(3, 8, "")]
    assert ends(connection, data(3, b"x"), Code.FLOW_CONTROL_ERROR)


@pytest.mark.parametrize("how", ["by both ends", "by our reset", "by the peer's reset"])
def test_s6_9c_an_update_on_a_closed_stream_is_no_error(how):
    server = closed(how)
    server.outgoing()
    assert server.receive(frames.window_update(1, 1) * 3) == []
    assert sent(server) == []
    assert not server.over


def test_s6_9d_data_in_error_is_counted_and_paid_back():
    server = opened(**SMALL)
    server.receive(headers(1, end=True) + headers(3))
    raw = data(1, bytes(16_000))  # after the end, and then of a stream that was reset
    server.receive(raw * 4)
    assert window_updates(server, 0) >= 64_000 - 65_535 // 4
    server.receive(headers(5, changed((b"content-length", b"1"))))
    server.receive(data(5, bytes(16_000)) * 4)  # more than it says
    assert window_updates(server, 0) >= 64_000 - 65_535 // 4
    assert not server.over


def test_s6_9d_data_of_a_stream_that_is_not_wanted_counts_as_any_other():
    server = opened(stream_window=1 << 20, connection_window=65_535)
    server.receive(headers(1) + headers(3) + data(1, bytes(65_530)))
    server.reset(3, Code.CANCEL)
    assert ends(server, data(3, bytes(6)), Code.FLOW_CONTROL_ERROR)


@pytest.mark.parametrize("stream_id", [0, 1])
def test_s6_9b_an_update_of_a_client_by_nothing_is_refused(stream_id):
    raw = frames.window_update(stream_id, 0)
    if stream_id:
        assert resets(asked(), raw, 1, Code.PROTOCOL_ERROR, "by 0")
    else:
        assert ends(asked(), raw, Code.PROTOCOL_ERROR, "by 0")


@pytest.mark.parametrize("made", [called, asked])
@pytest.mark.parametrize("stream_id", [0, 1])
def test_s6_9_1b_a_window_may_be_2_to_the_31_less_1_and_no_more(made, stream_id):
    connection = made()
    raw = frames.window_update(stream_id, frames.MOST_WINDOW - 65_535)
    assert connection.receive(raw) == []
    raw = frames.window_update(stream_id, 1)
    if stream_id:
        assert resets(connection, raw, 1, Code.FLOW_CONTROL_ERROR)
    else:
        assert ends(connection, raw, Code.FLOW_CONTROL_ERROR)


def test_s6_9_1c_a_client_refuses_data_beyond_its_windows():
    client = asked(stream_window=65_535)
    client.receive(headers(1, RESPONSE) + data(1, bytes(65_535)))
    assert resets(client, data(1, b"x"), 1, Code.FLOW_CONTROL_ERROR)
    client = asked(**SMALL)
    client.receive(headers(1, RESPONSE) + data(1, bytes(65_535)))
    assert ends(client, data(1, b"x"), Code.FLOW_CONTROL_ERROR)


def test_s6_9_2c_the_largest_initial_window_is_too_large_for_a_stream_that_got_more():
    client = asked()
    assert client.receive(frames.window_update(1, 1)) == []
    raw = frames.settings({frames.INITIAL_WINDOW_SIZE: frames.MOST_WINDOW})
    assert ends(client, raw, Code.FLOW_CONTROL_ERROR, "overflows")


# --- 6.10 CONTINUATION, 7 error codes -----------------------------------------------


@pytest.mark.parametrize("made", [opened, asked])
def test_s6_10a_s8_1a_continuation_is_followed_by_its_own_kind(made):
    for between in (
        data(1, b"x"),
        headers(1, RESPONSE),
        frames.frame(frames.PING, 0, 0, bytes(8)),
        frames.frame(0x2A, 0, 1, b""),
        continuation(3, b"", frames.END_HEADERS),
    ):
        connection = made()
        connection.receive(headers(1, block=b"\x88", done=False))
        connection.receive(continuation(1, b"\x10"))
        assert ends(connection, between, Code.PROTOCOL_ERROR, "not complete")


def test_s6_10b_continuation_is_not_on_stream_0():
    raw = continuation(0, b"", frames.END_HEADERS)
    for made in (opened, asked):
        assert ends(made(), raw, Code.PROTOCOL_ERROR, "stream 0")
        connection = made()
        connection.receive(headers(1, block=b"\x88", done=False))
        assert ends(connection, raw, Code.PROTOCOL_ERROR)


def test_s6_10c_a_block_has_one_end():
    for made, fields in ((opened, REQUEST), (asked, RESPONSE)):
        connection = made()
        block = Encoder().encode(fields)
        whole = headers(1, block=block[:3], done=False)
        whole += continuation(1, block[3:7]) + continuation(1, block[7:], 4)
        (event,) = connection.receive(whole)
        assert isinstance(event, HeadersReceived)
        assert ends(connection, continuation(1, b"", 4), Code.PROTOCOL_ERROR)


@pytest.mark.parametrize("code", [0x0E, 0xDEAD, (1 << 32) - 1])
def test_s7a_s5_5a_unknown_error_codes_have_no_effect_of_their_own(code):
    client = asked()
    client.request(OPEN)
    client.outgoing()
    assert client.receive(frames.rst_stream(1, code)) == [StreamReset(1, code, "")]
    assert client.receive(frames.goaway(3, code)) == [GoingAway(3, code, b"")]
    assert not client.over
    (event,) = client.receive(headers(3, RESPONSE))
    assert event.head.status == 200
    assert sent(client) == []


# --- 8.1 messages -------------------------------------------------------------------


class Judge:
    """Takes field blocks, each on a stream of its own; says which are malformed."""

    def __init__(self):
        self.client, self.server = dialled(resets=10**6), opened(resets=10**6)
        self.next = 1

    def refuses(self, connection, raw, stream):
        events = connection.receive(raw)
        assert not connection.over, events[-1].reason
        if [type(event) for event in events] == [StreamReset]:
            assert events[0].code == Code.PROTOCOL_ERROR
            expected = frames.rst_stream(stream, Code.PROTOCOL_ERROR)
            assert connection.outgoing() == expected
            return True
        assert all(isinstance(event, HeadersReceived) for event in events)
        connection.reset(stream, Code.CANCEL)
        connection.outgoing()
        return False

    def request(self, fields):
        stream, self.next = self.next, self.next + 2
        return self.refuses(self.server, headers(stream, fields), stream)

    def trailers(self, fields):
        stream, self.next = self.next, self.next + 2
        self.server.receive(headers(stream))
        return self.refuses(self.server, headers(stream, fields, end=True), stream)

    def response(self, fields):
        stream = self.client.request(OPEN)
        self.client.outgoing()
        return self.refuses(self.client, headers(stream, fields), stream)

    def field(self, name, value):
        """The field in each kind of message; they are of one mind."""
        found = {
            self.request((*REQUEST, (name, value))),
            self.response((*RESPONSE, (name, value))),
            self.trailers(((name, value),)),
        }
        (refused,) = found
        return refused


def test_s8_1b_s8_3b_a_clients_trailers_have_no_pseudo_header_fields():
    for name in (b":status", b":path", b":x"):
        client = asked()
        client.receive(headers(1, RESPONSE) + data(1, b"x"))
        raw = headers(1, ((b"grpc-status", b"0"), (name, b"200")), end=True)
        assert resets(client, raw, 1, Code.PROTOCOL_ERROR)
        assert Judge().trailers(((name, b"200"),))


def test_s8_1c_what_follows_a_final_response_ends_the_stream():
    for second in (RESPONSE, ((b"x", b"1"),), ((b":status", b"103"),)):
        client = asked()
        client.receive(headers(1, ((b":status", b"103"),)) + headers(1, RESPONSE))
        assert resets(client, headers(1, second), 1, Code.PROTOCOL_ERROR)


def test_s8_1d_a_reset_after_a_complete_response_leaves_the_response():
    client = asked()
    raw = headers(1, RESPONSE) + data(1, b"answer")
    raw += headers(1, ((b"grpc-status", b"0"),), end=True)
    raw += frames.rst_stream(1, Code.NO_ERROR)
    events = client.receive(raw)
    assert [type(event) for event in events] == [
        HeadersReceived,
        DataReceived,
        HeadersReceived,
        StreamReset,
    ]
    assert events[2].ended
    assert events[3].code == Code.NO_ERROR


@pytest.mark.parametrize("status", [b"100", b"102", b"103", b"199"])
def test_s8_1e_s8_1_1b_an_interim_response_does_not_end_the_stream(status):
    client = asked()
    raw = headers(1, ((b":status", status),), end=True)
    assert resets(client, raw, 1, Code.PROTOCOL_ERROR, "interim")
    client = asked()
    events = client.receive(
        headers(1, ((b":status", status),)) * 2 + headers(1, RESPONSE)
    )
    assert [event.head.status for event in events] == [200]


@pytest.mark.parametrize("length", [b"2", b"4", b"0", b"x", b"+3", b"3,3", b"1_0"])
def test_s8_1_1c_s8_1_1b_a_response_is_as_long_as_it_says(length):
    client = asked()
    events = client.receive(
        headers(1, (*RESPONSE, (b"content-length", length))) + data(1, b"abc", end=True)
    )
    assert [e.code for e in events if isinstance(e, StreamReset)] == [1]
    assert not [e for e in events if isinstance(e, DataReceived)]
    assert not client.over


def test_s8_1_1c_trailers_do_not_make_a_body_longer():
    server = opened()
    server.receive(headers(1, changed((b"content-length", b"3"))) + data(1, b"ab"))
    raw = headers(1, ((b"x", b"1"),), end=True)
    assert resets(server, raw, 1, Code.PROTOCOL_ERROR, "content-length")
    server.receive(headers(3, changed((b"content-length", b"3"))))
    padded = data(3, b"\x02abc\0\0", end=True, flags=frames.PADDED)
    (event,) = server.receive(padded)  # padding is no part of the body
    assert event.data == b"abc"


# --- 8.2 fields ---------------------------------------------------------------------


def written(*fields):
    """What a block of ours says, or nothing where it was refused."""
    try:
        return Decoder().decode(encode(fields), raw=True)
    except ValueError:
        return None


def test_s8_2a_names_are_written_in_lower_case():
    assert written((b"X-Upper", b"1")) in (None, [(b"x-upper", b"1")])


FORBIDDEN = [*range(0x21), *range(0x41, 0x5B), *range(0x7F, 0x100)]


def test_s8_2_1a_s8_2_1e_no_octet_that_is_forbidden_is_in_a_name():
    judge = Judge()
    for octet in FORBIDDEN:
        wrong = bytes((octet,))
        assert judge.field(b"x" + wrong + b"y", b"1"), wrong
    for octet in (0x00, 0x20, 0x41, 0x7F, 0xFF):
        for name in (bytes((octet,)), b"x" + bytes((octet,)), bytes((octet,)) + b"x"):
            assert judge.field(name, b"1"), name
    for octet in b"!#$%&'*+-.^_`|~09az":
        assert not judge.field(b"x" + bytes((octet,)), b"1")


def test_s8_2_1b_s8_2_1e_no_name_has_a_colon():
    judge = Judge()
    for name in (b"x:y", b"x:", b":x", b"::", b":", b":path:"):
        assert judge.field(name, b"1"), name


@pytest.mark.parametrize("octet", [b"\0", b"\n", b"\r"])
def test_s8_2_1c_s8_2_1e_no_value_has_nul_lf_or_cr(octet):
    judge = Judge()
    for value in (octet, octet + b"x", b"x" + octet + b"y", b"x" + octet):
        assert judge.field(b"x", value), value
        assert judge.request(changed(authority=value))
        assert judge.request(changed(path=b"/" + value))
    assert not judge.field(b"x", b"a\tb c\x80\xff")


@pytest.mark.parametrize("space", [b" ", b"\t", b" \t"])
def test_s8_2_1d_s8_2_1e_no_value_begins_or_ends_with_a_space(space):
    judge = Judge()
    for value in (space, space + b"x", b"x" + space):
        assert judge.field(b"x", value), value
        assert judge.request(changed(authority=value))
    assert not judge.field(b"x", b"a" + space + b"b")
    assert not judge.field(b"x", b"")


@pytest.mark.parametrize(
    "field",
    [
        (b"x y", b"1"),
        (b"", b"1"),
        (b"x:y", b"1"),
        (b"x", b"a\r\nb"),
        (b"x", b"a\0"),
        (b"x", b" a"),
    ],
)
def test_s8_2_1e_what_we_would_refuse_we_do_not_write(field):
    assert written(*RESPONSE, field) is None


@pytest.mark.parametrize(
    "field",
    [
        (b"connection", b"close"),
        (b"keep-alive", b"1"),
        (b"proxy-connection", b"close"),
        (b"transfer-encoding", b"chunked"),
        (b"upgrade", b"h2c"),
        (b"te", b"gzip"),
    ],
)
def test_s8_2_2a_no_connection_specific_field_is_written(field):
    assert written(*RESPONSE, field) is None


def test_s8_2_2b_connection_specific_fields_are_malformed_in_every_message():
    judge = Judge()
    for name in (
        *(b"connection", b"keep-alive", b"proxy-connection"),
        *(b"transfer-encoding", b"upgrade"),
    ):
        assert judge.field(name, b""), name
        assert judge.field(name, b"close"), name


def test_s8_2_2c_te_says_trailers_and_nothing_else():
    judge = Judge()
    for value in (b"gzip", b"trailers, gzip", b"trailers;q=1", b"", b"deflate"):
        assert judge.request((*changed(without=(b"te",)), (b"te", value))), value
        assert judge.response((*RESPONSE, (b"te", value)))
    assert not judge.request(REQUEST)


def test_s8_2_2c_te_is_in_no_response():
    assert Judge().response((*RESPONSE, (b"te", b"trailers")))


# --- 8.3 pseudo-header fields -------------------------------------------------------


def test_s8_3a_no_undefined_pseudo_header_field_is_written():
    assert written((b":status", b"200"), (b":x", b"1")) is None


def test_s8_3b_only_the_pseudo_header_fields_of_a_message_are_in_it():
    judge = Judge()
    for name in (b":status", b":protocol", b":x", b":", b":Path"):
        assert judge.request(((name, b"200"), *REQUEST)), name
    for name in (b":method", b":path", b":scheme", b":authority", b":x"):
        assert judge.response((*RESPONSE[:1], (name, b"/"), *RESPONSE[1:])), name


def test_s8_3c_pseudo_header_fields_come_first():
    judge = Judge()
    for at in range(4):
        moved = (*REQUEST[:at], *REQUEST[at + 1 :], REQUEST[at])
        assert judge.request(moved), REQUEST[at]
    assert judge.response(RESPONSE[::-1])
    order = (*REQUEST[3::-1], *REQUEST[4:])
    assert not judge.request(order)


def test_s8_3d_s8_3_1g_none_occurs_twice_though_it_says_the_same():
    judge = Judge()
    for field in REQUEST[:4]:
        assert judge.request((field, *REQUEST)), field
    assert judge.response((*RESPONSE[:1], *RESPONSE))


def test_s8_3_1a_host_does_not_tell_the_authority():
    (event,) = opened().receive(headers(1, changed((b"host", b"127.0.0.1:1"))))
    assert event.head.authority == b"127.0.0.1:1"
    raw = headers(1, changed((b"host", b"other"), without=(b":authority",)))
    (event,) = opened().receive(raw)
    assert event.head.authority == b""
    assert event.head.fields[-1] == (b"host", b"other")


def test_s8_3_1a_s8_3_1c_a_host_that_differs_is_malformed():
    judge = Judge()
    for host in (b"other", b"127.0.0.1", b"127.0.0.1:12", b""):
        assert judge.request(changed((b"host", host))), host


@pytest.mark.parametrize(
    "authority", [b"user@127.0.0.1:1", b"user:word@host", b"@host"]
)
def test_s8_3_1d_an_authority_with_a_user_is_malformed(authority):
    assert Judge().request(changed(authority=authority))


def test_s8_3_1e_s8_3_1g_a_request_has_a_path():
    judge = Judge()
    for path in (b"", b"x", b"?x", b" /", b"/ ", b"/a\tb", b"**", b"*/", b"/\xc3\xa4"):
        assert judge.request(changed(path=path)), path
    for path in (b"/", b"//", b"/a?b=c", b"/%20"):
        assert not judge.request(changed(path=path)), path


def test_s8_3_1f_the_path_of_options_may_be_a_star():
    assert not Judge().request(changed(method=b"OPTIONS", path=b"*"))


@pytest.mark.parametrize("method", [b"POST", b"GET", b"options"])
def test_s8_3_1f_the_path_of_another_method_is_no_star(method):
    assert Judge().request(changed(method=method, path=b"*"))


def test_s8_3_1g_a_request_has_method_scheme_and_path():
    judge = Judge()
    for name, _ in REQUEST[:3]:
        assert judge.request(changed(without=(name,))), name
        assert judge.request(changed(**{name[1:].decode(): b""})), name
    for method in (b"GE T", b"G\xc3T", b"GET,", b"GET/"):
        assert judge.request(changed(method=method)), method
    for scheme in (b"HTTPS:", b"1", b"https "):
        assert judge.request(changed(scheme=scheme)), scheme
    assert not judge.request(changed(without=(b":authority",)))


@pytest.mark.parametrize(
    "status", [None, b"", b"20", b"2000", b"099", b"600", b"1x3", b"+20", b"2.0"]
)
def test_s8_3_2a_s8_1_1b_a_response_has_a_status(status):
    pseudo = () if status is None else ((b":status", status),)
    assert Judge().response((*pseudo, *RESPONSE[1:]))


def test_s8_3_2a_what_follows_an_interim_response_has_a_status_too():
    client = asked()
    client.receive(headers(1, ((b":status", b"103"),)))
    raw = headers(1, ((b"link", b"x"),))
    assert resets(client, raw, 1, Code.PROTOCOL_ERROR, ":status")


# --- 8.5 to 8.7 ---------------------------------------------------------------------


def test_s8_5a_connect_without_scheme_and_path_is_refused_as_we_have_none():
    connect = ((b":method", b"CONNECT"), (b":authority", b"127.0.0.1:1"))
    assert Judge().request(connect)


def test_s8_5a_connect_with_scheme_or_path_is_malformed():
    assert Judge().request(changed(method=b"CONNECT"))


def test_s8_6a_there_are_no_switching_protocols():
    assert Judge().response(((b":status", b"101"),))


def test_s8_7a_a_stream_that_was_told_of_is_never_said_to_be_refused():
    """Whatever goes wrong on it, and however many others there are."""
    for raw in (
        data(1, bytes(70_000)),
        headers(1, ((b"X", b"1"),), end=True),
        headers(1),
        frames.window_update(1, 0),
        frames.window_update(1, frames.MOST_WINDOW),
        frames.frame(frames.PRIORITY, 0, 1, b""),
    ):
        server = called(max_streams=1, stream_window=65_535)
        (event,) = server.receive(raw)
        assert isinstance(event, StreamReset)
        assert event.code != Code.REFUSED_STREAM
        ((kind, _, stream, code),) = sent(server)
        assert (kind, stream) == (frames.RST_STREAM, 1)
        assert code != Code.REFUSED_STREAM.to_bytes(4, "big")


@pytest.mark.parametrize("way", ["end", "drain", "error"])
def test_s8_7b_goaway_names_all_streams_that_were_told_of(way):
    server = opened(max_streams=2)
    told = [
        event.stream_id
        for event in server.receive(headers(1) + headers(7) + headers(9))
        if isinstance(event, HeadersReceived)
    ]
    assert told == [1, 7]
    server.outgoing()
    if way == "end":
        server.end()
    elif way == "drain":
        server.drain(final=True)
    else:
        server.receive(frames.window_update(0, 0))
    (goaway,) = sent(server)
    assert int.from_bytes(goaway[3][:4], "big") >= 7


def test_s8_7b_a_stream_after_the_last_one_is_not_told_of():
    client, server = pair()
    server.drain(final=True)
    client.request(OPEN, end=True)
    _, told = settle(client, server)
    assert told == []
