"""Our own JWT-SVIDs, and the keys to judge others' by, over the SPIFFE Workload API."""

import logging
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Self, TypeAlias

import grpc

from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import workload_api as wire
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.feed import Feed, Stream
from ztserve.identity.jwk import PublicKey
from ztserve.identity.jwt.svid import JwtSvid, verify_jwt_svid
from ztserve.identity.spiffe_id import SCHEME, SpiffeId, trust_domain_name
from ztserve.identity.workload import MAX_MESSAGE_BYTES

_LOG = logging.getLogger(__name__)

Authorities: TypeAlias = Mapping[str, Mapping[str, PublicKey]]
"""JWT authorities by trust domain and key ID."""

MAX_AUDIENCES = 256
ASK_S = 5.0
"""For one call to the agent."""


class JwtSource:
    """JWT-SVIDs of `spiffe_id` from the agent behind `socket`.

    A token is asked for once an audience and again at half of its life; it is believed
    only if it verifies. A daemon thread follows the bundles: what the agent no longer
    sends is believed no more, and nothing is where it says that we are entitled to
    none (Workload API, 6.2.2). An agent that is away changes nothing.

    Raises IdentityError where no bundle came within `timeout_s`.
    """

    def __init__(
        self,
        socket: str,
        *,
        spiffe_id: SpiffeId,
        timeout_s: float = 30.0,
        clock: Callable[[], datetime] = types.now,
    ) -> None:
        self._spiffe_id = spiffe_id
        self._clock = clock
        self._channel = grpc.insecure_channel(
            wire.grpc_target(socket),
            options=(
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.enable_http_proxy", 0),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ),
        )
        self._held: dict[str, tuple[JwtSvid, datetime]] = {}
        self._authorities: Authorities = {}
        self._taken = threading.Event()
        self._lock = threading.Lock()
        self._feed = Feed(
            self._bundles,
            take=self._take,
            denied=self._deny,
            name="ztserve-jwt-bundles",
        )
        self._feed.start()
        if not self._taken.wait(timeout_s):
            self.close()
            raise IdentityError(
                f"no JWT bundles from the SPIFFE agent at {socket} within "
                f"{timeout_s:g} s: {self._feed.problem}"
            )

    def authorities(self) -> Authorities:
        """Return whose tokens may be believed now; the same object until it changes."""
        return self._authorities

    def fetch(self, audience: str) -> JwtSvid:
        """Return a token of ours for `audience` alone. Raises IdentityError."""
        held = self._held.get(audience)
        if held is not None and self._clock() < held[1]:
            return held[0]
        with self._lock:
            held = self._held.get(audience)
            if held is None or self._clock() >= held[1]:
                svid = self._asked(audience)
                now = self._clock()
                if len(self._held) >= MAX_AUDIENCES:
                    self._held.clear()
                held = svid, now + (svid.expires_at - now) / 2
                self._held[audience] = held
        return held[0]

    def is_held(self, audience: str) -> bool:
        """Return whether `fetch` would return at once."""
        held = self._held.get(audience)
        return held is not None and self._clock() < held[1]

    def close(self) -> None:
        """Follow no more, and forget the tokens. May be called again."""
        self._feed.close()
        self._channel.close()
        self._held.clear()
        self._authorities = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _asked(self, audience: str) -> JwtSvid:
        call = self._channel.unary_unary(
            f"/{wire.SERVICE}/{wire.FETCH_JWT_SVID}",
            request_serializer=wire.JWTSVIDRequest.SerializeToString,
            response_deserializer=wire.JWTSVIDResponse.FromString,
        )
        request = wire.JWTSVIDRequest(audience=[audience], spiffe_id=self._spiffe_id)
        try:
            answer = call(request, timeout=ASK_S, metadata=(wire.HEADER,))
        except grpc.RpcError as error:
            raise IdentityError(
                f"no JWT-SVID for {audience} from the agent: {error.code().name}: "
                f"{str(error.details())[:300]}"
            ) from error
        except ValueError as error:  # what gRPC says of a closed channel
            raise IdentityError("this source of JWT-SVIDs is closed") from error
        for one in answer.svids:
            if one.spiffe_id == self._spiffe_id:
                return self._verified(one.svid, audience)
        raise IdentityError(f"the agent sent no JWT-SVID of {self._spiffe_id}")

    def _verified(self, token: str, audience: str) -> JwtSvid:
        try:
            svid = verify_jwt_svid(
                token, self._authorities, audience=audience, now=self._clock()
            )
        except Unauthenticated as error:
            raise IdentityError(f"our own {error.reason}") from error
        if svid.id != self._spiffe_id:
            raise IdentityError(
                f"the JWT-SVID of {self._spiffe_id} is that of {svid.id}"
            )
        return svid

    # --- the following thread ---------------------------------------------------

    def _bundles(self) -> Stream[wire.JWTBundlesResponse]:
        return self._channel.unary_stream(
            f"/{wire.SERVICE}/{wire.FETCH_JWT_BUNDLES}",
            request_serializer=wire.JWTBundlesRequest.SerializeToString,
            response_deserializer=wire.JWTBundlesResponse.FromString,
        )(wire.JWTBundlesRequest(), metadata=(wire.HEADER,))

    def _take(self, answer: wire.JWTBundlesResponse) -> None:
        self._authorities = self._read(answer.bundles)
        self._taken.set()

    def _deny(self, _problem: str) -> None:
        self._authorities = {}
        self._held.clear()

    def _read(self, bundles: Mapping[str, bytes]) -> Authorities:
        found = {}
        for name, jwks in bundles.items():
            trust_domain = trust_domain_name(name.removeprefix(SCHEME))
            try:
                bundle = TrustBundle.parse(jwks, trust_domain)
            except IdentityError as error:
                # A partner's mistake takes its own trust domain away alone.
                if trust_domain == self._spiffe_id.trust_domain:
                    raise
                _LOG.error("%s; no JWT-SVID of %s is believed", error, trust_domain)
            else:
                found[trust_domain] = bundle.jwt_authorities
        return found
