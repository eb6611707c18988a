"""SPIRE's Delegated Identity API: the calls we make, and what we believe of answers."""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import grpc

from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity import workload_api as wire
from ztserve.identity.agent.attestation import CannotTell
from ztserve.identity.bundle import MAX_TRUST_DOMAINS, TrustBundle
from ztserve.identity.feed import Stream
from ztserve.identity.jwt.svid import JwtSvid, verify_jwt_svid
from ztserve.identity.spiffe_id import SCHEME, SpiffeId, trust_domain_name, workload_id
from ztserve.identity.svid import Material, Svid, read_identity, read_roots
from ztserve.identity.v1 import delegated_identity_pb2 as messages

_LOG = logging.getLogger(__name__)

SERVICE = "spire.api.agent.delegatedidentity.v1.DelegatedIdentity"
SVIDS = "SubscribeToX509SVIDs"
X509_BUNDLES = "SubscribeToX509Bundles"
JWT_BUNDLES = "SubscribeToJWTBundles"
TOKENS = "FetchJWTSVIDs"

MAX_MESSAGE_BYTES = 4 * 1024 * 1024
ASK_S = 5.0
"""Longest wait for an answer."""


class Spire:
    """The agent behind the admin endpoint `socket`, as it answers a delegate."""

    def __init__(self, socket: str) -> None:
        self.socket = socket
        self._channel = grpc.insecure_channel(
            wire.grpc_target(socket),
            options=(
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.absolute_max_metadata_size", 16 * 1024),
                ("grpc.enable_http_proxy", 0),
                ("grpc.use_local_subchannel_pool", 1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1000),
            ),
        )

    def close(self) -> None:
        """End all streams."""
        self._channel.close()

    def svids(
        self, selectors: Sequence[messages.Selector]
    ) -> Stream[messages.SvidsResponse]:
        """Stream what a process with `selectors` is entitled to."""
        return self._channel.unary_stream(
            f"/{SERVICE}/{SVIDS}",
            request_serializer=messages.SvidsRequest.SerializeToString,
            response_deserializer=messages.SvidsResponse.FromString,
        )(messages.SvidsRequest(selectors=selectors))

    def bundles(self, method: str) -> Stream[messages.BundlesResponse]:
        """Stream the bundles of all trust domains; `method` says of which kind."""
        return self._channel.unary_stream(
            f"/{SERVICE}/{method}",
            request_serializer=messages.BundlesRequest.SerializeToString,
            response_deserializer=messages.BundlesResponse.FromString,
        )(messages.BundlesRequest())

    def token(
        self, subject: SpiffeId, audience: str, selectors: Sequence[messages.Selector]
    ) -> str:
        """Return the JWT-SVID of `subject` among those that `selectors` are given.

        It is not judged. Raises CannotTell where SPIRE does not answer, IdentityError
        where it sends none.
        """
        call = self._channel.unary_unary(
            f"/{SERVICE}/{TOKENS}",
            request_serializer=messages.TokensRequest.SerializeToString,
            response_deserializer=messages.TokensResponse.FromString,
        )
        request = messages.TokensRequest(audience=[audience], selectors=selectors)
        try:
            answer = call(request, timeout=ASK_S)
        except grpc.RpcError as error:
            code = error.code()
            denied = code is grpc.StatusCode.PERMISSION_DENIED
            raise (IdentityError if denied else CannotTell)(
                f"no JWT-SVID of {subject} from SPIRE at {self.socket}: {code.name}: "
                f"{str(error.details())[:300]}"
            ) from error
        for one in answer.svids:
            if _named(one.id) == subject:
                return str(one.token)
        raise IdentityError(f"SPIRE sent no JWT-SVID of {subject}")


def read_selectors(texts: frozenset[str]) -> list[messages.Selector]:
    """Return selectors as SPIRE has them: ``unix:uid:0`` is unix and uid:0."""
    parts = [text.partition(":") for text in sorted(texts)]
    return [messages.Selector(type=kind, value=value) for kind, _, value in parts]


def read_bundles(
    own: str, x509: Mapping[str, bytes], jwt: Mapping[str, bytes]
) -> Mapping[str, TrustBundle]:
    """Return the bundles of all trust domains, `own` among them, by name.

    `x509` holds concatenated DER, `jwt` JWK Sets. Raises IdentityError where our own
    cannot be believed, or there are over 64; a partner's is left out and logged.
    """
    if max(len(x509), len(jwt)) > MAX_TRUST_DOMAINS:
        raise IdentityError(f"bundles of over {MAX_TRUST_DOMAINS} trust domains")
    for sent in (x509, jwt):
        if sent and not sent.keys() & {own, SCHEME + own}:
            raise IdentityError(f"SPIRE sent no bundle of {own}")
    found = {}
    for name in {**x509, **jwt}:
        trust_domain = name.removeprefix(SCHEME)
        try:
            trust_domain_name(trust_domain)
            found[trust_domain] = TrustBundle(
                trust_domain,
                read_roots(trust_domain, x509[name]) if name in x509 else (),
                TrustBundle.parse(jwt[name], trust_domain).jwt_authorities
                if name in jwt
                else {},
            )
        except IdentityError as error:
            # A partner's mistake takes its own trust domain away alone.
            if trust_domain == own:
                raise
            _LOG.error("%s; nobody of %s is believed", error, trust_domain)
    return found


def read_svid(
    sent: messages.SvidWithKey, bundle: TrustBundle, *, now: datetime
) -> Svid:
    """Return an SVID as any peer would believe it now. Raises IdentityError."""
    spiffe_id = _named(sent.svid.id)
    if spiffe_id.trust_domain != bundle.trust_domain:
        raise IdentityError(f"SPIRE sent an SVID of {spiffe_id}, of another domain")
    material = Material(
        spiffe_id,
        chain=b"".join(sent.svid.certificates),
        key=sent.key,
        bundle=b"".join(bundle.x509_authorities),
    )
    return read_identity(material, now=now).svid


def read_token(
    token: str, subject: SpiffeId, audience: str, bundle: TrustBundle, *, now: datetime
) -> JwtSvid:
    """Return a JWT-SVID as `audience` would believe it now. Raises IdentityError."""
    keys = {bundle.trust_domain: bundle.jwt_authorities}
    try:
        svid = verify_jwt_svid(token, keys, audience=audience, now=now)
    except Unauthenticated as error:
        raise IdentityError(f"from SPIRE: {error.reason}") from error
    if svid.id != subject:
        raise IdentityError(f"the JWT-SVID of {subject} is that of {svid.id}")
    return svid


def _named(sent: Any) -> SpiffeId:
    return workload_id(f"{SCHEME}{sent.trust_domain}{sent.path}")
