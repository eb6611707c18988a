"""TLS and HTTP/2 over one socket: what a server's and a client's end have in common."""

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from ztserve.errors import CallError
from ztserve.transport.contexts import HandshakeRefused
from ztserve.transport.http2 import Bounds, Connection, Event

if TYPE_CHECKING:
    from ztserve.transport.tls import Session

_LOG = logging.getLogger(__name__)

NEVER = float("inf")
MAX_WAITING_BYTES = 1 << 20
"""Sent, and not taken by the peer: then nothing more of it is read."""
WRITE_BYTES = 64 * 1024
"""At a time: of a large body, TLS and the socket then hold no second copy."""
CLOSE_S = 1.0
QUIET_S, ANSWER_S = 60.0, 20.0
"""A connection that says nothing for so long is asked for a sign of life; and how long
that may take."""
_ASKED = b"ztserve?"


class Carrier(asyncio.Protocol, ABC):
    """The protocol of one connection; what it means is told to the class below."""

    def __init__(
        self, soon: Callable[..., object], bounds: Bounds, *, client: bool
    ) -> None:
        self._soon = soon
        self._bounds = bounds
        self._client = client
        self._transport: asyncio.Transport
        self._session: Session
        self._http2: Connection | None = None
        self._flushing = self._asked = False
        self._closing = False
        self._leaving = False
        """Whether to close once the last stream has ended."""
        self._heard = time.monotonic()
        self._expires = NEVER
        """When to close, whatever happens."""

    # --- what the class below does ----------------------------------------------

    @abstractmethod
    def _refused(self, refused: HandshakeRefused) -> None:
        """Learn that the handshake failed."""

    @abstractmethod
    def _begun(self) -> None:
        """Learn that the handshake is done."""

    @abstractmethod
    def _take(self, events: list[Event]) -> None:
        """Take what HTTP/2 makes of what arrived."""

    # --- what asyncio tells -----------------------------------------------------

    def _connected(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(MAX_WAITING_BYTES)

    def data_received(self, data: bytes) -> None:
        """Take bytes from the wire."""
        if self._closing:
            return
        self._heard, self._asked = time.monotonic(), False
        try:
            self._session.receive(data)
            if not self._session.established:
                self._transport.write(self._session.outgoing())
                return
            if self._http2 is None:
                self._http2 = Connection(client=self._client, bounds=self._bounds)
                self._expires = NEVER
                self._begun()
                self.flush()
            plain = self._session.read()
        except HandshakeRefused as refused:
            self._refused(refused)
            self._transport.write(self._session.outgoing())
            self._close()
            return
        if plain:
            self._take(self._http2.receive(plain))
            self.flush()
        if self._session.ended:  # what came before it has been taken
            self._close()

    def eof_received(self) -> bool:
        """Close: a peer that stops sending is taken to have gone."""
        return False

    # --- writing and closing ----------------------------------------------------

    def flush(self) -> None:
        """Write all that is to be sent, once in this turn of the loop."""
        if not self._flushing:
            self._flushing = True
            self._soon(self._write)

    def abort(self) -> None:
        """Close now."""
        self._transport.abort()

    def _write(self) -> None:
        self._flushing = False
        if self._http2 is None or self._transport.is_closing():
            return
        for block in self._http2.blocks(WRITE_BYTES):
            self._transport.write(self._session.write(block))
        if self._http2.over or (self._leaving and not self._http2.open_streams):
            self._close()

    def _close(self) -> None:
        self._closing = True
        if not self._transport.is_closing():
            self._transport.write(self._session.close())
            self._transport.close()
            self._expires = time.monotonic() + CLOSE_S

    def _ask(self, http2: Connection, quiet_s: float) -> None:
        """See whether a peer that says nothing is still there."""
        if quiet_s > QUIET_S + ANSWER_S:
            self._transport.abort()
        elif quiet_s > QUIET_S and not self._asked:
            self._asked = True
            http2.ping(_ASKED)
            self.flush()


def guarded(action: Callable[..., Any], *arguments: Any) -> None:
    """Do something on the loop; a fault of one call ends no other."""
    try:
        action(*arguments)
    except CallError as error:
        _LOG.warning("a call could not be carried: %s", error)
    except Exception:  # noqa: BLE001
        _LOG.exception("a call could not be carried")
