"""How a manifest cuts a model into what is hashed: whole files, or shards of them.

OpenSSF Model Signing v1.0, `serialization`, with its methods `files` and `shards` and
its hash types sha256 and blake3 (blake2b is refused: its own reference verifier cannot
tell it from the bundle, and it is slower than SHA-256 with the processor's help).
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

from ztserve.artifacts.statements.strict import Malformed, Object, get, only
from ztserve.errors import VerificationError

HashType: TypeAlias = Literal["sha256", "blake3"]
HASH_TYPES: tuple[HashType, ...] = get_args(HashType)
Method: TypeAlias = Literal["files", "shards"]
METHODS: tuple[Method, ...] = get_args(Method)
Span: TypeAlias = tuple[int, int]
"""First byte and the one after the last, counted from the beginning of a file."""

MAX_SHARD_BYTES = 1 << 50
_SHARD = re.compile(r"([^:]+):(0|[1-9][0-9]{0,15}):([1-9][0-9]{0,15})\Z")


class Hash(Protocol):
    """A hash in the making, as of hashlib."""

    def update(self, data: memoryview, /) -> object:
        """Go on with these bytes."""

    def hexdigest(self) -> str:
        """Return the 64 hex digits of all bytes so far."""


@dataclass(frozen=True, slots=True)
class Serialization:
    """What each digest of a manifest is over, and which hash it is.

    Raises Malformed where no manifest can say so.
    """

    hash_type: HashType = "sha256"
    shard_size: int | None = None
    """Bytes of every shard but a file's last; None: whole files are hashed."""

    def __post_init__(self) -> None:
        size = self.shard_size
        if size is not None and not 0 < size <= MAX_SHARD_BYTES:
            raise Malformed(
                f"shard_size is {size!r}, expected a whole number of bytes from 1 to "
                f"{MAX_SHARD_BYTES}"
            )

    @property
    def method(self) -> Method:
        """The format's name for it."""
        return "files" if self.shard_size is None else "shards"

    @property
    def algorithms(self) -> tuple[str, ...]:
        """What a resource may call its hash; the first is what we write.

        For shards the reference implementation appends their size, which it then
        insists on; the specification names the hash alone.
        """
        if self.shard_size is None:
            return (self.hash_type,)
        return (f"{self.hash_type}-sharded-{self.shard_size}", self.hash_type)

    def spans(self, size: int) -> list[Span]:
        """Return what is hashed of a file of `size` bytes, in order, to its end.

        Nothing at all where the method is `shards` and the file is empty.
        """
        step = self.shard_size
        if step is None:
            return [(0, size)]
        return [(start, min(start + step, size)) for start in range(0, size, step)]

    def resource(self, file: str, span: Span) -> str:
        """Return the name by which a manifest lists a span of a file."""
        return file if self.shard_size is None else f"{file}:{span[0]}:{span[1]}"

    def new_hash(self) -> Hash:
        """Return a hash of this type over nothing yet.

        Raises VerificationError where the package that it needs is not installed.
        """
        if self.hash_type == "sha256":
            return hashlib.sha256()
        try:
            from blake3 import blake3
        except ImportError as error:
            raise VerificationError(
                "the digests are blake3, which is not installed here: pip install "
                "'ztserve[blake3]', or sign again with --hash sha256"
            ) from error
        return blake3()


WHOLE_FILES = Serialization()
"""SHA-256 over whole files: what the format calls its default."""


def parse_serialization(node: Object) -> Serialization:
    """Parse the field `serialization` of a manifest; raises Malformed.

    What its `ignore_paths` may say is the manifest's business.
    """
    method, hash_type = get(node, "method", str), get(node, "hash_type", str)
    if method not in METHODS:
        raise Malformed(
            f"serialization method {method!r} is not supported: sign with method "
            "'files' or 'shards'"
        )
    extra = ("shard_size",) if method == "shards" else ()
    only(
        node,
        ("method", "hash_type", "allow_symlinks", "ignore_paths", *extra),
        "serialization",
    )
    if hash_type not in HASH_TYPES:
        raise Malformed(
            f"hash_type {hash_type!r} is not supported: sign with 'sha256' or 'blake3'"
        )
    check_links(node)
    return Serialization(hash_type, _shard_size(node) if extra else None)


def check_links(node: Object) -> None:
    """Raise Malformed where links were followed when signing."""
    if get(node, "allow_symlinks", bool):
        raise Malformed("allow_symlinks must be false: a link's target is not signed")


def _shard_size(node: Object) -> int:
    """Return `shard_size`: a number, or the float that the reference writes for it."""
    value = node.get("shard_size")
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise Malformed(f"shard_size is {value!r}, expected a whole number of bytes")
    return value


def parse_shard_name(name: str) -> tuple[str, Span]:
    """Return the file and the span of a resource ``path:start:end``.

    The numbers are canonical decimals. Raises Malformed.
    """
    match = _SHARD.match(name)
    if match is None:
        raise Malformed(f"the shard {name!r} is not named path:start:end")
    return match[1], (int(match[2]), int(match[3]))
