"""What the registry door and its callers say to each other, and how much at most."""

from collections.abc import Mapping
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from ztserve.artifacts import Resolved
from ztserve.doors.v1 import registry_pb2 as pb
from ztserve.errors import ConfigError, InvalidInput
from ztserve.types import ModelRef, Operation

SERVICE = "/ztserve.v1.Registry/"
VERBS = ("Resolve", "Signature", "Release", "Attestations", "Files", "Read")
"""All that there is: none of them writes."""
HEADER = "ztserve-model"
"""The metadata in which a call names its model, to be judged before its message."""

MAX_REQUEST_BYTES = 64 << 10
MAX_READ_BYTES = 4 << 20
"""Of a file, in one answer."""
MAX_LIST_BYTES = 4 << 20
"""Of the names and sizes of a model's files."""
MAX_STATEMENT_BYTES = 16 << 20
"""Of a signature, or of all attestations of a model together."""
MAX_OVERHEAD_BYTES = 64 << 10
"""Of an answer, beside what it carries."""
_ENTRY_TAG = 1 << 3 | 2
_CONTENT_TAG = pb.Content.DATA_FIELD_NUMBER << 3 | 2

M = TypeVar("M", bound=Message)


def operation(verb: str, headers: Mapping[str, str]) -> Operation:
    """Return the operation that a call is, by the model that its metadata name.

    Raises InvalidInput where they name none, or two.
    """
    name = named_model(headers)
    title = f"/v1/registry/{name}/{verb.lower()}"
    names = (SERVICE + verb, f"/v1/registry/{name}", title)
    return Operation("GET", frozenset(names), title)


def named_model(headers: Mapping[str, str]) -> str:
    """Return the name of the model that a call is about; raises InvalidInput."""
    name = headers.get(HEADER, "")
    if reference(name).text != reference(name).name:
        raise InvalidInput(f"metadata {HEADER}: {name!r:.200} is no bare model name")
    return name


def reference(text: str) -> ModelRef:
    """Return a model reference that came over the wire; raises InvalidInput."""
    try:
        return ModelRef(text[:512])
    except ConfigError as error:
        raise InvalidInput(str(error)) from None


def model_message(model: Resolved) -> pb.Model:
    """Return a model as it travels."""
    return pb.Model(name=model.name, version=model.version, digest=model.digest)


def parse(kind: type[M], message: bytes | memoryview) -> M:
    """Return `message` as one of `kind`; raises InvalidInput."""
    try:
        return kind.FromString(bytes(message))
    except DecodeError:
        raise InvalidInput(
            f"the message is not a valid {kind.__name__} of ztserve.v1.Registry"
        ) from None


def check_count(message: bytes, most: int) -> None:
    """Raise InvalidInput where a list has more than `most` entries.

    It is asked before the message is parsed, which would make an object of 48 bytes
    of each two. A list is a message of one repeated field, numbered 1.
    """
    at = count = 0
    while at < len(message):
        count += 1
        if count > most:
            raise InvalidInput(f"a list of more than {most} entries")
        if message[at] != _ENTRY_TAG:
            raise InvalidInput(f"a list with the tag {message[at]}")
        size = shift = 0
        for byte in message[at + 1 : at + 6]:
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        at += 1 + shift // 7 + size


def content_head(size: int) -> bytes:
    """Return what stands before the `size` bytes of a Content's one field.

    protobuf itself would copy them three times.
    """
    head = bytearray((_CONTENT_TAG,))
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    head.append(size)
    return bytes(head)


def content(message: bytes, size: int) -> memoryview:
    """Return the data of a Content, without a copy, which must have `size` bytes.

    Raises InvalidInput for another size, and for what no door of ours would send.
    """
    head = content_head(size)
    if len(message) != len(head) + size or not message.startswith(head):
        raise InvalidInput(
            f"answers {len(message)} bytes that are no Content of {size} bytes"
        )
    return memoryview(message)[len(head) :]
