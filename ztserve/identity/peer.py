"""Verification of the other end's certificates: the only maker of Peer.

Pure: certificates, trust bundles and the time come in, a Peer comes out or
Unauthenticated is raised. The rules are those of the X509-SVID standard (sections 4-5)
and RFC 5280; the chain itself is built by `cryptography`'s verifier, which leaves
most of SPIFFE's rules to us and believes whatever it finds among the roots.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, TypeAlias

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import (
    Criticality,
    ExtensionPolicy,
    PolicyBuilder,
    Store,
    VerificationError,
)

from ztserve import types
from ztserve.errors import IdentityError, Unauthenticated
from ztserve.identity.authorities import check_subjects, read_authority
from ztserve.identity.bundle import MAX_AUTHORITIES
from ztserve.identity.jwk import check_key
from ztserve.identity.spiffe_id import SpiffeId, trust_domain_name, workload_id
from ztserve.types import Peer

Moment: TypeAlias = datetime | float
"""A point in time: an aware datetime, or seconds since the epoch (UTC)."""

MAX_CERTIFICATES = 8
MAX_CHAIN_BYTES = 32 * 1024
MAX_NAME_CHECKS = 10_000
"""Names in a chain times the name constraints on them (RFC 5280, 4.2.1.10)."""
PUBLIC = "the peer's identity could not be verified"

# The Web's rules would refuse leaves that SPIFFE and RFC 5280 allow: without an
# authority key identifier, with a critical extended key usage (X509-SVID 4.4; its uses
# are checked below), or with a subject beside a critical SubjectAltName.
_CA_POLICY = ExtensionPolicy.webpki_defaults_ca()
_LEAF_POLICY = (
    ExtensionPolicy.webpki_defaults_ee()
    .may_be_present(x509.AuthorityKeyIdentifier, Criticality.NON_CRITICAL, None)
    .may_be_present(x509.ExtendedKeyUsage, Criticality.AGNOSTIC, None)
)
_CRITICAL_NAME_POLICY = _LEAF_POLICY.require_present(
    x509.SubjectAlternativeName, Criticality.CRITICAL, None
)
_BOTH_USES = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
_Extensions: TypeAlias = dict[type[x509.ExtensionType], x509.Extension[Any]]
_Policies: TypeAlias = tuple[PolicyBuilder, PolicyBuilder]
"""The roots of a trust domain, for leaves whose name is not critical, and is."""
_Bundles: TypeAlias = Callable[[str], _Policies | None]


def verify_peer(
    chain_der: Sequence[bytes],
    bundles: Mapping[str, Sequence[bytes]],
    *,
    now: Moment,
) -> Peer:
    """Return the Peer that `chain_der` (DER, leaf first) proves at the time `now`.

    `bundles` maps a trust domain's name to its roots (DER). In this order:

    1. The chain has 1 to 8 certificates in at most 32 KiB, and all parse.
    2. The leaf has exactly one URI name, a workload's SPIFFE ID (X509-SVID 2, 5.2).
    3. The leaf is not a CA; its key usage is there, critical, has digitalSignature and
       neither keyCertSign nor cRLSign (4.1, 4.3); an extended key usage, if there,
       has both serverAuth and clientAuth (4.4).
    4. What signs is a CA with keyCertSign and names no workload (`read_authority`; 3.2,
       4.1, 4.3), each has a subject of its own, and every key is EC P-256, P-384,
       P-521 or RSA of 2048 to 8192 bits: else judging a chain could take seconds.
       So could many names under many name constraints.
    5. The ID's own trust domain has a bundle and it is not empty. Only its roots count:
       a federated authority can never vouch for an ID of another trust domain (5.2).
       They too are certificates that may sign: a leaf would vouch for itself.
    6. RFC 5280 path validation to one of these roots succeeds at `now`; it also
       refuses an empty subject beside a SubjectAltName that is not critical (3.1).
    7. Every certificate of the path, the root included, is valid at `now`.

    Raises Unauthenticated, whatever the bytes are.
    """

    def read(trust_domain: str) -> _Policies | None:
        roots = bundles.get(trust_domain)
        return _policies(trust_domain, roots) if roots else None

    moment = as_datetime(now)
    return _in_time(_verify(chain_der, read, moment), moment)


class PeerVerifier:
    """`verify_peer` for one state of the bundles, remembering whom it has verified.

    Only what cannot change is remembered (by the chain's very bytes); validity in time
    is judged at each call. Make a new one when the bundles change: that forgets all.
    Thread-safe. Raises IdentityError where a bundle is not of certificates that sign.
    """

    def __init__(
        self, bundles: Mapping[str, Sequence[bytes]], *, capacity: int = 1024
    ) -> None:
        self._policies = {
            trust_domain_name(name): _policies(name, roots)
            for name, roots in bundles.items()
            if roots
        }
        self._capacity = capacity
        self._known: OrderedDict[tuple[bytes, ...], Peer] = OrderedDict()
        self._lock = threading.Lock()

    def verify(self, chain_der: Sequence[bytes], *, now: Moment | None = None) -> Peer:
        """Return the Peer that `chain_der` proves; by default, at this moment.

        Raises Unauthenticated as `verify_peer` does.
        """
        moment = types.now() if now is None else as_datetime(now)
        chain = tuple(chain_der)
        with self._lock:
            peer = self._known.get(chain)
            if peer is not None:
                self._known.move_to_end(chain)
        if peer is None:
            peer = _verify(chain, self._policies.get, moment)
            self._remember(chain, peer)
        return _in_time(peer, moment)

    def _remember(self, chain: tuple[bytes, ...], peer: Peer) -> None:
        with self._lock:
            self._known[chain] = peer
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)


def _refused(reason: str) -> Unauthenticated:
    return Unauthenticated(PUBLIC, reason)


def _require(fact: object, who: str, reason: str) -> None:
    if not fact:
        raise _refused(f"{who}: {reason}")


def as_datetime(moment: Moment) -> datetime:
    """Return `moment` as an aware datetime. ValueError for a naive one."""
    if not isinstance(moment, datetime):
        return datetime.fromtimestamp(moment, UTC)
    if moment.tzinfo is None:
        raise ValueError("now: a naive datetime names no moment; give it a time zone")
    return moment


def _in_time(peer: Peer, moment: datetime) -> Peer:
    if moment > peer.not_after:
        raise _refused(f"{peer.id}: expired at {peer.not_after}")
    if moment < peer.not_before:
        raise _refused(f"{peer.id}: not valid until {peer.not_before}")
    return peer


def _verify(chain_der: Sequence[bytes], bundles: _Bundles, moment: datetime) -> Peer:
    try:
        return _walk(chain_der, bundles, moment)
    except Unauthenticated:
        raise
    except VerificationError as error:
        # The verifier quotes subjects: an attacker's text, of any length and shape.
        why = repr(str(error))[:300]
        raise _refused(f"no valid path to the trust domain's roots: {why}") from error
    except IdentityError as error:
        raise _refused(str(error)) from error
    except Exception as error:
        # Parsers raise many kinds of error on hostile bytes; each means the same.
        raise _refused(f"malformed certificate: {error!r:.200}") from error


def _walk(chain_der: Sequence[bytes], bundles: _Bundles, moment: datetime) -> Peer:
    _check_size(chain_der)  # step 1
    leaf = x509.load_der_x509_certificate(chain_der[0])
    extensions = {type(each.value): each for each in leaf.extensions}
    spiffe_id = _leaf_id(extensions)  # step 2
    _check_leaf_usage(spiffe_id, extensions)  # step 3
    check_key(leaf.public_key(), spiffe_id)  # step 4
    signers: list[x509.Certificate] = []
    if len(chain_der) > 1:
        signers = _signers(spiffe_id, chain_der[1:])
        _check_search(spiffe_id, extensions, signers)
    policies = bundles(spiffe_id.trust_domain)  # step 5
    if policies is None:
        raise _refused(f"{spiffe_id}: no trust bundle for {spiffe_id.trust_domain}")
    policy = policies[extensions[x509.SubjectAlternativeName].critical]
    verifier = policy.time(moment).build_client_verifier()
    path = verifier.verify(leaf, signers).chain  # step 6
    return Peer(  # step 7 is `_in_time`
        id=spiffe_id,
        serial=leaf.serial_number,
        not_after=min([certificate.not_valid_after_utc for certificate in path]),
        not_before=max([certificate.not_valid_before_utc for certificate in path]),
        chain_sha256=sha256(b"".join(chain_der)).hexdigest(),
    )


def _check_size(chain_der: Sequence[bytes]) -> None:
    count, size = len(chain_der), sum(map(len, chain_der))
    if not count:
        raise _refused("no certificate")
    if count > MAX_CERTIFICATES:
        raise _refused(f"{count} certificates, at most {MAX_CERTIFICATES} are allowed")
    if size > MAX_CHAIN_BYTES:
        raise _refused(
            f"{size} bytes of certificates, at most {MAX_CHAIN_BYTES} are allowed"
        )


def _leaf_id(extensions: _Extensions) -> SpiffeId:
    names = extensions.get(x509.SubjectAlternativeName)
    if names is None:
        raise _refused("the certificate has no SPIFFE ID")
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise _refused(f"{len(uris)} URI names, exactly one is allowed")
    return workload_id(uris[0])


def _check_leaf_usage(who: SpiffeId, extensions: _Extensions) -> None:
    constraints = extensions.get(x509.BasicConstraints)
    _require(constraints is None or not constraints.value.ca, who, "leaf is a CA")
    usage = extensions.get(x509.KeyUsage)
    if usage is None:
        raise _refused(f"{who}: no key usage")
    _require(usage.critical, who, "key usage is not critical")
    _require(usage.value.digital_signature, who, "digitalSignature is not set")
    _require(not usage.value.key_cert_sign, who, "leaf has keyCertSign")
    _require(not usage.value.crl_sign, who, "leaf has cRLSign")
    extended = extensions.get(x509.ExtendedKeyUsage)
    _require(
        extended is None or _BOTH_USES.issubset(extended.value),
        who,
        "extended key usage lacks serverAuth or clientAuth",
    )


def _signers(who: SpiffeId, chain_der: Sequence[bytes]) -> list[x509.Certificate]:
    return [
        read_authority(der, f"{who}: certificate {position}")
        for position, der in enumerate(chain_der, 1)
    ]


def _check_search(
    who: SpiffeId, leaf: _Extensions, signers: Sequence[x509.Certificate]
) -> None:
    """Bound the search for a path, which hostile signers could make long."""
    subjects = {signer.subject for signer in signers}
    _require(len(subjects) == len(signers), who, "two signers of one name")
    names, constraints = len(list(leaf[x509.SubjectAlternativeName].value)), 0
    for signer in signers:
        for extension in signer.extensions:
            value = extension.value
            if isinstance(value, x509.SubjectAlternativeName):
                names += len(list(value))
            elif isinstance(value, x509.NameConstraints):
                constraints += len(value.permitted_subtrees or ())
                constraints += len(value.excluded_subtrees or ())
    _require(
        names * constraints <= MAX_NAME_CHECKS,
        who,
        f"{names} names under {constraints} name constraints, "
        f"at most {MAX_NAME_CHECKS} comparisons are allowed",
    )


def _policies(name: str, roots: Sequence[bytes]) -> _Policies:
    what = f"trust bundle of {name}"
    if len(roots) > MAX_AUTHORITIES:
        raise IdentityError(f"{what}: {len(roots)} roots, at most {MAX_AUTHORITIES}")
    authorities = [
        read_authority(der, f"{what}: root {position}")
        for position, der in enumerate(roots)
    ]
    check_subjects(authorities, what)
    builder = PolicyBuilder().store(Store(authorities))
    return (
        builder.extension_policies(ca_policy=_CA_POLICY, ee_policy=_LEAF_POLICY),
        builder.extension_policies(
            ca_policy=_CA_POLICY, ee_policy=_CRITICAL_NAME_POLICY
        ),
    )
