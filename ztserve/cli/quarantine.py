"""``ztserve quarantine``: refuse a principal or a stolen SVID at once.

With the embedded agent the request goes to its admin socket, and the agent judges who
asks. With another agent (SPIFFE_ENDPOINT_SOCKET), or SVIDs on disk, this command writes
the file itself, if its own SVID's ID is among ``[identity] admins``: that keeps honest
people from mistakes. The boundary there is who may write to the file.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast

from ztserve import config, identity
from ztserve.audit import Log
from ztserve.cli import show
from ztserve.config import Settings
from ztserve.errors import IdentityError
from ztserve.identity.quarantine import file as quarantine_file


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")
    what = "a SPIFFE ID, or a certificate's serial number in hex"
    add = actions.add_parser("add", help="refuse it from now on")
    add.add_argument("subject", metavar="id_or_serial", help=what)
    add.add_argument("--reason", required=True, help="for the audit and the list")
    remove = actions.add_parser("remove", help="let it in again")
    remove.add_argument("subject", metavar="id_or_serial", help=what)
    listed = actions.add_parser("list", help="show who is refused, since when and why")
    listed.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Change or show the list."""
    settings = config.load()
    names = {"add": ("subject", "reason"), "remove": ("subject",), "list": ()}
    request = {
        "op": f"quarantine-{chosen.action}",
        **{name: getattr(chosen, name) for name in names[chosen.action]},
    }
    if _has_embedded_agent(settings):
        socket = identity.admin_path(config.agent_directory(settings))
        answer = identity.admin(socket, request)
    else:
        answer = _in_the_file(settings, request)
    _print(chosen, answer)
    return 0


def _has_embedded_agent(settings: Settings) -> bool:
    """Return whether our SVIDs come from it, as `config.obtain_identity` decides."""
    chosen = settings.identity
    elsewhere = config.endpoint_socket() or chosen.svid_files or chosen.svid_folder
    return not elsewhere and settings.profile == "development"


def _print(chosen: argparse.Namespace, answer: Mapping[str, object]) -> None:
    if chosen.action == "list":
        entries = cast("list[dict[str, Any]]", answer["entries"])
        if chosen.json:
            show.as_json(entries)
        else:
            heads = ("subject", "added_at", "by", "reason")
            rows = [[entry[head] for head in heads] for entry in entries]
            show.table("in quarantine", heads, rows)
    elif chosen.action == "add":
        entry = cast("dict[str, Any]", answer["entry"])
        print(f"{entry['subject']} is refused from now on; its streams end within 1 s")
    else:
        print(f"{answer['subject']} is let in again")


def _in_the_file(settings: Settings, request: Mapping[str, str]) -> dict[str, object]:
    identity.harden_process()
    with (
        config.obtain_identity(settings) as source,
        config.open_log(settings, "quarantine", "cli", source) as log,
    ):
        who = source.current().svid.id
        if who not in settings.identity.admins:
            log.event("quarantine-refused", by=who, **request)
            raise IdentityError(
                f"this process is {who}, and [identity] admins names "
                f"{', '.join(settings.identity.admins) or 'nobody'}"
            )
        return _done(settings, request, who, log)


def _done(
    settings: Settings, request: Mapping[str, str], who: str, log: Log
) -> dict[str, object]:
    def told(kind: str, fields: Mapping[str, object]) -> None:
        log.event(kind, **fields)

    path = settings.identity.quarantine
    match request:
        case {"subject": subject, "reason": reason}:
            entry = quarantine_file.add(
                path, subject, reason=reason, by=who, on_event=told
            )
            return {"entry": asdict(entry)}
        case {"subject": subject}:
            gone = quarantine_file.remove(path, subject, by=who, on_event=told)
            return {"subject": gone}
        case _:
            return {"entries": [asdict(e) for e in quarantine_file.read(path) or ()]}
