"""The maintained `h2` library at the other end."""

import h2.config
import h2.connection
import h2.events
import pytest

from tests.unit.transport.http2.wire import ANSWER, OPEN, REQUEST, RESPONSE, TRAILERS
from ztserve.transport.http2 import Connection, DataReceived, HeadersReceived, encode


def library(*, client):
    config = h2.config.H2Configuration(client_side=client, header_encoding=None)
    made = h2.connection.H2Connection(config)
    made.initiate_connection()
    return made


def carry(ours, theirs):
    """Carry bytes both ways until there are none; return what each was told."""
    told = [], []
    while True:
        out, back = ours.outgoing(), theirs.data_to_send()
        if not out and not back:
            return told
        if out:
            told[1].extend(theirs.receive_data(out))
        told[0].extend(ours.receive(back))


def names(events):
    return [type(event).__name__ for event in events]


@pytest.mark.parametrize("size", [0, 1, 20_000, 300_000])
def test_a_server_of_ours_and_a_client_of_h2(size):
    ours, theirs = Connection(client=False), library(client=True)
    carry(ours, theirs)
    for stream in (1, 3, 5):
        theirs.send_headers(stream, REQUEST)
        body, arrived = bytes(size), b""
        while body:
            room = min(
                theirs.local_flow_control_window(stream),
                theirs.max_outbound_frame_size,
                len(body),
            )
            theirs.send_data(stream, body[:room])
            body = body[room:]
            for event in carry(ours, theirs)[0]:
                if isinstance(event, DataReceived):
                    arrived += event.data
                    ours.consumed(stream, len(event.data))
        theirs.end_stream(stream)
        for event in carry(ours, theirs)[0]:
            arrived += getattr(event, "data", b"")
        assert len(arrived) == size
        ours.headers(stream, ANSWER)
        ours.data(stream, bytes(size))
        ours.headers(stream, TRAILERS, end=True)
        got, told = 0, []
        while "StreamEnded" not in names(told):
            _, told = carry(ours, theirs)
            assert told
            for event in told:
                if isinstance(event, h2.events.DataReceived):
                    got += len(event.data)
                    theirs.acknowledge_received_data(
                        event.flow_controlled_length, stream
                    )
        assert got == size
    assert ours.open_streams == theirs.open_outbound_streams == 0


def test_a_client_of_ours_and_a_server_of_h2():
    ours, theirs = Connection(client=True), library(client=False)
    carry(ours, theirs)
    for _ in range(3):
        stream = ours.request(OPEN)
        ours.data(stream, b"question", end=True)
        _, told = carry(ours, theirs)
        assert names(told)[:2] == ["RequestReceived", "DataReceived"]
        assert [tuple(field) for field in told[0].headers] == list(REQUEST)
        theirs.send_headers(stream, RESPONSE)
        theirs.send_data(stream, b"answer")
        theirs.send_headers(stream, ((b"grpc-status", b"0"),), end_stream=True)
        back, _ = carry(ours, theirs)
        assert names(back) == ["HeadersReceived", "DataReceived", "HeadersReceived"]
        assert back[2] == HeadersReceived(stream, ((b"grpc-status", b"0"),), ended=True)


def test_what_h2_indexes_is_read_and_what_we_write_is_read_by_h2():
    ours, theirs = Connection(client=False), library(client=True)
    carry(ours, theirs)
    fields = (*REQUEST, (b"x-a", b"1"), (b"authorization", b"Bearer x"))
    for stream in (1, 3, 5):
        theirs.send_headers(stream, fields, end_stream=True)
        (event,) = carry(ours, theirs)[0]
        assert event.head.fields == fields[4:]
        answer = (*RESPONSE, (b"x-b", b"v" * 300), (b"x-bin", b"AAE"))
        ours.headers(stream, encode(answer), end=True)
        _, told = carry(ours, theirs)
        assert tuple(tuple(field) for field in told[0].headers) == answer


def test_reset_goaway_and_ping_are_understood_both_ways():
    ours, theirs = Connection(client=False), library(client=True)
    carry(ours, theirs)
    theirs.send_headers(1, REQUEST)
    theirs.ping(b"12345678")
    _, told = carry(ours, theirs)
    assert "PingAckReceived" in names(told)
    theirs.reset_stream(1, 8)
    assert names(carry(ours, theirs)[0]) == ["StreamReset"]
    ours.drain(final=False)
    _, told = carry(ours, theirs)
    assert names(told) == ["ConnectionTerminated"]
