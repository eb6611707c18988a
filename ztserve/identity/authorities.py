"""Which certificates may sign X.509-SVIDs: those of a trust bundle, and in a chain.

`cryptography`'s verifier believes whatever is among its roots, so that a leaf there
would vouch for itself; and it bounds no search. Both are seen to here.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

from cryptography import x509

from ztserve.errors import IdentityError
from ztserve.identity.jwk import check_key
from ztserve.identity.spiffe_id import SpiffeId

MAX_ONE_SUBJECT = 8
"""X.509 authorities of one subject in one bundle: a search tries each of them."""
MAX_NAME_CONSTRAINTS = 64
"""Subtrees in one authority: each name below it is compared with each of them."""


def read_authority(der: bytes, what: str) -> x509.Certificate:
    """Return the signing certificate in `der` (X509-SVID 3.2, 4.1 and 4.3).

    It is a CA, may sign certificates, has 64 name constraints at most, and names at
    most a trust domain: never a workload. Raises IdentityError that begins with `what`.
    """
    try:
        certificate = x509.load_der_x509_certificate(der)
        key = certificate.public_key()
        extensions = {extension.oid: extension for extension in certificate.extensions}
    except Exception as error:
        # Parsers raise many kinds of error on hostile bytes; each means the same.
        raise IdentityError(f"{what}: malformed certificate: {error!r:.200}") from error
    constraints = extensions.get(x509.BasicConstraints.oid)
    if constraints is None or not constraints.value.ca:
        raise IdentityError(f"{what}: is not a CA")
    usage = extensions.get(x509.KeyUsage.oid)
    if usage is None or not usage.value.key_cert_sign:
        raise IdentityError(f"{what}: may not sign certificates (keyCertSign)")
    names = extensions.get(x509.SubjectAlternativeName.oid)
    uris = (
        names.value.get_values_for_type(x509.UniformResourceIdentifier) if names else []
    )
    if uris:  # it is an SVID itself
        _check_authority_svid(uris, what, critical=usage.critical)
    limits = extensions.get(x509.NameConstraints.oid)
    if limits is not None:
        _check_name_constraints(limits.value, what)
    check_key(key, what)
    return certificate


def check_subjects(authorities: Iterable[x509.Certificate], what: str) -> None:
    """Raise IdentityError, beginning with `what`, where over 8 have one subject."""
    try:
        counts = Counter(authority.subject for authority in authorities)
    except IdentityError:
        raise
    except Exception as error:
        raise IdentityError(f"{what}: malformed subject: {error!r:.200}") from error
    if max(counts.values(), default=0) > MAX_ONE_SUBJECT:
        raise IdentityError(
            f"{what}: over {MAX_ONE_SUBJECT} authorities of one subject"
        )


def _check_name_constraints(limits: x509.NameConstraints, what: str) -> None:
    count = len(limits.permitted_subtrees or ()) + len(limits.excluded_subtrees or ())
    if count > MAX_NAME_CONSTRAINTS:
        raise IdentityError(f"{what}: over {MAX_NAME_CONSTRAINTS} name constraints")


def _check_authority_svid(uris: Sequence[str], what: str, *, critical: bool) -> None:
    if len(uris) > 1:
        raise IdentityError(f"{what}: {len(uris)} URI names, at most one is allowed")
    try:
        path = SpiffeId.parse(uris[0]).path
    except IdentityError as error:
        raise IdentityError(f"{what}: {error}") from error
    if path:
        raise IdentityError(f"{what}: {uris[0]} is a workload, not a trust domain")
    if not critical:
        raise IdentityError(f"{what}: key usage is not critical")


# --- entries of a JWK Set -------------------------------------------------------
