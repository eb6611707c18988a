r"""The fields of a line, and how they are written.

Names follow OCSF 1.x (https://schema.ocsf.io): class 6003 API Activity for calls,
6002 Application Lifecycle for events, 3002 Authentication for refused handshakes;
what OCSF has no name for is under `unmapped`. A line is pure ASCII: what is not, and
every control character, is escaped, so that no value can begin a line or move a
terminal's cursor. Contents of requests and replies are never written.

====================================  ===========================================
field                                 meaning
====================================  ===========================================
seq                                   1, 2, 3, ... through all segments of a log
prev                                  SHA-256 (hex) of the line before, without
                                      its newline; zeros before the first
time                                  RFC 3339, UTC, microseconds: when written
class_uid                             6003, 6002 or 3002
activity_name                         of an event: which
count                                 how many refusals one line stands for
start_time                            when the first of them came
status                                released, refused, failed, cancelled, or
                                      unfinished (a stream that has begun)
status_id                             1 released, 0 unfinished, 2 all else
status_code                           class of the error, e.g. Denied
status_detail                         its reason, which the caller is not told
metadata.labels                       ``deployment:sha256:...``, the digest of the
                                      deployment bundle, once it is verified
actor.user.uid                        SPIFFE ID of the peer, proved by mTLS
actor.user.credential_uid             serial of its certificate, hex
src_endpoint.ip, .port                where the connection came from
api.operation                         e.g. /v1/predict
api.request.uid                       id of the call, made by the server
unmapped.caller                       end user: issuer, subject, and proof, which
                                      says by whom it is asserted; or null
unmapped.policy.rule, .shadow         rule that decided; rules that would have
unmapped.model.name, .version,        what was served
.digest
unmapped.request_id                   the caller's own id: data, not a key
unmapped.resource                     what of the model was read, e.g. a file and
                                      its bytes; absent where nothing was
unmapped.rows, .bytes_in, .bytes_out  sizes
unmapped.findings                     what was redacted: kind to count
unmapped.stages_us                    microseconds by stage
unmapped.total_us                     microseconds from arrival to this line
unmapped.notes                        what was dropped from the call on its way in
unmapped.origin                       of log-opened: service, replica, id, pid
unmapped.schema, .segment             of log-opened: version of this table; which
                                      file of the log
unmapped.bytes, .sha256               of torn: the incomplete lines right above,
                                      left by a write that failed or died
====================================  ===========================================
"""

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from json.encoder import encode_basestring_ascii as _escape
from typing import TYPE_CHECKING, Any

from ztserve.errors import CallError
from ztserve.types import now

if TYPE_CHECKING:
    from ztserve.audit.record import Record

SCHEMA = "ztserve-audit/1"
FIRST_PREV = "0" * 64
MAX_LINE_BYTES = 256 * 1024
"""No line is longer: every value is clipped, and an escaped character has <= 12."""
MAX_ITEMS = 32
TORN_MARK = b" torn\n"
"""Closes an incomplete line so that it can never be read as a record."""

_STATUS_ID = {"released": 1, "unfinished": 0}


def text(value: str, limit: int = 512) -> str:
    """Return `value` as a JSON string in ASCII, clipped to `limit` characters."""
    return _escape(value if len(value) <= limit else value[:limit] + "…")


# What seldom changes from call to call is kept: escaping it anew would cost half of
# the whole record. Bounded, so that hostile variety costs time, not memory.


@lru_cache(maxsize=4)
def _second(
    year: int, month: int, day: int, hour: int, minute: int, second: int
) -> str:
    return f"{year:04d}-{month:02d}-{day:02d}T{hour:02d}:{minute:02d}:{second:02d}"


def clock() -> str:
    """Return the time as the log writes it."""
    at = now()
    second = _second(at.year, at.month, at.day, at.hour, at.minute, at.second)
    return f"{second}.{at.microsecond:06d}Z"


@lru_cache(maxsize=256)
def _kind(name: str) -> str:
    return text(name, 64)


def _array(values: tuple[str, ...]) -> str:
    return ",".join([text(value, 256) for value in values[:8]])


def _counts(counts: Mapping[str, int]) -> str:
    pairs = list(counts.items())[:MAX_ITEMS]
    return ",".join([f"{_kind(kind)}:{int(n)}" for kind, n in pairs])


@lru_cache(maxsize=256)
def _source(peer: str, serial: int, ip: str) -> str:
    return (
        f'"actor":{{"user":{{"uid":{text(peer, 2048)},"credential_uid":"{serial:x}"}}}}'
        f',"src_endpoint":{{"ip":{text(ip, 64)},"port":'
    )


@lru_cache(maxsize=256)
def _caller(issuer: str, subject: str, proof: str) -> str:
    return (
        f'{{"issuer":{text(issuer)},"subject":{text(subject)}'
        f',"proof":{text(proof, 2304)}}}'
    )


@lru_cache(maxsize=256)
def _served(
    rule: str, shadow: tuple[str, ...], model: str, version: str, digest: str
) -> str:
    return (
        f'"policy":{{"rule":{text(rule)},"shadow":[{_array(shadow)}]}}'
        f',"model":{{"name":{text(model, 128)},"version":{text(version, 128)}'
        f',"digest":{text(digest, 128)}}}'
    )


def call(record: "Record") -> str:
    """Return the fields of a call's line."""
    it = record.call
    end_user = it.caller
    caller = (
        "null"
        if end_user is None
        else _caller(end_user.issuer, end_user.subject, end_user.proof)
    )
    read = f',"resource":{text(record.resource)}' if record.resource else ""
    served = _served(
        record.rule, tuple(record.shadow), record.model, record.version, record.digest
    )
    findings = _counts(record.findings) if record.findings else ""
    notes = _array(it.notes) if it.notes else ""
    stages = ",".join(
        [
            f"{_kind(name)}:{int(seconds * 1e6)}"
            for name, seconds in list(record.stages.items())[:MAX_ITEMS]
        ]
    )
    return (
        f'"time":"{clock()}","class_uid":6003,"status":"{record.outcome}"'
        f',"status_id":{_STATUS_ID.get(record.outcome, 2)}'
        f',"status_code":{text(record.error, 64)}'
        f',"status_detail":{text(record.reason, 1024)}'
        f",{_source(it.peer.id, it.peer.serial, it.source_ip)}{int(it.source_port)}}}"
        f',"api":{{"operation":{text(it.operation.title)}'
        f',"request":{{"uid":{text(it.id, 128)}}}}}'
        f',"unmapped":{{"caller":{caller},{served}'
        f',"request_id":{text(record.request_id, 64)}{read},"rows":{int(record.rows)}'
        f',"bytes_in":{int(record.bytes_in)},"bytes_out":{int(record.bytes_out)}'
        f',"findings":{{{findings}}},"stages_us":{{{stages}}}'
        f',"total_us":{int(record.seconds() * 1e6)},"notes":[{notes}]}}'
    )


def refused(operation: str, error: CallError, principal: str, address: str) -> str:
    """Return the fields of a line for a call refused before it was one."""
    ip, _, port = address.rpartition(":")
    number = int(port) if port.isascii() and port.isdigit() and len(port) < 6 else 0
    return (
        f'"time":"{clock()}","class_uid":6003,"status":"refused","status_id":2'
        f',"status_code":{text(type(error).__name__, 64)}'
        f',"status_detail":{text(str(error.reason), 1024)}'
        f',"actor":{{"user":{{"uid":{text(principal, 2048)}}}}}'
        f',"src_endpoint":{{"ip":{text(ip, 64)},"port":{number}}}'
        f',"api":{{"operation":{text(operation)}}}'
    )


def refusals(principal: str, error: str, count: int, since: str) -> str:
    """Return the fields of a line that stands for `count` refusals."""
    return (
        f'"time":"{clock()}","class_uid":6003,"status":"refused","status_id":2'
        f',"status_code":{text(error, 64)},"count":{count},"start_time":"{since}"'
        f',"actor":{{"user":{{"uid":{text(principal, 2048)}}}}}'
    )


def handshakes(cause: str, count: int, address: str) -> str:
    """Return the fields of a line that stands for `count` refused handshakes."""
    return (
        f'"time":"{clock()}","class_uid":3002,"status":"refused","status_id":2'
        f',"status_code":"handshake","status_detail":{text(cause)},"count":{int(count)}'
        f',"src_endpoint":{{"ip":{text(address, 64)}}}'
    )


def _plain(value: object, depth: int = 0) -> object:
    """Bound `value` to what JSON can say; anything else becomes a string."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # Beyond 64 bits, as a serial number is, readers of JSON would round it.
        return value if abs(value) < 2**63 else f"{value:x}"[:2048]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping) and depth < 2:
        pairs = list(value.items())[:MAX_ITEMS]
        return {str(key)[:64]: _plain(item, depth + 1) for key, item in pairs}
    if isinstance(value, (list, tuple, set, frozenset)) and depth < 2:
        return [_plain(item, depth + 1) for item in list(value)[:MAX_ITEMS]]
    return str(value)[:2048]


def event(kind: str, fields: Mapping[str, object]) -> str:
    """Return the fields of an event's line."""
    unmapped = json.dumps(_plain(fields), separators=(",", ":"))
    if len(unmapped) > MAX_LINE_BYTES // 2:
        # Too much to keep: that it happened is kept, and that something is missing.
        unmapped = f'{{"dropped_bytes":{len(unmapped)}}}'
    return (
        f'"time":"{clock()}","class_uid":6002,"activity_name":{text(kind, 64)}'
        f',"unmapped":{unmapped}'
    )


def labels(deployment: str) -> str:
    """Return the member that names the deployment bundle, for the end of a line."""
    return f',"metadata":{{"labels":[{text("deployment:" + deployment, 96)}]}}'


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the record that `line` holds (without its newline), or None."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict):
        return None
    seq, prev = fields.get("seq"), fields.get("prev")
    return fields if type(seq) is int and isinstance(prev, str) else None
