"""Two ends of a connection, driven by hand."""

from hpack import Encoder

from ztserve.transport.http2 import (
    Bounds,
    Connection,
    Ended,
    StreamReset,
    encode,
    frames,
)

REQUEST = (
    (b":method", b"POST"),
    (b":scheme", b"https"),
    (b":path", b"/ztserve.v1.Directory/Watch"),
    (b":authority", b"127.0.0.1:1"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)
RESPONSE = ((b":status", b"200"), (b"content-type", b"application/grpc"))
OPEN = encode(REQUEST)
ANSWER = encode(RESPONSE)
TRAILERS = encode(((b"grpc-status", b"0"),))


def pair(**bounds):
    """A client and a server that know each other's settings."""
    client = Connection(client=True, bounds=Bounds(**bounds))
    server = Connection(client=False, bounds=Bounds(**bounds))
    settle(client, server)
    return client, server


def settle(client, server):
    """Carry bytes both ways until there are no more; return what each was told."""
    told = [], []
    while True:
        there, back = client.outgoing(), server.outgoing()
        if not there and not back:
            return told
        told[1].extend(server.receive(there))
        told[0].extend(client.receive(back))


def opened(**bounds):
    """A server whose client's bytes are ours to make; its greeting is read."""
    server = Connection(client=False, bounds=Bounds(**bounds))
    server.receive(frames.PREFACE + frames.settings({}))
    server.outgoing()
    return server


def dialled(**bounds):
    """A client whose server's bytes are ours to make."""
    client = Connection(client=True, bounds=Bounds(**bounds))
    client.receive(frames.settings({}))
    client.outgoing()
    return client


def headers(stream_id, fields=REQUEST, *, end=False, done=True, flags=0, block=None):
    """A HEADERS frame."""
    flags |= (frames.END_STREAM if end else 0) | (frames.END_HEADERS if done else 0)
    if block is None:
        block = Encoder().encode(fields)
    return frames.frame(frames.HEADERS, flags, stream_id, block)


def data(stream_id, payload=b"", *, end=False, flags=0):
    """A DATA frame."""
    flags |= frames.END_STREAM if end else 0
    return frames.frame(frames.DATA, flags, stream_id, payload)


def sent(connection):
    """What is to be sent, as (kind, flags, stream, payload)."""
    raw, found = connection.outgoing(), []
    if raw.startswith(frames.PREFACE):
        raw = raw[len(frames.PREFACE) :]
    while raw:
        end = 9 + int.from_bytes(raw[:3], "big")
        found.append((raw[3], raw[4], int.from_bytes(raw[5:9], "big"), raw[9:end]))
        raw = raw[end:]
    return found


def ends(connection, raw, code, words=""):
    """Whether the bytes end the connection by this code, and say so to the peer."""
    (event,) = [e for e in connection.receive(raw) if isinstance(e, Ended)]
    assert event.code is code
    assert words in event.reason
    assert connection.over
    kind, _, _, payload = sent(connection)[-1]
    assert kind == frames.GOAWAY
    assert int.from_bytes(payload[4:8], "big") == code
    assert connection.receive(frames.settings({})) == []
    return True


def resets(connection, raw, stream_id, code, words=""):
    """Whether the bytes end one stream by this code, and not the connection."""
    events = connection.receive(raw)
    found = [e for e in events if isinstance(e, StreamReset)]
    assert [(e.stream_id, e.code) for e in found] == [(stream_id, code)]
    assert words in found[0].reason
    assert not connection.over
    expected = frames.rst_stream(stream_id, code)
    assert expected in connection.outgoing()
    return True


def changed(*more, without=(), **replaced):
    """The fields of a request, some without or with another value, and more."""
    fields = [
        (name, replaced.get(name[1:].decode(), value))
        for name, value in REQUEST
        if name not in without
    ]
    return (*fields, *more)
