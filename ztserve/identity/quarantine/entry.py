"""Who is in quarantine, since when and why, as JSON.

::

    {"version": 1, "entries": [{"subject": "spiffe://td/ns/x/sa/y", "reason": "...",
                                "added_at": "2026-01-31T12:00:00Z", "by": "..."}]}
"""

import json
from dataclasses import asdict, dataclass, fields
from datetime import datetime

from ztserve.errors import IdentityError
from ztserve.identity.jwk import json_object
from ztserve.identity.spiffe_id import MAX_BYTES, SCHEME, workload_id

MAX_FILE_BYTES = 512 * 1024
MAX_ENTRIES = 4096
MAX_REASON = 200
"""In characters."""
MAX_SERIAL_DIGITS = 40  # RFC 5280, 4.1.2.2: 20 octets

_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Entry:
    """One principal, or one certificate, that is shut out."""

    subject: str
    """A SPIFFE ID, or a certificate's serial number in lower-case hex."""
    reason: str
    added_at: str
    """RFC 3339, UTC."""
    by: str
    """Who added it."""

    def __post_init__(self) -> None:
        if subject(self.subject) != self.subject:
            raise IdentityError(f"{self.subject!r} is not written canonically")
        for name, text, most in (
            ("reason", self.reason, MAX_REASON),
            ("by", self.by, MAX_BYTES),
        ):
            if not 0 < len(text) <= most or not text.isprintable():
                raise IdentityError(
                    f"{name}: expected 1 to {most} printable characters, "
                    f"got {text!r:.60}"
                )
        _check_time(self.added_at)

    @property
    def key(self) -> str | int:
        """What a peer is looked up by: its ID, or its certificate's serial number."""
        by_id = self.subject.startswith(SCHEME)
        return self.subject if by_id else int(self.subject, 16)


def subject(text: str) -> str:
    """Return a SPIFFE ID, or a serial in hex (colons allowed), as it is kept.

    A serial shuts out that certificate, whichever authority issued it. Raises
    IdentityError.
    """
    if text.startswith(SCHEME):
        return workload_id(text)
    digits = text.replace(":", "").lower()
    if not 0 < len(digits) <= MAX_SERIAL_DIGITS or not _HEX.issuperset(digits):
        raise IdentityError(
            f"{text!r:.100} is neither a SPIFFE ID (spiffe://...) nor a certificate's "
            f"serial number (at most {MAX_SERIAL_DIGITS} hex digits)"
        )
    return f"{int(digits, 16):x}"


def parse(raw: bytes) -> tuple[Entry, ...]:
    """Return the entries in `raw`, whatever it is. Raises IdentityError."""
    document = json_object(raw, "the list", MAX_FILE_BYTES)
    listed = document.get("entries")
    if not isinstance(listed, list) or document != {"version": 1, "entries": listed}:
        raise IdentityError('expected {"version": 1, "entries": [...]} and no more')
    if len(listed) > MAX_ENTRIES:
        raise IdentityError(f"{len(listed)} entries, at most {MAX_ENTRIES} are allowed")
    entries = tuple(_entry(number, one) for number, one in enumerate(listed))
    if len({entry.subject for entry in entries}) < len(entries):
        raise IdentityError("a subject is listed twice")
    return entries


_NAMES = tuple(field.name for field in fields(Entry))


def _entry(number: int, item: object) -> Entry:
    if not isinstance(item, dict) or set(item) != set(_NAMES):
        raise IdentityError(f"entry {number}: expected just {', '.join(_NAMES)}")
    if not all(isinstance(value, str) for value in item.values()):
        raise IdentityError(f"entry {number}: expected texts only")
    try:
        return Entry(**item)
    except IdentityError as error:
        raise IdentityError(f"entry {number}: {error}") from None


def _check_time(text: str) -> None:
    try:
        offset = datetime.fromisoformat(text).utcoffset()
    except ValueError:
        offset = None
    if offset is None or offset:
        raise IdentityError(f"added_at: {text!r:.60} is no time in UTC (RFC 3339)")


def document(entries: tuple[Entry, ...]) -> bytes:
    """Return `entries` as `parse` reads them. IdentityError where they do not fit."""
    whole = {"version": 1, "entries": [asdict(entry) for entry in entries]}
    raw = json.dumps(whole, indent=1).encode() + b"\n"
    if len(raw) > MAX_FILE_BYTES or len(entries) > MAX_ENTRIES:
        raise IdentityError(
            f"full ({MAX_ENTRIES} entries, {MAX_FILE_BYTES} bytes): remove "
            "serials of SVIDs that have expired"
        )
    return raw
