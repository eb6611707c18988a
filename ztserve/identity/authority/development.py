"""The development authority: a SPIFFE trust domain that lives in one process.

Its keys are made there and never leave memory; with the process the trust domain ends.
It names workloads, it does not attest them: `Agent` does. Its root, the intermediate
where there is one, and the key of JWT-SVIDs are replaced before they end: a key is
published before it signs, and until all that it signed has expired (SPIFFE Federation,
section 4.1).
"""

import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import ClassVar, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ztserve import types
from ztserve.errors import IdentityError
from ztserve.identity.authority.certificates import (
    BACKDATED,
    leaf_extensions,
    sign_certificate,
    workload_name,
)
from ztserve.identity.authority.issuer import (
    Issuer,
    make_intermediate,
    make_jwt_key,
    make_root,
)
from ztserve.identity.authority.rotation import Rotation
from ztserve.identity.bundle import TrustBundle
from ztserve.identity.jwt.svid import (
    DEFAULT_LIFETIME_S,
    MAX_LIFETIME_S,
    JwtSvid,
    sign_jwt_svid,
)
from ztserve.identity.spiffe_id import SpiffeId, trust_domain_name, workload_id
from ztserve.identity.subscribers import Subscribers
from ztserve.identity.svid import Svid, dns_name

DEFAULT_TTL_S = 3600.0
MIN_TTL_S, MAX_TTL_S = 1.0, 24 * 3600.0
ROOT_TTL_S = 365 * 24 * 3600.0
JWT_TTL_S = DEFAULT_LIFETIME_S
JWT_KEY_TTL_S = 7 * 24 * 3600.0
REFRESH_HINT_S = 300
LEAD = 4
"""Refresh hints between a key's publication and its use; 3 to 5 are recommended."""
_LONGEST_WAIT_S = 60.0


class Authority:
    """Issues the SVIDs of one trust domain from keys that it makes itself.

    Args:
        trust_domain: its bare name.
        clock: the time, for tests.
        root_ttl_s: a root's life; it is replaced at half of that (`roll`: before).
        intermediate_ttl_s: life of the certificate between root and leaves, replaced
            at half of that; by default there is none, and the root signs leaves.
        jwt_key_ttl_s: life of the key of JWT-SVIDs, replaced at half of that.
        refresh_hint_s: how often others should look at our bundle.
        overlap_s: how long a new key is published before it signs; by default four
            times the refresh hint.

    Steps of rotation that are due are taken at each issue and, from `start` to
    `close`, on time. Thread-safe. Raises IdentityError for what is no trust domain's
    name, and for lives that do not fit each other.

    """

    _path_length: ClassVar[int | None] = 0
    """How many authorities may stand between an issuer of ours and a leaf."""

    def __init__(
        self,
        trust_domain: str,
        *,
        clock: Callable[[], datetime] = types.now,
        root_ttl_s: float = ROOT_TTL_S,
        intermediate_ttl_s: float | None = None,
        jwt_key_ttl_s: float = JWT_KEY_TTL_S,
        refresh_hint_s: int = REFRESH_HINT_S,
        overlap_s: float | None = None,
    ) -> None:
        self.trust_domain = trust_domain_name(trust_domain)
        ttl_s = intermediate_ttl_s
        if ttl_s is not None and not 2 <= ttl_s <= root_ttl_s / 4:
            raise IdentityError(
                f"intermediate_ttl_s is {ttl_s:g}, expected 2 to "
                f"{root_ttl_s / 4:g}: a quarter of the root's life"
            )
        self._clock = clock
        self._root_life = timedelta(seconds=root_ttl_s)
        self._intermediate_ttl_s = ttl_s
        self._refresh_hint_s = refresh_hint_s
        overlap_s = LEAD * refresh_hint_s if overlap_s is None else overlap_s
        now = clock()
        self._roots = Rotation(
            self._make_root, life_s=root_ttl_s, overlap_s=overlap_s, now=now
        )
        self._jwt_keys = Rotation(
            lambda _: make_jwt_key(), life_s=jwt_key_ttl_s, overlap_s=overlap_s, now=now
        )
        self._between: Issuer | None = None
        # Begun from the time, so that it grows across a restart as well.
        self._sequence = int(now.timestamp())
        self._subscribers = Subscribers()
        self._lock = threading.RLock()
        self._closed = False
        self._wake = threading.Event()

    @property
    def bundle(self) -> tuple[bytes, ...]:
        """The roots of the trust domain (DER), the one that signs first."""
        with self._lock:
            roots = self._roots.published
        return tuple(root.certificate.public_bytes(Encoding.DER) for root in roots)

    @property
    def bundles(self) -> dict[str, tuple[bytes, ...]]:
        """The bundle under its trust domain's name."""
        return {self.trust_domain: self.bundle}

    def trust_bundle(self) -> TrustBundle:
        """Return what others need to verify our SVIDs; its sequence only grows."""
        with self._lock:
            return TrustBundle(
                trust_domain=self.trust_domain,
                x509_authorities=self.bundle,
                jwt_authorities={
                    jwt.id: jwt.key.public_key() for jwt in self._jwt_keys.published
                },
                sequence=self._sequence,
                refresh_hint_s=self._refresh_hint_s,
            )

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each change of the bundle; return how to end it.

        It is called on the thread that changes it and should return at once.
        """
        return self._subscribers.subscribe(callback)

    def issue(self, spiffe_id: str, *, ttl_s: float = DEFAULT_TTL_S) -> Svid:
        """Return a new SVID of `spiffe_id`: own EC P-256 key, random serial number.

        It bears one URI name and the DNS name derived from it (`dns_name`), no common
        name, and lives `ttl_s` seconds (1 to 86400, rounded up; at most half of an
        intermediate's life). Raises IdentityError for an ID of another trust domain or
        of no workload.
        """
        subject = self._own(spiffe_id)
        most = min(MAX_TTL_S, (self._intermediate_ttl_s or 2 * MAX_TTL_S) / 2)
        _check_ttl(ttl_s, most)
        self.advance()
        key = ec.generate_private_key(ec.SECP256R1())
        with self._lock:
            now = self._clock()
            issuer = self._issuer(now)
            expiry = min(_end(now, ttl_s), issuer.certificate.not_valid_after_utc)
            self._roots.signed(expiry)
        begin = max(now - BACKDATED, issuer.certificate.not_valid_before_utc)
        certificate = sign_certificate(
            key.public_key(),
            workload_name(),
            (begin, expiry),
            leaf_extensions([subject], [dns_name(subject)]),
            issuer=issuer.certificate.subject,
            issuer_key=issuer.key,
        )
        return Svid(
            id=subject,
            chain_der=(certificate.public_bytes(Encoding.DER), *issuer.chain),
            key=key,
            serial=certificate.serial_number,
            not_before=certificate.not_valid_before_utc,
            not_after=certificate.not_valid_after_utc,
        )

    def issue_jwt(
        self,
        spiffe_id: str,
        audience: Sequence[str],
        *,
        ttl_s: float = JWT_TTL_S,
    ) -> JwtSvid:
        """Return a new JWT-SVID (ES256) of `spiffe_id` for `audience`.

        It lives `ttl_s` seconds, 1 to 3600. Raises IdentityError as `issue` does, and
        where there is no audience.
        """
        subject = self._own(spiffe_id)
        _check_ttl(ttl_s, MAX_LIFETIME_S)
        self.advance()
        with self._lock:
            now = self._clock()
            jwt = self._jwt_keys.current
            self._jwt_keys.signed(_end(now, ttl_s))
        return sign_jwt_svid(
            subject, audience, key=jwt.key, key_id=jwt.id, now=now, ttl_s=ttl_s
        )

    def roll(self) -> None:
        """Begin to replace the root: publish the next one beside it.

        It signs `overlap_s` later, and the old one leaves the bundle when every SVID
        that it signed has expired. Raises IdentityError where this is under way.
        """
        with self._lock:
            self._roots.roll(self._clock())
            self._changed()
        self._wake.set()
        self._subscribers.notify()

    def advance(self) -> float:
        """Take the steps of rotation that are due; return seconds until the next."""
        with self._lock:
            now = self._clock()
            changed = [keys.advance(now) for keys in (self._roots, self._jwt_keys)]
            if any(changed):
                self._changed()
            due = min(self._roots.due_at, self._jwt_keys.due_at)
        if any(changed):
            self._subscribers.notify()
        return (due - now).total_seconds()

    def start(self) -> Self:
        """Take the steps of rotation on time, on a daemon thread; return self."""
        threading.Thread(
            target=self._tend, name="ztserve-authority", daemon=True
        ).start()
        return self

    def close(self) -> None:
        """End what `start` began. May be called again."""
        self._closed = True
        self._wake.set()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tend(self) -> None:
        while True:
            self._wake.clear()  # and then look, so that no call of `close` is missed
            if self._closed:
                return
            # Not longer at once: the clock may step.
            self._wake.wait(min(max(self.advance(), 0.05), _LONGEST_WAIT_S))

    def _changed(self) -> None:
        self._sequence = max(self._sequence + 1, int(self._clock().timestamp()))

    def _own(self, spiffe_id: str) -> SpiffeId:
        subject = workload_id(spiffe_id)
        if subject.trust_domain != self.trust_domain:
            raise IdentityError(
                f"{subject} is not of {self.trust_domain}: an authority issues IDs of "
                "its own trust domain only"
            )
        return subject

    @property
    def _root(self) -> x509.Certificate:
        return self._roots.current.certificate

    @property
    def _key(self) -> ec.EllipticCurvePrivateKey:
        return self._roots.current.key

    def _issuer(self, now: datetime) -> Issuer:
        root, ttl_s = self._roots.current, self._intermediate_ttl_s
        if ttl_s is None:
            return root
        held = self._between
        if (
            held is None
            or held.certificate.issuer != root.certificate.subject
            or now > held.certificate.not_valid_after_utc - timedelta(seconds=ttl_s / 2)
        ):
            held = make_intermediate(
                self.trust_domain, root, (now, _end(now, ttl_s)), self._path_length
            )
            self._between = held
        return held

    def _make_root(self, now: datetime) -> Issuer:
        length = self._path_length
        if length is not None and self._intermediate_ttl_s is not None:
            length += 1
        return make_root(self.trust_domain, (now, now + self._root_life), length)


def _check_ttl(ttl_s: float, most: float) -> None:
    if not MIN_TTL_S <= ttl_s <= most:
        raise IdentityError(f"ttl_s is {ttl_s:g}, expected {MIN_TTL_S:g} to {most:g}")


def _end(now: datetime, ttl_s: float) -> datetime:
    # Certificates count whole seconds and would cut the last one off.
    exact = now + timedelta(seconds=ttl_s, microseconds=999_999)
    return exact.replace(microsecond=0)
