"""Reading a log, and finding what was changed in it."""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ztserve.audit import files
from ztserve.audit.lines import FIRST_PREV, MAX_LINE_BYTES, TORN_MARK, parse
from ztserve.errors import AuditError

_LIMITS = (
    "no key and no outside checkpoint was checked, so whoever can write the file could "
    "have rewritten it from any line on, and a cut of its end cannot be told"
)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What a log's own lines say of it."""

    status: Literal["self-consistent", "broken"]
    message: str
    records: int
    """Records that hold, from the first on."""
    first_seq: int
    last_seq: int
    last_hash: str
    """SHA-256 of the last record's line that holds: what a checkpoint would name."""
    torn: int
    """Incomplete lines: writes that failed or died, never acknowledged."""
    first_bad: int | None = None
    """Number of the first line that does not hold, in `bad_file`."""
    bad_file: Path | None = None


class _Broken(Exception):
    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class _Verifier:
    """Walks the lines of a log, in order; raises _Broken at the first that fails."""

    def __init__(self) -> None:
        self.records = self.first_seq = self.last_seq = self.torn = 0
        self.last_hash = FIRST_PREV
        self._torn_bytes = self._torn_at = 0
        self._torn_digest = sha256()

    def begin_anywhere(self) -> None:
        """Accept any first record: the files before it are not here."""
        self.last_hash = ""

    def walk(self, stream: BinaryIO, *, last: bool) -> None:
        """Check one file; only the `last` may end in an incomplete line."""
        number = 0
        for number, data in _lines(stream):
            record = parse(data[:-1]) if data.endswith(b"\n") else None
            if record is None:
                self._note_torn(number, data)
            else:
                self._check(number, record, sha256(data[:-1]).hexdigest())
        if self._torn_bytes and not last:
            raise _Broken(self._torn_at, "an incomplete line that nothing accounts for")
        if not number and not last:
            raise _Broken(1, "the file is empty, but others follow it")

    def _note_torn(self, number: int, data: bytes) -> None:
        if data.endswith(b"\n") and not data.endswith(TORN_MARK):
            raise _Broken(number, "not a record")
        self._torn_at = self._torn_at or number
        self._torn_bytes += len(data)
        self._torn_digest.update(data)
        self.torn += 1

    def _check(self, number: int, record: dict[str, Any], digest: str) -> None:
        if self._torn_bytes:
            self._check_torn(record)
        seq, prev = record["seq"], record["prev"]
        if self.last_hash:
            if seq != self.last_seq + 1:
                raise _Broken(
                    number, f"seq is {seq}, where {self.last_seq + 1} should follow"
                )
            if prev != self.last_hash:
                raise _Broken(
                    number,
                    "prev is not the hash of the line before: that line was changed, "
                    "or lines were removed, inserted or moved",
                )
        self.first_seq = self.first_seq or seq
        self.last_seq, self.last_hash = seq, digest
        self.records += 1

    def _check_torn(self, record: dict[str, Any]) -> None:
        claimed = record.get("unmapped")
        found = {"bytes": self._torn_bytes, "sha256": self._torn_digest.hexdigest()}
        if record.get("activity_name") != "torn" or claimed != found:
            raise _Broken(self._torn_at, "an incomplete line that nothing accounts for")
        self._torn_bytes = self._torn_at = 0
        self._torn_digest = sha256()


def verify_log(
    path: Path, *, trust: object = None, checkpoints: Sequence[object] = ()
) -> AuditReport:
    """Check that the log at `path`, with the files that continue it, holds together.

    Finds lines that were edited, deleted, inserted or put in another order. It cannot
    find a rewriting of all that follows, nor a cut of the end: "self-consistent" says
    no more than that. `path` may name a later file of a log whose first ones are
    elsewhere. Raises AuditError where it cannot be read, and where `trust` or
    `checkpoints` are given: they are not supported yet, and never ignored.
    """
    if trust is not None or checkpoints:
        raise AuditError(
            "verifying an audit log against a trust policy or checkpoints is not "
            "supported yet; leave both out to check that it is self-consistent"
        )
    path = Path(path)
    verifier = _Verifier()
    following = _following(path)
    if following[0] != _base(path):
        verifier.begin_anywhere()
    for file in following:
        try:
            with _open(file) as stream:
                verifier.walk(stream, last=file == following[-1])
        except _Broken as broken:
            where = f"{file}, line {broken.line}: {broken}"
            return _report(verifier, where, broken.line, file)
    if not verifier.records:
        return _report(verifier, f"{path} holds no record", 1, path)
    return _report(verifier)


def _report(
    verifier: _Verifier,
    failure: str = "",
    first_bad: int | None = None,
    bad_file: Path | None = None,
) -> AuditReport:
    seqs = f"{verifier.records} records, seq {verifier.first_seq}-{verifier.last_seq}"
    return AuditReport(
        status="broken" if failure else "self-consistent",
        message=failure or f"self-consistent ({seqs}): {_LIMITS}",
        records=verifier.records,
        first_seq=verifier.first_seq,
        last_seq=verifier.last_seq,
        last_hash=verifier.last_hash,
        torn=verifier.torn,
        first_bad=first_bad,
        bad_file=bad_file,
    )


def read(*paths: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of logs, each with the files that continue it, in order.

    Nothing is verified but that each line is a record: AuditError names the first
    that is not. Incomplete lines, never acknowledged, are passed over.
    """
    seen: set[Path] = set()
    for file in (file for path in paths for file in _following(Path(path))):
        if file in seen:
            continue
        seen.add(file)
        with _open(file) as stream:
            for number, data in _lines(stream):
                if not data.endswith(b"\n") or data.endswith(TORN_MARK):
                    continue
                record = parse(data[:-1])
                if record is None:
                    raise AuditError(f"{file}, line {number}: not an audit record")
                yield record


def _base(path: Path) -> Path:
    stem, _, number = path.name.rpartition(".")
    continues = stem and len(number) == 6 and number.isdigit()
    return path.with_name(stem) if continues else path


def _following(path: Path) -> list[Path]:
    """Return `path` and the files that continue it."""
    base = _base(path)
    try:
        numbers = files.numbers(base, path.parent)
    except OSError as error:
        raise AuditError(f"audit log {path}: {error.strerror}") from error
    found = [files.segment(base, number) for number in numbers]
    if path not in found:
        raise AuditError(f"audit log {path}: there is no such file")
    return found[found.index(path) :]


def _open(path: Path) -> BinaryIO:
    try:
        # Not blocking: a pipe in place of a log must not hang the reader.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise AuditError(f"audit log {path}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise AuditError(f"audit log {path} is not a plain file")
    return os.fdopen(fd, "rb")


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    number = 0
    while data := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        yield number, data
