"""The registry door: reads a registry for verified callers, each judged by policy.

A principal may be let to one model and not to another: each call names its model in the
metadata, is judged by that name before its message is read, and may not turn to another
one in the message. All but `Resolve` name the model's digest as well, and get nothing
unless the registry says that this very digest is the model of that name.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from ztserve.artifacts import Reader, Registry, Resolved
from ztserve.audit import Log, Record
from ztserve.authorization import PolicySet
from ztserve.doors import wire
from ztserve.doors.v1 import registry_pb2 as pb
from ztserve.errors import (
    InvalidInput,
    NotFound,
    RegistryError,
    Unavailable,
    VerificationError,
)
from ztserve.transport import Method
from ztserve.transport.methods import Read
from ztserve.types import Call, ModelRef, Operation

KNOWN_S = 30.0
"""How long it is remembered that a digest is the model of a name."""
MAX_KNOWN = 64

_Verb = Callable[[str, bytes, Record], bytes]
"""Given the name that was judged, the message and the record, returns the answer."""


@dataclass(frozen=True, slots=True)
class _Known:
    """A model that the registry said is of this name, and its files."""

    model: Resolved
    files: Mapping[str, int]
    """By name: size in bytes."""
    until: float
    """By `time.monotonic`; then the registry is asked again."""


class RegistryDoor:
    """Answers from `registry`, as far as `policies` let, and records it in `log`.

    Thread-safe, as far as `registry` is.
    """

    def __init__(self, registry: Registry, policies: PolicySet, log: Log) -> None:
        self._registry = registry
        self._policies = policies
        self._log = log
        self._known: dict[Resolved, _Known] = {}
        self._verbs: Mapping[str, _Verb] = {
            "Resolve": self._resolve,
            "Signature": self._signature,
            "Release": self._release,
            "Attestations": self._attestations,
            "Files": self._files,
            "Read": self._read,
        }

    def answer(self, verb: str, call: Call, read: Read) -> bytes:
        """Judge a call, then read its message, answer and record it.

        Raises CallError for a refusal, AuditError where it cannot be recorded.
        """
        name = wire.named_model(call.headers)
        with self._log.record(call) as record:
            record.model = name
            decision = self._policies.authorize(call)
            record.rule, record.shadow = decision.rule, decision.shadow
            record.stage("authorization")
            message = read()
            record.bytes_in = len(message)
            with _told(name):
                answer = self._verbs[verb](name, message, record)
            record.bytes_out = len(answer)
            record.stage("registry")
            record.described()
        return answer

    # --- what is meant ------------------------------------------------------------

    def _resolve(self, name: str, message: bytes, record: Record) -> bytes:
        ref = wire.reference(wire.parse(pb.ResolveRequest, message).reference)
        check_named(name, ref.name)
        record.resource = str(ref)
        found = self._registry.resolve(ref)
        check_same(found, Resolved(name, found.version, found.digest), ref)
        record.version, record.digest = found.version, found.digest
        return wire.model_message(found).SerializeToString()

    def _model(self, name: str, sent: pb.Model, record: Record) -> _Known:
        """Return the model that a message names. Raises InvalidInput or NotFound."""
        try:
            model = Resolved(sent.name, sent.version, sent.digest)
        except RegistryError:
            raise InvalidInput(
                f"no model: name {sent.name!r:.200}, version {sent.version!r:.200}, "
                f"digest {sent.digest!r:.200}"
            ) from None
        check_named(name, model.name)
        record.version, record.digest = model.version, model.digest
        known = self._known.get(model)
        if known is None or known.until < time.monotonic():
            check_same(self._registry.resolve(model.ref), model, model.ref)
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            files = self._registry.files(model)
            known = _Known(model, files, time.monotonic() + KNOWN_S)
            self._known[model] = known
        return known

    def _asked(self, name: str, message: bytes, record: Record) -> Resolved:
        sent = wire.parse(pb.ModelRequest, message).model
        return self._model(name, sent, record).model

    # --- what it has --------------------------------------------------------------

    def _signature(self, name: str, message: bytes, record: Record) -> bytes:
        bundle = self._registry.signature(self._asked(name, message, record))
        return pb.Statement(bundle=bundle).SerializeToString()

    def _release(self, name: str, message: bytes, record: Record) -> bytes:
        bundle = self._registry.release(self._asked(name, message, record))
        return pb.Statement(bundle=bundle).SerializeToString()

    def _attestations(self, name: str, message: bytes, record: Record) -> bytes:
        found = self._registry.attestations(self._asked(name, message, record))
        total = sum(map(len, found.values()))
        if total > wire.MAX_STATEMENT_BYTES:
            raise RegistryError(
                f"{len(found)} attestations of {total} bytes, more than the "
                f"{wire.MAX_STATEMENT_BYTES} that one answer holds"
            )
        return pb.AttestationList(
            attestations=[
                pb.Attestation(name=name, bundle=bundle)
                for name, bundle in found.items()
            ]
        ).SerializeToString()

    def _files(self, name: str, message: bytes, record: Record) -> bytes:
        sent = wire.parse(pb.ModelRequest, message).model
        files = self._model(name, sent, record).files
        listed = [pb.File(name=file, size=size) for file, size in files.items()]
        return pb.FileList(files=listed).SerializeToString()

    def _read(self, name: str, message: bytes, record: Record) -> bytes:
        asked = wire.parse(pb.ReadRequest, message)
        known = self._model(name, asked.model, record)
        record.resource = f"{asked.name:.400}[{asked.offset}:+{asked.length}]"
        size = listed_size(known.files, asked.name)
        check_range(asked.offset, asked.length, size)
        with self._registry.open(known.model, asked.name) as reader:
            if reader.size != size:
                raise RegistryError(
                    f"{asked.name!r} has {reader.size} bytes where {size} were listed"
                )
            return _content(reader, asked.offset, asked.length)


def registry_methods(door: RegistryDoor) -> tuple[Method, ...]:
    """Return the methods of a registry door."""
    return tuple(
        Method(
            wire.SERVICE + verb,
            Operation("GET", frozenset({wire.SERVICE + verb}), wire.SERVICE + verb),
            answer=partial(door.answer, verb),
            named=partial(wire.operation, verb),
        )
        for verb in wire.VERBS
    )


# --- checks -----------------------------------------------------------------------


def check_named(judged: str, named: str) -> None:
    """Raise InvalidInput where a message names another model than was judged."""
    if named != judged:
        raise InvalidInput(
            f"the message names the model {named!r:.200}, and the metadata "
            f"{wire.HEADER} name {judged!r}: a call is about one model"
        )


def check_same(found: Resolved, asked: Resolved, ref: ModelRef) -> None:
    """Raise NotFound unless the registry has released the very model asked for."""
    if found != asked or not found.version:
        what = f"{found.name}:{found.version or '(not released)'}@{found.digest}"
        raise NotFound(
            f"there is no {ref} here, released under this name",
            f"asked for {ref}, the registry has {what}",
        )


def listed_size(files: Mapping[str, int], name: str) -> int:
    """Return the size of one of the model's own files; NotFound for any other name."""
    if name not in files:
        raise NotFound(f"the model has no file {name!r:.200}")
    return files[name]


def check_range(offset: int, length: int, size: int) -> None:
    """Raise InvalidInput unless a range is within the file and small enough."""
    if not 0 < length <= wire.MAX_READ_BYTES:
        raise InvalidInput(
            f"length {length}: expected 1 to {wire.MAX_READ_BYTES} bytes in one read"
        )
    if offset + length > size:
        raise InvalidInput(
            f"bytes {offset} to {offset + length} of a file that has {size}"
        )


def _content(reader: Reader, offset: int, length: int) -> bytes:
    """Return a Content that holds `length` bytes from `offset`."""
    head = wire.content_head(length)
    answer = bytearray(len(head) + length)
    answer[: len(head)] = head
    view = memoryview(answer)[len(head) :]
    filled = 0
    while filled < length:
        read = reader.read_into(view[filled:], offset + filled)
        if not 0 < read <= length - filled:
            raise RegistryError(
                f"ends after {offset + filled} bytes, short of its size"
            )
        filled += read
    return bytes(answer)


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Tell the caller that the registry failed, and the audit alone where and how."""
    try:
        yield
    except VerificationError as error:
        public = f"what the registry has of {name} is not, or not whole, a signed model"
        raise NotFound(public, f"{public}: {error}") from error
    except (RegistryError, OSError) as error:
        public = f"the registry behind this door is away, or has no such {name}"
        raise Unavailable(public, f"{public}: {error}") from error
