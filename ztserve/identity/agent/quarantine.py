"""What admins may ask of the agent's admin socket about the quarantine."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ztserve.errors import IdentityError
from ztserve.identity.agent.attestation import Process
from ztserve.identity.agent.embedded import Operation
from ztserve.identity.quarantine import file
from ztserve.identity.subscribers import OnEvent


def quarantine_operations(path: Path, on_event: OnEvent) -> Mapping[str, Operation]:
    """Return what admins may ask of the agent's admin socket, by ``op``.

    ``quarantine-add`` (with subject and reason), ``quarantine-remove`` (with subject)
    and ``quarantine-list``. `on_event` is told before each change: what it raises stops
    the change. They raise IdentityError where they refuse. Who may ask is for the agent
    to decide (`Agent`'s `extra_ops`).
    """

    def add(process: Process, request: Mapping[str, object]) -> dict[str, object]:
        text, reason = _texts(request, "subject", "reason")
        entry = file.add(path, text, reason=reason, by=_who(process), on_event=on_event)
        return {"entry": asdict(entry)}

    def remove(process: Process, request: Mapping[str, object]) -> dict[str, object]:
        (text,) = _texts(request, "subject")
        gone = file.remove(path, text, by=_who(process), on_event=on_event)
        return {"subject": gone}

    def listed(_: Process, request: Mapping[str, object]) -> dict[str, object]:
        _texts(request)
        return {"entries": [asdict(entry) for entry in file.read(path) or ()]}

    return {
        "quarantine-add": add,
        "quarantine-remove": remove,
        "quarantine-list": listed,
    }


def _who(process: Process) -> str:
    return f"pid {process.pid}, uid {process.uid}"


def _texts(request: Mapping[str, object], *names: str) -> list[str]:
    found = [request.get(name) for name in names]
    texts = [one for one in found if isinstance(one, str)]
    if len(texts) < len(names) or len(request) != len(names) + 1:
        expected = " and ".join(names) or "no more than its op"
        raise IdentityError(f"{request.get('op')}: expected {expected}")
    return texts
