"""A workshop of a year ago: a trainer with one-hour SVIDs, and a timestamp authority.

Everything that it signs is long expired today; only timestamps can prove it good.
"""

from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.unit.artifacts.workshop import Workshop, pem
from ztserve.artifacts import TrustPolicy
from ztserve.artifacts.publish import (
    LocalAuthority,
    SvidKey,
    TimestampedSigner,
    load_authority,
    new_authority,
    release_model,
    sign_model,
)
from ztserve.artifacts.publish.stamping import query
from ztserve.identity.authority.certificates import (
    authority_name,
    key_usage,
    sign_certificate,
)
from ztserve.identity.svid import pem as certificates_pem
from ztserve.testing.authority import ThrowAwayAuthority

DAY = timedelta(days=1)
PAST = datetime.now(UTC).replace(microsecond=0) - 400 * DAY
MINUTE = timedelta(minutes=1)
TRAINER = "spiffe://example.test/ns/ml/sa/trainer"


def timestamping(uses=(ExtendedKeyUsageOID.TIME_STAMPING,), *, critical=True):
    """What a timestamp authority's certificate should have, or less."""
    extensions = [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (key_usage("digital_signature"), True),
    ]
    if uses:
        extensions.append((x509.ExtendedKeyUsage(uses), critical))
    return tuple(extensions)


class Clock:
    """A timestamp authority made by hand, so that it can be made wrong."""

    def __init__(self, *, extensions=None, key=None, since=None, until=None) -> None:
        self.root_key = ec.generate_private_key(ec.SECP256R1())
        key = key or ec.generate_private_key(ec.SECP256R1())
        name = authority_name("a clock's root")
        self.validity = (since or PAST - 30 * DAY, until or PAST + 3000 * DAY)
        self.root = sign_certificate(
            self.root_key.public_key(),
            name,
            self.validity,
            (
                (x509.BasicConstraints(ca=True, path_length=0), True),
                (key_usage("key_cert_sign"), True),
            ),
            issuer=name,
            issuer_key=self.root_key,
        )
        certificate = sign_certificate(
            key.public_key(),
            authority_name("a clock"),
            self.validity,
            timestamping() if extensions is None else extensions,
            issuer=name,
            issuer_key=self.root_key,
        )
        self.authority = LocalAuthority(key, (certificate, self.root))

    @property
    def root_pem(self) -> str:
        return self.root.public_bytes(serialization.Encoding.PEM).decode()


def stamps(authority, at, nonce=7):
    """A stamp that says `at`, whatever time it is."""
    return lambda message: authority.answer(query(message, nonce), now=at)


class Studio(Workshop):
    """A workshop whose trainer is a workload, and whose deployer has a key."""

    def __init__(self, path) -> None:
        self.spire = ThrowAwayAuthority("example.test", clock=lambda: PAST)
        self.svid = self.spire.issue(TRAINER, ttl_s=3600)
        made = new_authority(path / "clock.pem", name="clock", now=PAST - DAY)
        self.clock = load_authority(made.private)
        self.clock_pem = made.root.read_text()
        super().__init__(path)

    def write_policy(
        self,
        roles=None,
        head="version = 1",
        tail="",
        *,
        clocks=None,
        window="",
        roots=None,
        who=TRAINER,
    ) -> TrustPolicy:
        """Trust the trainer by its SPIFFE ID and the deployer by its key.

        `clocks`: roots of timestamp authorities in PEM; `window`: of the bundle.
        """
        clocks = [self.clock_pem] if clocks is None else clocks
        roots = certificates_pem(self.spire.bundle).decode() if roots is None else roots
        text = (
            f'{head}\n[[signers]]\nname = "trainer"\nspiffe = "{who}"\n'
            'roles = ["trainer"]\n[[signers]]\nname = "deployer"\n'
            f'key = """{pem(self.keys["deployer"])}"""\nroles = ["deployer"]\n'
            f'[[bundles]]\ntrust_domain = "example.test"\nroots = """{roots}"""\n'
            + window
            + "".join(
                f'[[timestamp_authorities]]\nname = "clock-{number}"\n'
                f'root = """{root}"""\n'
                for number, root in enumerate(clocks)
            )
        )
        self.policy_path.write_text(text + tail)
        self.policy_path.chmod(0o644)
        return TrustPolicy.load(self.policy_path)

    def signer(self, svid=None, *, at=PAST + 5 * MINUTE, authority=None):
        """What signs with the SVID, stamped at that time; `at=None`: not stamped."""
        key = SvidKey(svid or self.svid)
        if at is None:
            return key
        return TimestampedSigner(key, stamps(authority or self.clock, at))

    def signed(self, folder="digits", name="digits", version="1", **signer):
        """Make a model that the trainer signed a year ago, and release it."""
        root = self.model(folder)
        sign_model(root, self.signer(**signer))
        release_model(root, self.keys["deployer"], name=name, version=version)
        return root
