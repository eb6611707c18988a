"""The two ends that are given the same bytes: ours, and that of the `h2` library.

Both tell what a step meant in the same words. What ours sends is sent by h2 as well, so
that both know the same streams and windows, and h2 judges whether it may be sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from h2 import events as their
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hpack import Decoder

from ztserve.transport.http2 import (
    Connection,
    DataReceived,
    Ended,
    GoingAway,
    HeadersReceived,
    PingAnswered,
    Request,
    Response,
    StreamReset,
    frames,
)

if TYPE_CHECKING:
    from tests.fuzz.http2_fields import Listed
    from tests.fuzz.http2_inputs import Input
    from ztserve.transport.http2.events import Event


@dataclass
class Outcome:
    """What one step meant to an end."""

    fatal: int | None = None
    """The code by which the connection ended."""
    reason: str = ""
    told: list[tuple[Any, ...]] = field(default_factory=list)
    """Heads, data, errors of streams, resets, answers to pings, and goodbyes."""
    answered: list[bytes] = field(default_factory=list)
    """The acknowledgements of SETTINGS and PING."""
    resent: list[int] = field(default_factory=list)
    """Streams of which h2 said once more that they are closed."""

    def errors(self) -> list[tuple[int, int]]:
        """Return the streams that ended in an error, each with the code."""
        return [(item[1], item[2]) for item in self.told if item[0] == "error"]


def told_by_us(events: list[Event], outcome: Outcome) -> Outcome:
    """Add what `events` of ours mean to `outcome`."""
    told = outcome.told
    for event in events:
        match event:
            case HeadersReceived(stream, Request() as head, ended):
                told.append(("request", stream, _listed(head), ended))
            case HeadersReceived(stream, Response() as head, ended):
                told.append(("response", stream, _listed(head), ended))
            case HeadersReceived(stream, head, ended):
                told.append(("trailers", stream, head, ended))
            case DataReceived(stream, data, ended):
                told.append(("data", stream, data, ended))
            case StreamReset(stream, _, "the peer went away before it"):
                told.append(("lost", stream))
            case StreamReset(stream, code, reason):
                told.append(("error" if reason else "reset", stream, code))
                outcome.reason = reason
            case PingAnswered(opaque):
                told.append(("pong", opaque))
            case GoingAway(last, code, debug):
                told.append(("goaway", last, code, debug))
            case Ended(code, reason):
                outcome.fatal, outcome.reason = code, reason
            case _:  # Writable, which depends on nothing that is compared
                pass
    return outcome


def _listed(head: Request | Response) -> Listed:
    if isinstance(head, Response):
        return ((b":status", b"%d" % head.status), *head.fields)
    pseudo = {
        b":authority": head.authority,
        b":method": head.method,
        b":path": head.path,
        b":scheme": head.scheme,
    }
    if not head.authority:
        del pseudo[b":authority"]
    return (*pseudo.items(), *head.fields)


def in_order(listed: Any) -> Listed:
    """Return fields with the pseudo-header fields first, sorted, and none empty."""
    pairs = [(bytes(name), bytes(value)) for name, value in listed]
    pseudo = sorted(pair for pair in pairs if pair[0][:1] == b":")
    if pseudo and pseudo[0] == (b":authority", b""):
        del pseudo[0]
    return (*pseudo, *(pair for pair in pairs if pair[0][:1] != b":"))


def parse(raw: bytes) -> list[tuple[int, int, int, bytes]]:
    """Return the frames in what an end sends: kind, flags, stream, payload."""
    if raw.startswith(frames.PREFACE):
        raw = raw[len(frames.PREFACE) :]
    found, at = [], 0
    while at < len(raw):
        end = at + 9 + int.from_bytes(raw[at : at + 3], "big")
        stream = int.from_bytes(raw[at + 5 : at + 9], "big")
        found.append((raw[at + 3], raw[at + 4], stream, raw[at + 9 : end]))
        at = end
    return found


class Ours:
    """The end under test."""

    def __init__(self, given: Input) -> None:
        self.connection = Connection(client=given.client, bounds=given.bounds)
        self.sent = bytearray()
        self.events: list[Event] = []

    def take(self, step: bytes) -> tuple[Outcome, list[tuple[int, int, int, bytes]]]:
        """Receive `step`; return what it meant, and the frames that are sent."""
        events = self.connection.receive(step)
        self.events += events
        made = self.flush()
        answered = [
            payload if kind == frames.PING else b"settings"
            for kind, flags, _, payload in made
            if kind in (frames.PING, frames.SETTINGS) and flags & frames.ACK
        ]
        return told_by_us(events, Outcome(answered=answered)), made

    def flush(self) -> list[tuple[int, int, int, bytes]]:
        """Return the frames that are to be sent."""
        raw = self.connection.outgoing()
        self.sent += raw
        return parse(raw)


class Theirs:
    """The end of the h2 library, with the limits that ours has."""

    def __init__(self, given: Input) -> None:
        bounds = given.bounds
        config = H2Configuration(client_side=given.client, header_encoding=None)
        self.connection = made = H2Connection(config=config)
        limits = {
            SettingCodes.MAX_FRAME_SIZE: bounds.max_frame_bytes,
            SettingCodes.INITIAL_WINDOW_SIZE: bounds.stream_window,
            SettingCodes.MAX_HEADER_LIST_SIZE: bounds.max_header_bytes,
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.MAX_CONCURRENT_STREAMS: bounds.max_streams,
        }
        made.local_settings = Settings(client=given.client, initial_values=limits)
        made.max_inbound_frame_size = bounds.max_frame_bytes
        made.decoder.max_header_list_size = bounds.max_header_bytes
        made.initiate_connection()
        made.data_to_send()
        self._ours = Decoder(max_header_list_size=1 << 20)
        """Reads the blocks that ours sends."""
        self._block: tuple[int, bool, bytes] | None = None
        self.error: BaseException | None = None
        """What ended the connection."""

    def take(self, step: bytes) -> Outcome:
        """Receive `step`; return what it meant."""
        outcome, made = Outcome(), self.connection
        before = made.state_machine.state
        try:
            events = made.receive_data(step)
        except ProtocolError as error:
            self.error = error
            outcome.fatal, outcome.reason = int(error.error_code), f"{error!s:.120}"
            return outcome
        except Exception as error:  # h2 means to raise nothing else
            self.error = error
            outcome.fatal, outcome.reason = -1, f"{error!r:.120}"
            return outcome
        for event in events:
            self._told(event, outcome)
        if any(item[0] == "goaway" for item in outcome.told):
            made.state_machine.state = before  # h2 would take nothing more
        told = {stream for stream, _ in outcome.errors()}
        for kind, flags, stream, payload in parse(made.data_to_send()):
            if kind == frames.RST_STREAM and stream not in told:
                outcome.resent.append(stream)
            elif kind == frames.WINDOW_UPDATE:  # ours decides when there is room
                window = made._inbound_flow_control_window_manager
                window.current_window_size -= int.from_bytes(payload, "big")
            elif kind in (frames.PING, frames.SETTINGS) and flags & frames.ACK:
                outcome.answered.append(payload if kind == frames.PING else b"settings")
        return outcome

    def _told(self, event: Any, outcome: Outcome) -> None:
        told = outcome.told
        match event:
            case their.RequestReceived() | their.ResponseReceived():
                kind = (
                    "request"
                    if isinstance(event, their.RequestReceived)
                    else "response"
                )
                ended = event.stream_ended is not None
                told.append((kind, event.stream_id, in_order(event.headers), ended))
            case their.TrailersReceived():
                ended = event.stream_ended is not None
                told.append(
                    ("trailers", event.stream_id, in_order(event.headers), ended)
                )
            case their.DataReceived():
                ended = event.stream_ended is not None
                told.append(("data", event.stream_id, bytes(event.data), ended))
            case their.StreamReset():
                kind = "reset" if event.remote_reset else "error"
                told.append((kind, event.stream_id, int(event.error_code or 0)))
            case their.PingAckReceived():
                told.append(("pong", event.ping_data))
            case their.ConnectionTerminated():
                debug = (event.additional_data or b"")[:128]
                code = int(event.error_code or 0)
                told.append(("goaway", event.last_stream_id, code, debug))
            case _:  # settings, pings and windows: seen in what is answered
                pass

    def send(self, made: list[tuple[int, int, int, bytes]], skip: set[int]) -> None:
        """Send what ours sent, resets of the streams in `skip` excepted.

        Raises what h2 raises where that may not be sent.
        """
        connection = self.connection
        for kind, flags, stream, payload in made:
            if kind == frames.WINDOW_UPDATE:
                self._widen(stream, int.from_bytes(payload, "big"))
            elif kind == frames.HEADERS or kind == frames.CONTINUATION:
                ends = bool(flags & frames.END_STREAM)
                before = b""
                if self._block is not None:
                    _, ends, before = self._block
                self._block = (stream, ends, before + payload)
                if flags & frames.END_HEADERS:
                    listed = self._ours.decode(self._block[2], raw=True)
                    self._block = None
                    connection.send_headers(stream, list(listed), end_stream=ends)
            elif kind == frames.DATA:
                ends = bool(flags & frames.END_STREAM)
                connection.send_data(stream, payload, end_stream=ends)
            elif kind == frames.RST_STREAM and stream not in skip:
                connection.reset_stream(stream, int.from_bytes(payload, "big"))
        connection.data_to_send()

    def _widen(self, stream: int, increment: int) -> None:
        made = self.connection
        if stream == 0 or (stream in made.streams and made.streams[stream].open):
            made.increment_flow_control_window(increment, stream or None)

    def forget(self, stream: int) -> None:
        """Reset a stream that ours has given up without a word."""
        if stream in self.connection.streams:
            self.connection.reset_stream(stream)
            self.connection.data_to_send()
