"""The corpus: two small trust domains whose keys are known to all.

    python -m tests.fuzz.seeds        # writes tests/fuzz/corpus anew

The private keys are the numbers below, so that the fuzz can sign what it has broken: a
mutation behind a true signature reaches the rules that one behind a false never sees.
"""

from __future__ import annotations

import json
from base64 import b64encode
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CORPUS = Path(__file__).parent / "corpus"
NOW = datetime(2030, 1, 1, tzinfo=UTC)
KEYS = {
    name: ec.derive_private_key(0x5EED0000 + number, ec.SECP256R1())
    for number, name in enumerate(("a", "b", "between", "lower", "leaf"))
}
ID = "spiffe://a.example/ns/x/sa/y"
ALGORITHM = ec.ECDSA(hashes.SHA256(), deterministic_signing=True)


def certificate(
    subject: str,
    signer: str,
    *extensions: tuple[x509.ExtensionType, bool],
    key=KEYS["leaf"],
    years: tuple[int, int] = (2020, 2049),
    issuer: str = "",
) -> bytes:
    """Return a certificate of `key` under `signer`, one of KEYS."""
    names = [
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)] if text else [])
        for text in (subject, issuer or signer)
    ]
    builder = (
        x509.CertificateBuilder()
        .subject_name(names[0])
        .issuer_name(names[1])
        .public_key(key.public_key())
        .serial_number(0x1234567890)
        .not_valid_before(datetime(years[0], 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(years[1], 12, 31, tzinfo=UTC))
    )
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(
        KEYS[signer].public_key()
    )
    for extension, critical in (*extensions, (identifier, False)):
        builder = builder.add_extension(extension, critical=critical)
    signed = builder.sign(KEYS[signer], hashes.SHA256(), ecdsa_deterministic=True)
    return signed.public_bytes(Encoding.DER)


def key_usage(*uses: str) -> x509.KeyUsage:
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: name in uses for name in every})


def leaf_extensions(spiffe_id: str = ID, *dns: str, critical: bool = False):
    both = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    names = [x509.UniformResourceIdentifier(spiffe_id), *map(x509.DNSName, dns)]
    return (
        (x509.SubjectAlternativeName(names), critical),
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (key_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage(both), False),
    )


def signer_extensions(spiffe_id: str = "", path_length: int | None = None):
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(spiffe_id)])
    return (
        *(((names, False),) if spiffe_id else ()),
        (x509.BasicConstraints(ca=True, path_length=path_length), True),
        (key_usage("key_cert_sign", "crl_sign"), True),
    )


def authority(name: str, signer: str = "", *more, path_length: int | None = None):
    """Return the certificate of a signer: a root, or one under `signer`."""
    spiffe_id = "spiffe://b.example" if name == "b" else "spiffe://a.example"
    extensions = (*signer_extensions(spiffe_id, path_length), *more)
    return certificate(name, signer or name, *extensions, key=KEYS[name])


def chains() -> dict[str, tuple[bytes, ...]]:
    """Return good chains by name, leaf first."""
    between, lower = authority("between", "a"), authority("lower", "between")
    dns_only = x509.NameConstraints([x509.DNSName("a.example")], None)
    narrow = authority("between", "a", (dns_only, True), path_length=0)
    deep = certificate("y", "lower", *leaf_extensions())
    many = leaf_extensions(ID, "y.a.example", "10.0.0.1")
    rsa_key = rsa.generate_private_key(65537, 2048)
    return {
        "direct": (certificate("y", "a", *leaf_extensions()),),
        "no-subject": (certificate("", "a", *leaf_extensions(critical=True)),),
        "no-extended-usage": (certificate("y", "a", *leaf_extensions()[:3]),),
        "dns": (certificate("y", "a", *many),),
        "rsa": (certificate("y", "a", *leaf_extensions(), key=rsa_key),),
        "p384": (
            certificate(
                "y",
                "a",
                *leaf_extensions(),
                key=ec.derive_private_key(0x5EED, ec.SECP384R1()),
            ),
        ),
        "between": (certificate("y", "between", *leaf_extensions()), between),
        "lower": (deep, lower, between),
        "with-root": (deep, lower, between, authority("a")),
        "narrow": (
            certificate("y", "between", *leaf_extensions(ID, "y.a.example")),
            narrow,
        ),
        "b": (certificate("z", "b", *leaf_extensions("spiffe://b.example/z")),),
    }


def bundles() -> dict[str, bytes]:
    """Return JWK Sets by trust domain, with keys of both uses."""
    documents = {}
    for name in ("a", "b"):
        numbers = KEYS[name].public_key().public_numbers()
        point = {
            "kty": "EC",
            "crv": "P-256",
            "x": _base64url(numbers.x),
            "y": _base64url(numbers.y),
        }
        x5c = [b64encode(authority(name)).decode()]
        documents[f"{name}.example"] = {
            "keys": [
                point | {"use": "x509-svid", "x5c": x5c},
                point | {"use": "jwt-svid", "kid": "k1"},
            ],
            "spiffe_sequence": 7,
            "spiffe_refresh_hint": 300,
        }
    return {name: json.dumps(doc).encode() for name, doc in documents.items()}


def _base64url(number: int) -> str:
    encoded = b64encode(number.to_bytes(32), altchars=b"-_").decode()
    return encoded.rstrip("=")


IDS = (
    ID,
    "spiffe://a.example",
    "spiffe://10.0.0.1/x",
    "spiffe://a_b-c.d/A.b_C-0/...",
    "spiffe://" + "t" * 255 + "/" + "p" * 1783,
    "spiffe://td/a//b/./c/../d/",
    "SPIFFE://user@td:1/%41?q#f\n",
)


def main() -> None:
    """Write the corpus."""
    CORPUS.mkdir(exist_ok=True)
    for name, chain in chains().items():
        (CORPUS / f"{name}.chain").write_bytes(b"".join(chain))
    for name in ("a", "b"):
        (CORPUS / f"{name}.example.root").write_bytes(authority(name))
    for name, document in bundles().items():
        (CORPUS / f"{name}.json").write_bytes(document + b"\n")
    (CORPUS / "ids.json").write_text(json.dumps(IDS, indent=1) + "\n")


if __name__ == "__main__":
    main()
