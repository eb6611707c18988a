"""A throw-away authority for tests, hostile on request."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import ClassVar, TypedDict, Unpack, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from ztserve.identity import Authority, FixedSource, Identity, SpiffeId, Svid
from ztserve.identity.authority.certificates import (
    BACKDATED,
    Extensions,
    alternative_names,
    authority_extensions,
    authority_name,
    key_usage,
    sign_certificate,
    workload_name,
)
from ztserve.identity.svid import PrivateKey

Bundles = Mapping[str, tuple[bytes, ...]]


class Flaws(TypedDict, total=False):
    """What `ThrowAwayAuthority.forge` may do wrong; without any, the SVID is good."""

    uris: Sequence[str]
    """URI names instead of the one ID (none, two, or of any text)."""
    dns: Sequence[str]
    ca: bool
    key_usage: Sequence[str] | None
    """Uses as `x509.KeyUsage` names them; None: no key usage at all."""
    key_usage_critical: bool
    extended: Sequence[str] | None
    """Of ``server`` and ``client``; None: no extended key usage (which is allowed)."""
    starts_s: float
    """Beginning of validity, in seconds from now."""
    ends_s: float
    """End of validity, in seconds from now."""
    key: PrivateKey
    """The workload's key, e.g. a weak one."""
    no_subject: bool
    """Leave the subject empty, with a SubjectAltName that is not critical."""


class ThrowAwayAuthority(Authority):
    """An authority for tests: `source` for good identities, `forge` for bad ones."""

    _path_length: ClassVar[int | None] = None

    def source(
        self, spiffe_id: str, *, ttl_s: float = 3600.0, federated: Bundles | None = None
    ) -> FixedSource:
        """Return a source of a fresh SVID that trusts us and the `federated`."""
        svid = self.issue(spiffe_id, ttl_s=ttl_s)
        return FixedSource(Identity(svid, self.bundles | dict(federated or {})))

    def forged_source(
        self,
        spiffe_id: str,
        *,
        bundles: Bundles | None = None,
        **flaws: Unpack[Flaws],
    ) -> "ForgedSource":
        """Return a source that presents what `forge` makes, expired or not."""
        svid = self.forge(spiffe_id, **flaws)
        return ForgedSource(Identity(svid, bundles or self.bundles))

    def forge(self, spiffe_id: str, **flaws: Unpack[Flaws]) -> Svid:
        """Return an SVID of any ID at all, with the given flaws.

        Its `id` says `spiffe_id` even where that is no SPIFFE ID.
        """
        key = flaws.get("key") or ec.generate_private_key(ec.SECP256R1())
        now = self._clock()
        validity = (
            now + timedelta(seconds=flaws.get("starts_s", -60.0)),
            now + timedelta(seconds=flaws.get("ends_s", 3600.0)),
        )
        certificate = sign_certificate(
            key.public_key(),
            x509.Name([]) if flaws.get("no_subject") else workload_name(),
            validity,
            _extensions(spiffe_id, flaws),
            issuer=self._root.subject,
            issuer_key=self._key,
        )
        return Svid(
            id=cast("SpiffeId", spiffe_id),
            chain_der=(certificate.public_bytes(Encoding.DER), *self._intermediates),
            key=key,
            serial=certificate.serial_number,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )

    @property
    def _intermediates(self) -> tuple[bytes, ...]:
        return ()

    def intermediate(
        self, *uris: str, trust_domain: str | None = None, ends_s: float = 3600.0
    ) -> "Intermediate":
        """Return an authority under this one; its certificate bears `uris`.

        Only `forge` and `forged_source` of it attach the certificate in between.
        """
        return Intermediate(
            trust_domain or self.trust_domain, self, uris, self._clock, ends_s
        )


class Intermediate(ThrowAwayAuthority):
    """An authority whose own certificate another one signed."""

    def __init__(
        self,
        trust_domain: str,
        parent: ThrowAwayAuthority,
        uris: Sequence[str],
        clock: Callable[[], datetime],
        ends_s: float,
    ) -> None:
        super().__init__(trust_domain, clock=clock)
        self._parent = parent
        now = clock()
        self._certificate = sign_certificate(
            self._key.public_key(),
            authority_name(f"intermediate of {parent.trust_domain}"),
            (now - BACKDATED, now + timedelta(seconds=ends_s)),
            authority_extensions(uris, 0) if uris else authority_extensions((), 0)[1:],
            issuer=parent._root.subject,  # noqa: SLF001
            issuer_key=parent._key,  # noqa: SLF001
        )

    @property
    def _root(self) -> x509.Certificate:
        return self._certificate

    @property
    def bundle(self) -> tuple[bytes, ...]:
        """The roots of the authority above."""
        return self._parent.bundle

    @property
    def _intermediates(self) -> tuple[bytes, ...]:
        certificate = self._root.public_bytes(Encoding.DER)
        return (certificate, *self._parent._intermediates)  # noqa: SLF001


class ForgedSource:
    """A source that shows what it has, valid or not: what an attacker would."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity

    def current(self) -> Identity:
        """Return the identity as it is."""
        return self._identity

    def subscribe(
        self,
        callback: Callable[[], None],
    ) -> Callable[[], None]:
        """Accept a callback that there will be no occasion for."""
        return lambda: None


def _extensions(spiffe_id: str, flaws: Flaws) -> Extensions:
    uris, dns = flaws.get("uris", (spiffe_id,)), flaws.get("dns", ())
    extensions: list[tuple[x509.ExtensionType, bool]] = [
        (x509.BasicConstraints(ca=flaws.get("ca", False), path_length=None), True)
    ]
    if uris or dns:
        extensions.append((alternative_names(uris, dns), False))
    uses = flaws.get("key_usage", ("digital_signature",))
    if uses is not None:
        extensions.append((key_usage(*uses), flaws.get("key_usage_critical", True)))
    extended = flaws.get("extended", ("server", "client"))
    if extended is not None:
        extensions.append(
            (x509.ExtendedKeyUsage([_EXTENDED[u] for u in extended]), False)
        )
    return extensions


_EXTENDED = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}
