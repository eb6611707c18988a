"""Verification of the other end's certificates: the only maker of Peer.

Pure: certificates, trust bundles and the time come in, a Peer comes out or
Unauthenticated is raised. The rules are those of the X509-SVID standard (sections 4-5)
and RFC 5280; the chain itself is built by `cryptography`'s verifier, which leaves
most of SPIFFE's leaf rules to us.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity.spiffe_id import SpiffeId, trust_domain_name, workload_id
from ztserve.types import Peer

Moment: TypeAlias = datetime | float
"""A point in time: an aware datetime, or seconds since the epoch (UTC)."""

MAX_CERTIFICATES = 8
MAX_CHAIN_BYTES = 64 * 1024
MAX_ROOTS = 64
PUBLIC = "the peer's identity could not be verified"

_CURVES = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_MIN_RSA_BITS = 2048
_Policies: TypeAlias = Callable[[str], PolicyBuilder | None]


@dataclass(frozen=True, slots=True)
class _Verified:
    """A peer whose path holds, and when all of its certificates are valid."""

    peer: Peer
    not_before: float
    not_after: float

    def at(self, seconds: float) -> Peer:
        if seconds > self.not_after:
            raise _refused(f"{self.peer.id}: expired at {self.peer.not_after}")
        if seconds < self.not_before:
            raise _refused(f"{self.peer.id}: not valid until {self.peer.not_before}")
        return self.peer


def verify_peer(
    chain_der: Sequence[bytes],
    bundles: Mapping[str, Sequence[bytes]],
    *,
    now: Moment,
) -> Peer:
    """Return the Peer that `chain_der` (DER, leaf first) proves at the time `now`.

    `bundles` maps a trust domain's name to its roots (DER). In this order:

    1. The chain has 1 to 8 certificates in at most 64 KiB, and all parse.
    2. The leaf has exactly one URI name, a workload's SPIFFE ID (X509-SVID 2, 5.2).
    3. The leaf is not a CA; its key usage is there, critical, has digitalSignature and
       neither keyCertSign nor cRLSign (4.1, 4.3); an extended key usage, if there,
       has both serverAuth and clientAuth (4.4).
    4. The ID's own trust domain has a bundle. Only its roots count: a federated
       authority can never vouch for an ID of another trust domain (5.2).
    5. RFC 5280 path validation to one of these roots succeeds at `now`; it also
       refuses an empty subject beside a SubjectAltName that is not critical (4.2.1.6).
    6. Certificates that sign have no SPIFFE ID with a path (4.1).
    7. Every key of the path is EC P-256, P-384, P-521 or RSA of 2048 bits and more.
    8. Every certificate of the path, the root included, is valid at `now`.

    Raises Unauthenticated, whatever the bytes are.
    """

    def policy(trust_domain: str) -> PolicyBuilder | None:
        roots = bundles.get(trust_domain)
        return None if roots is None else _policy(trust_domain, roots)

    seconds = _seconds(now)
    return _verify(chain_der, policy, seconds).at(seconds)


class PeerVerifier:
    """`verify_peer` for one state of the bundles, remembering whom it has verified.

    Only what cannot change is remembered (by the chain's very bytes); validity in time
    is judged at each call. Make a new one when the bundles change: that forgets all.
    Thread-safe. Raises IdentityError where a bundle is empty or not of certificates.
    """

    def __init__(
        self, bundles: Mapping[str, Sequence[bytes]], *, capacity: int = 1024
    ) -> None:
        self._policies = {
            trust_domain_name(name): _policy(name, roots)
            for name, roots in bundles.items()
        }
        self._capacity = capacity
        self._known: OrderedDict[tuple[bytes, ...], _Verified] = OrderedDict()
        self._lock = threading.Lock()

    def verify(self, chain_der: Sequence[bytes], *, now: Moment | None = None) -> Peer:
        """Return the Peer that `chain_der` proves; by default, at this moment.

        Raises Unauthenticated as `verify_peer` does.
        """
        seconds = _seconds(types.now() if now is None else now)
        chain = tuple(chain_der)
        with self._lock:
            verified = self._known.get(chain)
            if verified is not None:
                self._known.move_to_end(chain)
        if verified is None:
            verified = _verify(chain, self._policies.get, seconds)
            self._remember(chain, verified)
        return verified.at(seconds)

    def _remember(self, chain: tuple[bytes, ...], verified: _Verified) -> None:
        with self._lock:
            self._known[chain] = verified
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)


def _refused(reason: str) -> Unauthenticated:
    return Unauthenticated(PUBLIC, reason)


def _require(fact: object, reason: str) -> None:
    if not fact:
        raise _refused(reason)


def _seconds(moment: Moment) -> float:
    if not isinstance(moment, datetime):
        return float(moment)
    if moment.tzinfo is None:
        raise ValueError("now: a naive datetime names no moment; give it a time zone")
    return moment.timestamp()


def _verify(chain_der: Sequence[bytes], policies: _Policies, at: float) -> _Verified:
    try:
        return _walk(chain_der, policies, at)
    except Unauthenticated:
        raise
    except VerificationError as error:
        raise _refused(f"no valid path to the trust domain's roots: {error}") from error
    except IdentityError as error:
        raise _refused(str(error)) from error
    except Exception as error:
        # Parsers raise many kinds of error on hostile bytes; each means the same.
        raise _refused(f"malformed certificate: {error!r:.200}") from error


def _walk(chain_der: Sequence[bytes], policies: _Policies, at: float) -> _Verified:
    leaf, *intermediates = _parse(chain_der)  # step 1
    spiffe_id = leaf_id(leaf)  # step 2
    _check_leaf_usage(spiffe_id, leaf)  # step 3
    policy = policies(spiffe_id.trust_domain)  # step 4
    if policy is None:
        raise _refused(f"{spiffe_id}: no trust bundle for {spiffe_id.trust_domain}")
    moment = datetime.fromtimestamp(at, UTC)
    verifier = policy.time(moment).build_client_verifier()
    path = verifier.verify(leaf, intermediates).chain  # step 5
    for signer in path[1:]:
        _check_signer(spiffe_id, signer)  # step 6
    for certificate in path:
        _check_key(spiffe_id, certificate)  # step 7
    return _verified(spiffe_id, leaf, path, chain_der)  # step 8 is `at`


def _parse(chain_der: Sequence[bytes]) -> list[x509.Certificate]:
    _require(chain_der, "no certificate")
    _require(
        len(chain_der) <= MAX_CERTIFICATES,
        f"{len(chain_der)} certificates, at most {MAX_CERTIFICATES} are allowed",
    )
    size = sum(map(len, chain_der))
    _require(
        size <= MAX_CHAIN_BYTES,
        f"{size} bytes of certificates, at most {MAX_CHAIN_BYTES} are allowed",
    )
    return [x509.load_der_x509_certificate(der) for der in chain_der]


def leaf_id(leaf: x509.Certificate) -> SpiffeId:
    """Return the one SPIFFE ID of `leaf`; Unauthenticated or IdentityError if none."""
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound as error:
        raise _refused("the certificate has no SPIFFE ID") from error
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    _require(len(uris) == 1, f"{len(uris)} URI names, exactly one is allowed")
    return workload_id(uris[0])


def _check_leaf_usage(who: SpiffeId, leaf: x509.Certificate) -> None:
    extensions = {extension.oid: extension for extension in leaf.extensions}
    constraints = extensions.get(x509.BasicConstraints.oid)
    _require(constraints is None or not constraints.value.ca, f"{who}: leaf is a CA")
    usage = extensions.get(x509.KeyUsage.oid)
    if usage is None:
        raise _refused(f"{who}: no key usage")
    _require(usage.critical, f"{who}: key usage is not critical")
    _require(usage.value.digital_signature, f"{who}: digitalSignature is not set")
    _require(not usage.value.key_cert_sign, f"{who}: leaf has keyCertSign")
    _require(not usage.value.crl_sign, f"{who}: leaf has cRLSign")
    extended = extensions.get(x509.ExtendedKeyUsage.oid)
    if extended is not None:
        both = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
        _require(
            both <= set(extended.value),
            f"{who}: extended key usage lacks serverAuth or clientAuth",
        )


def _check_signer(who: SpiffeId, signer: x509.Certificate) -> None:
    try:
        names = signer.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return
    for uri in names.value.get_values_for_type(x509.UniformResourceIdentifier):
        _require(
            not SpiffeId.parse(uri).path,
            f"{who}: signed by {uri}, a workload and not a trust domain",
        )


def _check_key(who: SpiffeId, certificate: x509.Certificate) -> None:
    key = certificate.public_key()
    _require(
        (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES))
        or (isinstance(key, rsa.RSAPublicKey) and key.key_size >= _MIN_RSA_BITS),
        f"{who}: key below the floor (EC P-256 or RSA {_MIN_RSA_BITS})",
    )


def _verified(
    spiffe_id: SpiffeId,
    leaf: x509.Certificate,
    path: Sequence[x509.Certificate],
    chain_der: Sequence[bytes],
) -> _Verified:
    not_before = max(certificate.not_valid_before_utc for certificate in path)
    not_after = min(certificate.not_valid_after_utc for certificate in path)
    peer = Peer(
        id=spiffe_id,
        serial=leaf.serial_number,
        not_after=not_after,
        not_before=not_before,
        chain_sha256=sha256(b"".join(chain_der)).hexdigest(),
    )
    return _Verified(peer, not_before.timestamp(), not_after.timestamp())


def _policy(name: str, roots: Sequence[bytes]) -> PolicyBuilder:
    if not 0 < len(roots) <= MAX_ROOTS:
        raise IdentityError(
            f"trust bundle of {name}: {len(roots)} roots, expected 1 to {MAX_ROOTS}"
        )
    try:
        store = Store([x509.load_der_x509_certificate(der) for der in roots])
    except ValueError as error:
        raise IdentityError(f"trust bundle of {name}: {error}") from error
    return PolicyBuilder().store(store)
