"""The log of one process: records of calls, events, and counted refusals."""

import os
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Self

from ztserve.audit import lines
from ztserve.audit.chain import Chain
from ztserve.audit.record import Record
from ztserve.audit.refusals import Refusals
from ztserve.errors import AuditError, CallError
from ztserve.types import Call

MIB = 1024 * 1024


class Log:
    """An append-only audit log; close it, or use it in a `with`.

    `path` is made with mode 600 in a directory of mode 700, and continued where it is
    there. `origin` says who writes: service, replica, SPIFFE ID. At most `max_bytes`
    are kept in its files; when only `reserve_bytes` of them are left, calls can no
    longer be answered, but refusals and events are still written.

    Any number of threads may use it, one process at a time. Raises AuditError.
    """

    def __init__(
        self,
        path: Path,
        *,
        origin: Mapping[str, str],
        max_bytes: int = 8192 * MIB,
        reserve_bytes: int = 256 * MIB,
        segment_bytes: int = 256 * MIB,
    ) -> None:
        self._origin = {**origin, "pid": str(os.getpid())}
        self._chain = Chain(
            Path(path),
            self._header,
            max_bytes=max_bytes,
            reserve_bytes=reserve_bytes,
            segment_bytes=segment_bytes,
        )
        self._refusals = Refusals()
        self._flushing = Lock()
        self._closed = Event()
        self._ticker: Thread | None = None

    def record(self, call: Call) -> Record:
        """Open the record of `call`; use it in a `with`, around all that is done."""
        return Record(call, self._write)

    def event(self, kind: str, /, **fields: object) -> None:
        """Write what happened to the service itself: start, model, policy, stop."""
        self._chain.append(lines.event(kind, fields), reserved=True)

    def refused(
        self, path: str, error: CallError, *, principal: str, address: str
    ) -> None:
        """Write that a call was refused before there could be a record of it.

        `principal` is "" where no identity held: then the host of `address`
        (``host:port``) stands for it. Floods are counted, as for records.
        """
        who = principal or address.rpartition(":")[0]
        if not self._counted(who, type(error).__name__):
            fields = lines.refused(path, error, principal, address)
            self._append(who, fields, reserved=True)

    def refused_handshakes(self, cause: str, count: int, address: str = "") -> None:
        """Write that `count` connections ended before there was a call."""
        fields = lines.handshakes(cause, count, address)
        self._chain.append(fields, reserved=True)

    def bear(self, deployment: str) -> None:
        """Have each line from now on bear the digest of the deployment bundle."""
        self._chain.common = lines.labels(deployment)

    def flush(self) -> None:
        """Write what has been counted; this also happens once a second by itself."""
        with self._flushing:
            self._refusals.flush(self._append_reserved)

    def close(self) -> None:
        """Write what has been counted, and close the files."""
        self._closed.set()
        if self._ticker is not None:
            self._ticker.join()
        try:
            self.flush()
        finally:
            self._chain.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _header(self, number: int) -> str:
        origin = {"schema": lines.SCHEMA, "segment": number, "origin": self._origin}
        return lines.event("log-opened", origin)

    def _append_reserved(self, fields: str) -> None:
        self._chain.append(fields, reserved=True)

    def _write(self, record: Record) -> None:
        principal = record.call.peer.id
        refused = record.outcome in ("refused", "cancelled")
        # A stream that began has a line already; what left with it must have its end.
        if refused and not record.announced and self._counted(principal, record.error):
            return
        if record.outcome == "unfinished":
            # Not counted where it fails: the end of the call is still to come.
            self._chain.append(lines.call(record))
        else:
            self._append(principal, lines.call(record), reserved=refused)

    def _counted(self, principal: str, error: str) -> bool:
        """Count a refusal that gets no line of its own."""
        if self._closed.is_set():
            raise AuditError("the audit log is closed: no call can be recorded")
        if self._refusals.is_line(principal, error):
            return False
        self._tick()
        return True

    def _append(self, principal: str, fields: str, *, reserved: bool) -> None:
        """Write the line of a call; one that cannot be written is counted at least."""
        try:
            self._chain.append(fields, reserved=reserved)
        except AuditError:
            if not self._closed.is_set():
                self._refusals.count(principal, "AuditError")
                self._tick()
            raise

    def _tick(self) -> None:
        """Have what is counted written within a second."""
        if self._ticker is None:
            with self._flushing:
                if self._ticker is None:
                    self._ticker = Thread(
                        target=self._keep_flushing, name="ztserve-audit", daemon=True
                    )
                    self._ticker.start()

    def _keep_flushing(self) -> None:
        while not self._closed.wait(1):
            try:
                self.flush()
            except AuditError:
                # The counts are kept and tried again; calls are refused meanwhile.
                continue
