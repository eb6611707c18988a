"""Trust domains with bundle endpoints, good and hostile, for tests of federation."""

import ipaddress
import ssl
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from ztserve import types
from ztserve.errors import Unauthenticated
from ztserve.identity import verify_peer
from ztserve.identity.authority.certificates import (
    authority_extensions,
    authority_name,
    sign_certificate,
)
from ztserve.identity.federation.bundles import Federation
from ztserve.identity.federation.endpoint import BundleEndpoint, renewing
from ztserve.identity.federation.relationship import Relationship
from ztserve.testing import ThrowAwayAuthority

OURS = "a.example"
THEIRS = "b.example"
DOOR = "spiffe://b.example/ns/ztserve/sa/bundle"
WORKLOAD = "spiffe://b.example/ns/x/sa/y"


class Endpoint(BundleEndpoint):
    """A bundle endpoint that answers what a test says, and counts."""

    def __init__(self, authority, svid=None, *, answer=None, path="/", port=0) -> None:
        svid = svid or renewing(authority, DOOR)
        super().__init__(authority.trust_bundle, svid, path=path)
        self.script = answer
        self.asked = 0
        self.port = port

    def _answer(self, head):
        self.asked += 1
        return self.script(head) if self.script else super()._answer(head)

    @property
    def url(self) -> str:
        host, port = self.address
        return f"https://{host}:{port}{self._path.decode()}"

    def __enter__(self):
        self.address = self.start(port=self.port)
        return self


class WebEndpoint(Endpoint):
    """One with a certificate of the Web's kind, for `names`, in place of an SVID."""

    def __init__(self, authority, root, *names, common_name="web", **more) -> None:
        super().__init__(authority, always(None), **more)
        self._web = root.context(names, common_name)

    def _tls(self):
        return self._web


class WebRoot:
    """A certificate authority of the Web's kind."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = authority_name("web root")
        self.certificate = sign_certificate(
            self.key.public_key(),
            self.name,
            self._validity(),
            authority_extensions((), None)[1:],
            issuer=self.name,
            issuer_key=self.key,
        )
        self.pem = self.certificate.public_bytes(Encoding.PEM).decode()

    def context(self, names, common_name) -> ssl.SSLContext:
        key = ec.generate_private_key(ec.SECP256R1())
        alternative = [
            x509.IPAddress(ipaddress.ip_address(name))
            if name[0].isdigit()
            else x509.DNSName(name)
            for name in names
        ]
        certificate = sign_certificate(
            key.public_key(),
            authority_name(common_name),
            self._validity(),
            [(x509.SubjectAlternativeName(alternative), False)] if names else [],
            issuer=self.name,
            issuer_key=self.key,
        )
        pem = certificate.public_bytes(Encoding.PEM) + key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        return pem_context(pem)

    @staticmethod
    def _validity():
        now = types.now()
        return now - timedelta(minutes=1), now + timedelta(hours=1)


def pem_context(pem: bytes) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(pem)
        file.flush()
        context.load_cert_chain(file.name)
    return context


def http(body: bytes = b"", status: int = 200, *fields: str) -> bytes:
    lines = (f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *fields)
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(url: str, status: int = 302) -> bytes:
    return http(b"", status, f"Location: {url}")


def saved(directory: Path, bundle, name: str = "") -> Path:
    """Write `bundle` to a file, by rename, as careful writers do."""
    path = directory / f"{name or bundle.trust_domain}.json"
    new = path.with_suffix(".new")
    new.write_bytes(bundle if isinstance(bundle, bytes) else bundle.jwks())
    new.chmod(0o600)
    new.replace(path)
    return path


def spiffe(endpoint, directory, authority, **more) -> Relationship:
    """A self-serving relationship by the profile https_spiffe."""
    return Relationship(
        **{
            "trust_domain": authority.trust_domain,
            "profile": "https_spiffe",
            "url": endpoint.url,
            "spiffe_id": DOOR,
            "bootstrap": saved(directory, authority.trust_bundle()),
        }
        | more
    )


@contextmanager
def federated(*relationships, **more):
    """Our federation, polling fast."""
    events = []
    options = {"trust_domain": OURS, "interval_s": 0.05, "bounds_s": (0.05, 0.05)}
    with Federation(
        relationships,
        on_event=lambda name, facts: events.append((name, dict(facts))),
        **options | more,
    ) as federation:
        federation.events = events
        yield federation


def accepts(federation: Federation, svid) -> bool:
    """Whether one who trusts these bundles, each for its own domain, accepts `svid`."""
    roots = {
        name: bundle.x509_authorities for name, bundle in federation.bundles().items()
    }
    try:
        return bool(verify_peer(svid.chain_der, roots, now=types.now()))
    except Unauthenticated:
        return False


def until(fact, seconds: float = 5.0) -> float:
    """Wait for `fact`; return how long that took."""
    started = time.monotonic()
    while not fact():
        assert time.monotonic() < started + seconds, "it did not happen"
        time.sleep(0.005)
    return time.monotonic() - started


def refusals(federation) -> list[str]:
    return [facts["reason"] for name, facts in federation.events if "refused" in name]


def refusal(federation) -> str:
    """The first reason for which a bundle was refused."""
    until(lambda: refusals(federation))
    return refusals(federation)[0]


def throw_away(name: str = THEIRS, **more) -> ThrowAwayAuthority:
    return ThrowAwayAuthority(name, refresh_hint_s=1, **more)


def told(federation) -> threading.Event:
    event = threading.Event()
    federation.subscribe(event.set)
    return event


def always(value):
    return lambda *_: value
