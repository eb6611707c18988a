"""``ztserve svid write``: this process's SVID as files, for stock clients."""

import argparse
import os
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from ztserve import config, identity
from ztserve.errors import IdentityError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("action", choices=("write",))
    parser.add_argument("folder", type=Path, help="to write the files into")
    parser.add_argument(
        "--server", default="inference-service", help="the service to be called"
    )


def run(chosen: argparse.Namespace) -> int:
    """Write svid.pem, key.pem (0600) and bundle.pem; print the target name."""
    identity.harden_process()
    settings = config.load()
    namespace, _, service = chosen.server.rpartition("/")
    server = settings.spiffe_id(service, namespace or None)
    with config.obtain_identity(settings) as source:
        current = source.current()
    embedded = isinstance(source, identity.WorkloadSource) and not (
        config.endpoint_socket()
    )
    if embedded and current.svid.id != settings.developer_id:
        raise IdentityError(
            f"this process is given {current.svid.id} and not {settings.developer_id}: "
            "that key is not yours to write; mend the registration entries"
        )
    svid = current.svid
    chosen.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, text in (
        ("svid.pem", svid.chain_pem()),
        ("key.pem", svid.key_pem()),
        ("bundle.pem", b"".join(map(_pem, current.bundles[svid.id.trust_domain]))),
    ):
        _write_private(chosen.folder / name, text)
        print(chosen.folder / name)
    print(f"identity              {svid.id}, until {svid.not_after:%Y-%m-%d %H:%M} UTC")
    print(f"server                {server}")
    print(f"ssl_target_name_override  {identity.dns_name(server)}")
    return 0


def _pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)


def _write_private(path: Path, data: bytes) -> None:
    # Anew: whoever has the older file open must not read what is written now.
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
