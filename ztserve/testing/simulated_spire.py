"""SPIRE's agent as a delegate sees it, for tests."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import grpc

from ztserve.identity import SpiffeId, Svid, TrustBundle
from ztserve.identity.agent import spire
from ztserve.identity.spiffe_id import SCHEME
from ztserve.identity.v1 import delegated_identity_pb2 as messages
from ztserve.testing.authority import ThrowAwayAuthority

Lie: TypeAlias = Callable[[messages.SvidsResponse], messages.SvidsResponse]
_Context: TypeAlias = grpc.ServicerContext


@dataclass
class _Entry:
    spiffe_id: SpiffeId
    selectors: frozenset[str]
    hint: str
    federates_with: tuple[str, ...]
    svid: Svid


class SimulatedSpire:
    """SPIRE's Delegated Identity API on the unix socket `path`.

    It keeps to what SPIRE 1.12's own does (pkg/agent/api/delegatedidentity): one SVID
    and key for each entry, handed to whoever has all the entry's selectors; an empty
    answer where there is none; bundles keyed by ``spiffe://<trust domain>``;
    PERMISSION_DENIED while `authorized` is false. Unlike SPIRE it believes any caller.
    What it sends goes through `lie`.
    """

    def __init__(
        self, path: Path, authority: ThrowAwayAuthority, *, ttl_s: float = 3600.0
    ) -> None:
        self.path = path
        self.socket = f"unix://{path}"
        self.asked: list[frozenset[str]] = []
        """The selectors of each stream of SVIDs so far."""
        self._authority, self._ttl_s = authority, ttl_s
        self._entries: dict[SpiffeId, _Entry] = {}
        self._foreign: dict[str, TrustBundle] = {}
        self._authorized = True
        self._lie: Lie = lambda answer: answer
        self._changed = threading.Condition()
        self._turn = 0
        self._server: grpc.Server | None = None
        self._unsubscribe = authority.subscribe(self._notify)

    # --- what a test may do -----------------------------------------------------

    def add(
        self,
        spiffe_id: str,
        *selectors: str,
        hint: str = "",
        federates_with: Sequence[str] = (),
    ) -> Svid:
        """Register an entry, or replace that of the same ID; return its SVID."""
        name = SpiffeId.parse(spiffe_id)
        svid = self._authority.issue(name, ttl_s=self._ttl_s)
        self._entries[name] = _Entry(
            name, frozenset(selectors), hint, tuple(federates_with), svid
        )
        self._notify()
        return svid

    def remove(self, spiffe_id: str) -> None:
        """Delete an entry."""
        del self._entries[SpiffeId.parse(spiffe_id)]
        self._notify()

    def rotate(self) -> None:
        """Issue all SVIDs anew."""
        for entry in self._entries.values():
            entry.svid = self._authority.issue(entry.spiffe_id, ttl_s=self._ttl_s)
        self._notify()

    def federate(self, bundle: TrustBundle) -> None:
        """Send the bundle of another trust domain as well."""
        self._foreign[bundle.trust_domain] = bundle
        self._notify()

    @property
    def authorized(self) -> bool:
        """Whether the caller is a delegate."""
        return self._authorized

    @authorized.setter
    def authorized(self, authorized: bool) -> None:
        self._authorized = authorized
        self._notify()

    @property
    def lie(self) -> Lie:
        """What is done to each answer with SVIDs before it is sent."""
        return self._lie

    @lie.setter
    def lie(self, lie: Lie) -> None:
        self._lie = lie
        self._notify()

    def start(self) -> Self:
        """Listen, in the place of whatever socket is there; return self."""
        self._server = server = grpc.server(
            futures.ThreadPoolExecutor(64), options=[("grpc.so_reuseport", 0)]
        )
        server.add_generic_rpc_handlers((self._handler(),))
        self.path.unlink(missing_ok=True)
        server.add_insecure_port(self.socket)
        server.start()
        return self

    def stop(self) -> None:
        """Close all connections and the socket. May be called again."""
        server, self._server = self._server, None
        if server is not None:
            server.stop(0).wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self._unsubscribe()
        self.stop()

    # --- what it answers --------------------------------------------------------

    def _handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        streams = (
            (spire.SVIDS, self._svids, messages.SvidsRequest),
            (spire.X509_BUNDLES, self._x509_bundles, messages.BundlesRequest),
            (spire.JWT_BUNDLES, self._jwt_bundles, messages.BundlesRequest),
        )
        handlers: dict[str, Any] = {
            name: grpc.unary_stream_rpc_method_handler(
                answer, request.FromString, _serialized
            )
            for name, answer, request in streams
        }
        handlers[spire.TOKENS] = grpc.unary_unary_rpc_method_handler(
            self._tokens, messages.TokensRequest.FromString, _serialized
        )
        return grpc.method_handlers_generic_handler(spire.SERVICE, handlers)

    def _svids(
        self, request: messages.SvidsRequest, context: _Context
    ) -> Iterator[messages.SvidsResponse]:
        selectors = _texts(request.selectors)
        self.asked.append(selectors)
        for _ in self._turns(context):
            matching = self._matching(selectors)
            yield self._lie(
                messages.SvidsResponse(
                    svids=[_with_key(entry) for entry in matching],
                    federates_with=sorted(
                        {
                            SCHEME + name
                            for entry in matching
                            for name in entry.federates_with
                            if name in self._foreign
                        }
                    ),
                )
            )

    def _x509_bundles(
        self, _: messages.BundlesRequest, context: _Context
    ) -> Iterator[messages.BundlesResponse]:
        for _turn in self._turns(context):
            yield messages.BundlesResponse(
                bundles={
                    SCHEME + one.trust_domain: b"".join(one.x509_authorities)
                    for one in self._bundles()
                }
            )

    def _jwt_bundles(
        self, _: messages.BundlesRequest, context: _Context
    ) -> Iterator[messages.BundlesResponse]:
        for _turn in self._turns(context):
            yield messages.BundlesResponse(
                bundles={
                    SCHEME + one.trust_domain: TrustBundle(
                        one.trust_domain, (), one.jwt_authorities
                    ).jwks()
                    for one in self._bundles()
                }
            )

    def _tokens(
        self, request: messages.TokensRequest, context: _Context
    ) -> messages.TokensResponse:
        self._check(context)
        matching = self._matching(_texts(request.selectors))
        if not matching:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        issue = self._authority.issue_jwt
        return messages.TokensResponse(
            svids=[
                messages.Token(token=issue(name, request.audience).token, id=_id(name))
                for name in (entry.spiffe_id for entry in matching)
            ]
        )

    def _bundles(self) -> tuple[TrustBundle, ...]:
        return (self._authority.trust_bundle(), *self._foreign.values())

    def _matching(self, selectors: frozenset[str]) -> list[_Entry]:
        return [e for e in self._entries.values() if e.selectors <= selectors]

    def _turns(self, context: _Context) -> Iterator[int]:
        server, told = self._server, -1
        while context.is_active() and self._server is server:
            with self._changed:
                if self._turn == told:
                    self._changed.wait(0.05)
                    continue
                told = self._turn
            self._check(context)
            yield told

    def _check(self, context: _Context) -> None:
        if not self._authorized:
            context.abort(
                grpc.StatusCode.PERMISSION_DENIED,
                "caller not configured as an authorized delegate",
            )

    def _notify(self) -> None:
        with self._changed:
            self._turn += 1
            self._changed.notify_all()


def _serialized(message: Any) -> bytes:
    return bytes(message.SerializeToString())


def _texts(selectors: Sequence[messages.Selector]) -> frozenset[str]:
    return frozenset(f"{one.type}:{one.value}" for one in selectors)


def _id(spiffe_id: SpiffeId) -> messages.Id:
    return messages.Id(trust_domain=spiffe_id.trust_domain, path=spiffe_id.path)


def _with_key(entry: _Entry) -> messages.SvidWithKey:
    return messages.SvidWithKey(
        svid=messages.Chain(
            certificates=entry.svid.chain_der,
            id=_id(entry.spiffe_id),
            expires_at=int(entry.svid.not_after.timestamp()),
            hint=entry.hint,
        ),
        key=entry.svid.key_der(),
    )
