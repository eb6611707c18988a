"""The five calls of the SPIFFE Workload API, as the embedded agent answers them.

Sections are those of the Workload API standard, W-numbers those of docs/. Each stream
sends all that the caller is entitled to: at once (4.3, W5), before half of an SVID's
life is over, and whenever entries, authority or federation change (`changed`). Who is
entitled to nothing any more is told so, and the stream ends (5.2.1, W8). The service
is not extended (2, W14): what it does not know, the WIT profile too, is UNIMPLEMENTED.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from operator import methodcaller
from typing import Any, Protocol

import grpc
from google.protobuf.struct_pb2 import Struct

from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import workload_api as wire
from ztserve.identity.agent.attestation import CannotTell, Process
from ztserve.identity.agent.callers import Callers
from ztserve.identity.agent.delegation import Delegation
from ztserve.identity.agent.registration import Grant
from ztserve.identity.authority.development import DEFAULT_TTL_S, Authority
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.jwt.svid import DEFAULT_LIFETIME_S, JwtSvid, verify_jwt_svid
from ztserve.identity.spiffe_id import SCHEME, workload_id

_serialized = methodcaller("SerializeToString")
MAX_AUDIENCES = 16
MAX_AUDIENCE_CHARACTERS = 1024


class FederatedBundles(Protocol):
    """The bundles of other trust domains, as they are now."""

    def bundles(self) -> Mapping[str, TrustBundle]:
        """Return them by trust domain."""

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each change; return how to end that."""


class WorkloadService:
    """Answers `callers` with what `authority` issues and the bundles of `federation`.

    SVIDs live `ttl_s` seconds unless an entry says otherwise.
    """

    def __init__(
        self,
        authority: Authority | Delegation,
        callers: Callers,
        *,
        federation: FederatedBundles | None = None,
        ttl_s: float = DEFAULT_TTL_S,
    ) -> None:
        self._authority = authority
        self._callers = callers
        self._federation = federation
        self._ttl_s = ttl_s

    def handler(self) -> "grpc.GenericRpcHandler[Any, Any]":
        """Return the service for a gRPC server."""
        streams = (
            (wire.FETCH_SVID, self._fetch_svids, wire.X509SVIDRequest),
            (wire.FETCH_BUNDLES, self._fetch_bundles, wire.X509BundlesRequest),
            (wire.FETCH_JWT_BUNDLES, self._fetch_jwt_bundles, wire.JWTBundlesRequest),
        )
        calls = (
            (wire.FETCH_JWT_SVID, self._fetch_jwt_svids, wire.JWTSVIDRequest),
            (wire.VALIDATE_JWT_SVID, self._validate, wire.ValidateJWTSVIDRequest),
        )
        return grpc.method_handlers_generic_handler(
            wire.SERVICE,
            {
                name: grpc.unary_stream_rpc_method_handler(
                    answer, request.FromString, _serialized
                )
                for name, answer, request in streams
            }
            | {
                name: grpc.unary_unary_rpc_method_handler(
                    answer, request.FromString, _serialized
                )
                for name, answer, request in calls
            },
        )

    # --- X.509-SVID profile (section 5) -----------------------------------------

    def _fetch_svids(
        self, _: wire.X509SVIDRequest, context: grpc.ServicerContext
    ) -> Iterator[wire.X509SVIDResponse]:
        for process, grants in self._callers.turns(context, self._ttl_s, svids=True):
            yield wire.X509SVIDResponse(
                svids=[
                    self._x509_svid(process, grant, hint, context)
                    for grant, hint in _hinted(grants)
                ],
                federated_bundles={
                    SCHEME + name: b"".join(bundle.x509_authorities)
                    for name, bundle in self._federated(grants).items()
                    if bundle.x509_authorities
                },
            )

    def _x509_svid(
        self,
        process: Process,
        grant: Grant,
        hint: str,
        context: grpc.ServicerContext,
    ) -> wire.X509SVID:
        ttl_s = grant.ttl_s or self._ttl_s
        try:
            if isinstance(self._authority, Delegation):
                svid = self._authority.svid(process, grant.spiffe_id)
            else:
                svid = self._authority.issue(grant.spiffe_id, ttl_s=ttl_s)
        except IdentityError as error:  # its intermediates live too short for this
            context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        self._callers.note_issue(process, grant, f"serial {svid.serial:x}", context)
        return wire.X509SVID(
            spiffe_id=svid.id,
            x509_svid=b"".join(svid.chain_der),
            x509_svid_key=svid.key_der(),
            bundle=b"".join(self._authority.bundle),  # as it is after the issue
            hint=hint,
        )

    def _fetch_bundles(
        self, _: wire.X509BundlesRequest, context: grpc.ServicerContext
    ) -> Iterator[wire.X509BundlesResponse]:
        for _process, grants in self._callers.turns(context, self._ttl_s):
            yield wire.X509BundlesResponse(
                bundles={
                    SCHEME + name: b"".join(bundle.x509_authorities)
                    for name, bundle in self._bundles(grants).items()
                    if bundle.x509_authorities
                }
            )

    # --- JWT-SVID profile (section 6) -------------------------------------------

    def _fetch_jwt_svids(
        self, request: wire.JWTSVIDRequest, context: grpc.ServicerContext
    ) -> wire.JWTSVIDResponse:
        process, grants = self._callers.entitled(context)
        audience = _audience(request.audience, context)
        if request.spiffe_id:
            try:
                wanted = workload_id(request.spiffe_id)
            except IdentityError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            grants = tuple(grant for grant in grants if grant.spiffe_id == wanted)
            if not grants:
                not_theirs = IdentityError(f"process {process.pid} is not {wanted}")
                self._callers.refuse(process, not_theirs, context)
        svids = []
        for grant, hint in _hinted(grants):
            try:
                svid = self._jwt_svid(process, grant, audience)
            except CannotTell as error:
                context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            except IdentityError as error:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            self._callers.note_issue(process, grant, f"JWT for {audience}", context)
            svids.append(
                wire.JWTSVID(spiffe_id=grant.spiffe_id, svid=svid.token, hint=hint)
            )
        return wire.JWTSVIDResponse(svids=svids)

    def _jwt_svid(
        self, process: Process, grant: Grant, audience: Sequence[str]
    ) -> JwtSvid:
        if isinstance(self._authority, Delegation):
            return self._authority.token(process, grant.spiffe_id, audience)
        ttl_s = min(DEFAULT_LIFETIME_S, grant.ttl_s or self._ttl_s)
        return self._authority.issue_jwt(grant.spiffe_id, audience, ttl_s=ttl_s)

    def _fetch_jwt_bundles(
        self, _: wire.JWTBundlesRequest, context: grpc.ServicerContext
    ) -> Iterator[wire.JWTBundlesResponse]:
        for _process, grants in self._callers.turns(context, self._ttl_s):
            yield wire.JWTBundlesResponse(
                bundles={
                    # Keys of another use have no business here (6.2.2).
                    SCHEME + name: replace(bundle, x509_authorities=()).jwks()
                    for name, bundle in self._bundles(grants).items()
                }
            )

    def _validate(
        self, request: wire.ValidateJWTSVIDRequest, context: grpc.ServicerContext
    ) -> wire.ValidateJWTSVIDResponse:
        _, grants = self._callers.entitled(context)
        if not request.svid:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "svid is missing")
        (audience,) = _audience([request.audience], context)
        keys = {
            name: bundle.jwt_authorities
            for name, bundle in self._bundles(grants).items()
        }
        try:
            svid = verify_jwt_svid(
                request.svid, keys, audience=audience, now=types.now()
            )
        except Unauthenticated as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.reason)
        claims = Struct()
        expiry = svid.expires_at.timestamp()
        claims.update({"sub": str(svid.id), "aud": [*svid.audience], "exp": expiry})
        return wire.ValidateJWTSVIDResponse(spiffe_id=svid.id, claims=claims)

    # --- trust bundles ---------------------------------------------------------

    def _bundles(self, grants: Iterable[Grant]) -> dict[str, TrustBundle]:
        own = self._authority.trust_bundle()
        return {**self._federated(grants), own.trust_domain: own}

    def _federated(self, grants: Iterable[Grant]) -> dict[str, TrustBundle]:
        if self._federation is None:
            return {}
        grants = tuple(grants)
        return {
            name: bundle
            for name, bundle in self._federation.bundles().items()
            if name != self._authority.trust_domain
            and any(
                grant.federates_with is None or name in grant.federates_with
                for grant in grants
            )
        }


def _hinted(grants: Iterable[Grant]) -> Iterator[tuple[Grant, str]]:
    """Yield each grant with its hint, or none where one before has it (5.2.1, W10)."""
    seen: set[str] = set()
    for grant in grants:
        yield grant, "" if grant.hint in seen else grant.hint
        seen.add(grant.hint)


def _audience(given: Sequence[str], context: grpc.ServicerContext) -> list[str]:
    """Return the audience that a request names, or end the call (6.2.1, W11)."""
    audience = list(given)
    if not audience or not all(
        0 < len(one) <= MAX_AUDIENCE_CHARACTERS for one in audience
    ):
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"audience: expected texts of 1 to {MAX_AUDIENCE_CHARACTERS} characters",
        )
    if len(audience) > MAX_AUDIENCES:
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"audience: {len(audience)} texts, at most {MAX_AUDIENCES} are allowed",
        )
    return audience
