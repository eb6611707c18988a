"""A SPIFFE agent for tests, honest or hostile as they say."""

import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Self, TypeAlias

import grpc

from ztserve.identity import Svid
from ztserve.identity import workload_api as wire
from ztserve.testing.authority import ThrowAwayAuthority

Answer: TypeAlias = "wire.X509SVIDResponse | grpc.StatusCode | bytes | None"
"""A response; the status that ends the stream; bytes that are no message; silence."""

OVERSIZE_BYTES = 5 * 1024 * 1024


class HostileAgent:
    """A Workload API on the unix socket `path` that says what a test wants.

    Each stream is sent `answer` at once and whenever it changes, after `delay_s`
    seconds: at first a good SVID of `spiffe_id`, issued by `authority`. `grant` sends
    another one, `withdraw` says that there is none any more, `lie` sends one of `lies`,
    `silence` nothing. `kill` ends it as SIGKILL would, and leaves the socket's file;
    `remake` puts a new socket into the place of the old one, whose connections stay
    open and hear nothing more.
    """

    def __init__(
        self,
        path: Path,
        authority: ThrowAwayAuthority,
        spiffe_id: str,
        *,
        ttl_s: float = 3600.0,
        tcp: bool = False,
    ) -> None:
        self.path = path
        self.socket = f"unix://{path}"
        self.port = 0
        """With `tcp`: where else it listens, on 127.0.0.1."""
        self.delay_s = 0.0
        self.streams = 0
        """How many there were so far."""
        self.requests: list[Mapping[str, str | bytes]] = []
        """The metadata of each."""
        self._authority, self._id, self._ttl_s = authority, spiffe_id, ttl_s
        self._tcp = tcp
        self._changed = threading.Condition()
        self._turn = 0
        self._answer: Answer = None
        self._server: grpc.Server | None = None
        self._orphans: list[grpc.Server] = []
        self.grant()

    # --- what it says -----------------------------------------------------------

    @property
    def answer(self) -> Answer:
        """What each stream is told now."""
        return self._answer

    @answer.setter
    def answer(self, answer: Answer) -> None:
        with self._changed:
            self._answer = answer
            self._turn += 1
            self._changed.notify_all()

    def grant(self, *, federated: Mapping[str, bytes] | None = None) -> Svid:
        """Send a new good SVID, and return it."""
        svid = self._authority.issue(self._id, ttl_s=self._ttl_s)
        self.answer = self.response(svid, federated=federated)
        return svid

    def withdraw(self) -> None:
        """Say that the workload is entitled to nothing (PERMISSION_DENIED)."""
        self.answer = grpc.StatusCode.PERMISSION_DENIED

    def silence(self) -> None:
        """Say nothing more, and keep the streams open."""
        self.answer = None

    def lie(self, name: str) -> None:
        """Send what `lies` has under `name`."""
        self.answer = self.lies[name]()

    def response(
        self,
        svid: Svid,
        *,
        spiffe_id: str | None = None,
        key: bytes | None = None,
        bundle: bytes | None = None,
        federated: Mapping[str, bytes] | None = None,
        padding: int = 0,
    ) -> wire.X509SVIDResponse:
        """Return the message with one SVID, whole or with a part of another's."""
        return wire.X509SVIDResponse(
            svids=[
                wire.X509SVID(
                    spiffe_id=svid.id if spiffe_id is None else spiffe_id,
                    x509_svid=b"".join(svid.chain_der),
                    x509_svid_key=svid.key_der() if key is None else key,
                    bundle=b"".join(self._authority.bundle)
                    if bundle is None
                    else bundle,
                )
            ],
            federated_bundles=dict(federated or {}),
            crl=[bytes(padding)] if padding else [],
        )

    @property
    def lies(self) -> Mapping[str, Callable[[], Answer]]:
        """What it may send that no workload may believe, by name."""
        authority, me = self._authority, self._id
        other = f"spiffe://{authority.trust_domain}/ns/other/sa/other"
        foreign = ThrowAwayAuthority(authority.trust_domain)
        root = authority.bundle[0]

        def made(svid: Svid, **parts: str | bytes) -> Callable[[], Answer]:
            return lambda: self.response(svid, **parts)  # type: ignore[arg-type]

        mine = authority.issue(me)
        many = {f"spiffe://d{n}.example": root for n in range(1000)}
        return {
            "an SVID of another authority": made(foreign.issue(me)),
            "no roots": made(mine, bundle=b""),
            "roots cut short": made(mine, bundle=root[:-1]),
            "another's SVID": made(authority.issue(other)),
            "another's SVID as mine": made(authority.issue(other), spiffe_id=me),
            "another's key": made(mine, key=authority.issue(me).key_der()),
            "no key": made(mine, key=b""),
            "expired": made(authority.forge(me, starts_s=-60, ends_s=-10)),
            "not yet valid": made(authority.forge(me, starts_s=600)),
            "a signing certificate": made(authority.forge(me, ca=True)),
            "two names": made(authority.forge(me, uris=[me, other])),
            "an ID with a newline": made(mine, spiffe_id=me + "\n"),
            "our own domain as a federated one": lambda: self.response(
                mine, federated={f"spiffe://{authority.trust_domain}": root}
            ),
            "1000 bundles": lambda: self.response(mine, federated=many),
            "nothing": wire.X509SVIDResponse,
            "too much": lambda: self.response(mine, padding=OVERSIZE_BYTES),
            "garbage": lambda: b"\xff" * 64,
        }

    # --- when it lives ----------------------------------------------------------

    def start(self) -> Self:
        """Listen, in the place of whatever socket is there; return self."""
        self._server = server = grpc.server(
            futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)]
        )
        method = grpc.unary_stream_rpc_method_handler(
            self._stream, wire.X509SVIDRequest.FromString, _encoded
        )
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(
                    wire.SERVICE, {wire.FETCH_SVID: method}
                ),
            )
        )
        self.path.unlink(missing_ok=True)
        server.add_insecure_port(self.socket)
        if self._tcp:
            self.port = server.add_insecure_port(f"127.0.0.1:{self.port}")
        server.start()
        return self

    def stop(self) -> None:
        """Close all connections and remove the socket. May be called again."""
        orphans, self._orphans = self._orphans, []
        for server in (self._server, *orphans):
            if server is not None:
                server.stop(0).wait()
        self._server = None

    def kill(self) -> None:
        """Close all connections, and leave a socket at which nobody listens."""
        self.stop()
        self.path.unlink(missing_ok=True)
        with sockets.socket(sockets.AF_UNIX) as dead:
            dead.bind(str(self.path))

    def remake(self) -> None:
        """Remove the socket and listen on a new one; the old streams stay, silent."""
        if self._server is not None:
            self._orphans.append(self._server)
        self.path.unlink(missing_ok=True)
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _stream(
        self, _: wire.X509SVIDRequest, context: grpc.ServicerContext
    ) -> Iterator["wire.X509SVIDResponse | bytes"]:
        self.streams += 1
        self.requests.append(dict(context.invocation_metadata()))
        server, told = self._server, -1
        while context.is_active():
            with self._changed:
                if self._turn == told or self._server is not server:
                    self._changed.wait(0.05)
                    continue
                told, answer = self._turn, self._answer
            if self.delay_s:
                time.sleep(self.delay_s)
            if isinstance(answer, grpc.StatusCode):
                context.abort(answer, "as the test wants")
            if answer is not None:
                yield answer


def _encoded(answer: "wire.X509SVIDResponse | bytes") -> bytes:
    return answer if isinstance(answer, bytes) else answer.SerializeToString()
