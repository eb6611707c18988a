"""What a verb signs with beside a plain key: an SVID, a timestamp."""

import argparse
import hashlib
import os
import sys
from collections.abc import Callable

from cryptography import x509

from ztserve import config, identity
from ztserve.artifacts import Role, publish
from ztserve.artifacts.statements.envelope import Envelope
from ztserve.artifacts.statements.timestamps import parse_timestamp
from ztserve.artifacts.trust.chains import certificates
from ztserve.errors import ConfigError
from ztserve.identity.svid import pem


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare ``--svid`` and ``--timestamp``."""
    parser.add_argument(
        "--svid",
        action="store_true",
        help="sign with the SVID that the node's SPIFFE agent gives to this process, "
        "and with a timestamp; --key is not used then",
    )
    parser.add_argument(
        "--timestamp",
        metavar="AUTHORITY",
        help="stamp the signature: an RFC 3161 authority's URL, or the file of one in "
        "process (with --svid by default the development authority's)",
    )


def signer(
    chosen: argparse.Namespace,
    load_key: Callable[[], publish.StatementSigner],
    role: Role,
) -> publish.StatementSigner:
    """Return what the arguments name; `load_key` is asked where it is a key.

    With an SVID the roots of this day are archived beside the state, and the tables
    that the trust policy needs are printed once for them. Raises ConfigError, and
    IdentityError without an agent.
    """
    if not chosen.svid:
        return _stamped(load_key(), chosen.timestamp)
    if chosen.key is not None:
        raise ConfigError("--svid and --key: choose what is to sign")
    identity.harden_process()
    settings = config.load()
    with config.obtain_identity(settings) as source:
        current = source.current()
    where = chosen.timestamp or str(settings.state / "keys" / "timestamp.pem")
    signing = _stamped(publish.SvidKey(current.svid), where)
    _archive(current, settings, role)
    return signing


def facts(envelope: Envelope) -> dict[str, str]:
    """Return what a bundle says beside its key: whose SVID signed, and when (UTC)."""
    found = {}
    for leaf in certificates(envelope)[:1]:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
        found = {"spiffe": ", ".join(uris), "serial": f"{leaf.serial_number:x}"}
    for raw in envelope.timestamps[:1]:
        found["timestamp"] = f"{parse_timestamp(raw).time:%Y-%m-%dT%H:%M:%SZ}"
    return found


def _stamped(
    signing: publish.StatementSigner, where: str | None
) -> publish.StatementSigner:
    if where is None:
        return signing
    authority = where if "://" in where else publish.load_authority(where)
    return publish.TimestampedSigner(signing, publish.stamp_with(authority))


def _archive(current: identity.Identity, settings: config.Settings, role: Role) -> None:
    """Keep the roots under which the SVID is good now: tomorrow they may be others."""
    domain = current.svid.id.trust_domain
    roots = pem(current.bundles[domain])
    folder = settings.state / "bundles"
    folder.mkdir(mode=0o755, exist_ok=True)
    path = folder / f"{domain}-{hashlib.sha256(roots).hexdigest()[:16]}.pem"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "wb") as file:
        file.write(roots)
    signer = publish.spiffe_entry(current.svid.id, role)
    print(
        f"# for the trust policy, once:\n{signer}\n"
        f"{publish.bundle_entry(domain, roots)}",
        file=sys.stderr,  # the signature's facts alone are the answer
    )
