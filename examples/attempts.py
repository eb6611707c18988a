"""Every refusal of the demonstration, one by one, with its audit record."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ray import serve

from examples.digits import Digits
from examples.refusals import Door, LetInError, Refusal, weights, wire
from examples.refusals.lend import borrow
from ztserve import audit, config
from ztserve.errors import VerificationError
from ztserve.serving import cluster

RECORD_S = 10.0
"""Longest wait for a record; those of refused handshakes come once a second."""
SERVICE = "inference-service"


class Seen(NamedTuple):
    """One attempt, as it ended."""

    refusal: Refusal
    record: str
    """What the audit says of it; empty: nothing."""


def attempts(settings: config.Settings, options: dict[str, Any]) -> Iterator[Seen]:
    """Try every attack on a running deployment.

    Raises LetInError where one is not refused.
    """
    door = _door(settings)
    trust = settings.artifacts.trust_policy
    registry = settings.artifacts.folder

    def load(root: Path, ref: str, policy: Path) -> object:
        return _deploy(settings, root, ref, policy, options)

    attacks: list[Callable[[], Refusal]] = [
        *(lambda attack=attack: attack(door) for attack in wire.ALL),
        plain_ray_handle,
        lambda: weights.tampered_weights(registry, "digits", trust, load),
        lambda: weights.unsigned_model(registry, "digits", trust, load),
        lambda: weights.another_signed_model(registry, "digits", "chat", trust, load),
        lambda: weights.pickle("digits", load),
    ]
    for attack in attacks:
        before = _positions(settings)
        refusal = attack()
        yield Seen(refusal, _recorded(settings, before, refusal.audited))


def plain_ray_handle() -> Refusal:
    """Call the replica as Ray Serve's own clients do."""
    handle = serve.get_app_handle("digits")
    try:
        handle.predict.remote([[0.0] * 64]).result(timeout_s=30)
    except Exception as error:  # noqa: BLE001 - Ray raises it as a class of its own
        sentence = str(error).strip().splitlines()[-1].removeprefix("ztserve.errors.")
        return Refusal("plain Ray handle", sentence, "Denied")
    raise LetInError("plain Ray handle: was not refused")


def _door(settings: config.Settings) -> Door:
    places = dict(cluster.replicas(settings))
    key = f"{settings.identity.namespace}/{SERVICE}"
    return Door(
        places[key][0].address,
        settings.spiffe_id(SERVICE),
        gateway=borrow(settings.gateway.service, settings.gateway.namespace),
        stranger=borrow("stranger", "dev"),
        max_message_bytes=settings.transport.max_message_bytes,
    )


def _deploy(
    settings: config.Settings,
    root: Path,
    ref: str,
    policy: Path,
    options: dict[str, Any],
) -> object:
    """Update the running digits to `ref` of another registry."""
    with _other_settings(settings, root, policy):
        app = Digits.options(num_replicas=2, model=ref, **options).bind()
    try:
        cluster.deploy(app, "digits")
    except cluster.DeployFailed as error:
        raise VerificationError(str(error).partition(": ")[2]) from error
    return app


@contextmanager
def _other_settings(
    settings: config.Settings, registry: Path, policy: Path
) -> Iterator[None]:
    """Have `bind` read a configuration with another registry and trust policy."""
    before = os.environ["ZTSERVE_CONFIG"]
    text = Path(before).read_text()
    file = settings.base / "other.toml"
    file.write_text(
        text.replace(
            'registry = ".ztserve/registry"', f"registry = {json.dumps(str(registry))}"
        ).replace('".ztserve/trust.toml"', json.dumps(str(policy)))
    )
    os.environ["ZTSERVE_CONFIG"] = str(file)
    try:
        yield
    finally:
        os.environ["ZTSERVE_CONFIG"] = before


# --- the audit ----------------------------------------------------------------------


def _positions(settings: config.Settings) -> dict[Path, int]:
    return {path: path.stat().st_size for path in _logs(settings)}


def _logs(settings: config.Settings) -> Iterator[Path]:
    return settings.audit.directory.glob(f"{SERVICE}-*.jsonl")


def _recorded(settings: config.Settings, before: dict[Path, int], what: str) -> str:
    """Wait for a record written since `before` that names `what`."""
    until = time.monotonic() + RECORD_S
    while time.monotonic() < until:
        for path in _logs(settings):
            for record in audit.read(path):
                if record["seq"] > _seen(path, before) and _names(record, what):
                    return _summary(record)
        time.sleep(0.2)
    return ""


def _names(record: dict[str, Any], what: str) -> bool:
    """Tell whether a record says `what`; of a handshake it must say by whom, too."""
    known = record.get("status_code") != "handshake" or record["src_endpoint"]["ip"]
    return bool(known) and what in json.dumps(record)


def _seen(path: Path, before: dict[Path, int]) -> int:
    """Return the last sequence number within the first bytes of a log."""
    with path.open("rb") as file:
        lines = file.read(before.get(path, 0)).splitlines()
    return int(json.loads(lines[-1])["seq"]) if lines else 0


def _summary(record: dict[str, Any]) -> str:
    """Say in a line what a record says."""
    unmapped = record.get("unmapped", {})
    who = record.get("actor", {}).get("user", {}).get("uid", "").partition("/ns/")[2]
    if record.get("status_code") == "handshake":  # nobody who is known by name
        who = record["src_endpoint"]["ip"]
    facts = [
        record.get("activity_name"),
        who,
        record.get("status_code") or unmapped.get("status_code"),
        record.get("status_detail") or unmapped.get("status_detail"),
        unmapped.get("reason"),
        *unmapped.get("notes", ()),
        f"x{record['count']}" if "count" in record else None,
    ]
    return f"#{record['seq']} " + "; ".join(str(fact) for fact in facts if fact)
