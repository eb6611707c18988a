"""What happened? An append-only log with one record around every call.

`Log` writes JSON lines, each before the reply that it describes may leave. Every line
carries the hash of the one before, so `verify_log` finds edits, deletions and
insertions by whoever does not rewrite all that follows. Without a trusted key or an
outside checkpoint that is "self-consistent", and never more.
"""

from ztserve.audit.log import Log
from ztserve.audit.reader import AuditReport, read, verify_log
from ztserve.audit.record import Record

__all__ = ["AuditReport", "Log", "Record", "read", "verify_log"]
