"""Have another process take an identity, and lend it.

A process has one identity for life, and the demonstration plays several. What is lent
goes through a pipe and ends with the process.
"""

import base64
import json
import subprocess
import sys

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from ztserve import config
from ztserve.identity import FixedSource, Identity, SpiffeId, Svid


def borrow(service: str, namespace: str) -> FixedSource:
    """Return the identity that the agent gives to a process of its own."""
    lent = subprocess.run(
        [sys.executable, "-m", "examples.refusals.lend", service, namespace],
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    told = json.loads(lent.stdout)
    chain = tuple(map(base64.b64decode, told["chain"]))
    leaf = x509.load_der_x509_certificate(chain[0])
    key = load_pem_private_key(told["key"].encode(), None)
    if not isinstance(key, EllipticCurvePrivateKey):
        raise TypeError("the development authority issues elliptic-curve keys")
    svid = Svid(
        id=SpiffeId.parse(told["id"]),
        chain_der=chain,
        key=key,
        serial=leaf.serial_number,
        not_before=leaf.not_valid_before_utc,
        not_after=leaf.not_valid_after_utc,
    )
    bundles = {
        domain: tuple(map(base64.b64decode, roots))
        for domain, roots in told["bundles"].items()
    }
    return FixedSource(Identity(svid, bundles))


def lend(service: str, namespace: str) -> str:
    """Take an identity; return all of it as JSON."""
    settings = config.load()
    source = config.obtain_identity(settings, settings.spiffe_id(service, namespace))
    who = source.current()
    source.close()
    return json.dumps(
        {
            "id": who.svid.id,
            "chain": [base64.b64encode(der).decode() for der in who.svid.chain_der],
            "key": who.svid.key_pem().decode(),
            "bundles": {
                domain: [base64.b64encode(der).decode() for der in roots]
                for domain, roots in who.bundles.items()
            },
        }
    )


if __name__ == "__main__":
    print(lend(*sys.argv[1:3]))
