"""An OCI image layout on disk as a registry (OCI image-spec v1.1, image-layout).

One index.json lists the models by annotations; all else is addressed by digest. Each
model is an image manifest whose layers are its files, titled with their names, and
its two signature bundles; attestations refer to it. Copies to and from OCI registries
with stock tools.
"""

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ztserve.artifacts.registry.files import FileReader, open_file, read_file
from ztserve.artifacts.registry.protocol import Resolved
from ztserve.artifacts.registry.referrers import (
    MAX_REFERRER_BYTES,
    OF,
    parse_bundle_layer,
    parse_referrers,
)
from ztserve.artifacts.statements.attestation import MAX_ATTESTATION_BYTES
from ztserve.artifacts.statements.envelope import MAX_BUNDLE_BYTES
from ztserve.artifacts.statements.manifest import (
    MAX_FILES,
    RELEASE_FILE,
    SIGNATURE_FILE,
    SIGNATURE_FILES,
)
from ztserve.artifacts.statements.strict import (
    Malformed,
    Object,
    as_object,
    get,
    get_objects,
    load_object,
)
from ztserve.errors import RegistryError, VerificationError
from ztserve.types import ModelRef

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
MAX_INDEX_BYTES = 4 << 20
MAX_MODELS = 10_000
MAX_BLOB_BYTES = 1 << 50
MAX_REMEMBERED = 64
"""Models whose files are remembered between `resolve` and the other verbs."""
IMAGE_MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
TITLE = "org.opencontainers.image.title"
NAME = "dev.ztserve.model.name"
VERSION = "dev.ztserve.model.version"
DIGEST = "dev.ztserve.model.digest"
ALIASES = "dev.ztserve.model.aliases"
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")


@dataclass(frozen=True, slots=True)
class Blob:
    """A descriptor: content by digest, with the size that it is said to have."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A model in the index: what it claims to be, and where its manifest is."""

    model: Resolved
    aliases: frozenset[str]
    manifest: Blob


@dataclass(frozen=True, slots=True)
class Index:
    """index.json as it was read, and what it says."""

    raw: bytes
    models: list[Entry]
    referrers: list[Object]


class LayoutRegistry:
    """Read-only access to the models of an OCI image layout.

    The index is read each time, and parsed where it has changed: with thousands of
    models that takes most of a second, which a caller of a door could ask for again
    and again. Thread-safe.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._layers: dict[Resolved, tuple[Blob, Mapping[str, Blob]]] = {}
        self._known: Index | None = None
        self._parsing = threading.Lock()

    def __repr__(self) -> str:
        return f"LayoutRegistry({str(self._root)!r})"

    def resolve(self, ref: ModelRef) -> Resolved:
        """Find the model in the index; without version, alias or digest: the last.

        The other verbs answer as of the last `resolve` of their model. Raises
        RegistryError where there is no such model.
        """
        name = ref.name  # found anew at each use
        found = [e for e in self._index().models if e.model.name == name]
        if not found:
            raise RegistryError(
                f"{self._root} has no model {ref.name!r}: publish it with `ztserve "
                f"publish FOLDER {ref.name}:VERSION`"
            )
        latest = ", ".join(f"{ref.name}:{e.model.version}" for e in found[-5:])
        if ref.version is not None:
            found = [e for e in found if e.model.version == ref.version]
        if ref.digest is not None:
            found = [e for e in found if e.model.digest == ref.digest]
        if ref.alias is not None:
            found = [e for e in found if ref.alias in e.aliases]
            if len(found) > 1:
                raise RegistryError(f"{self._root}: {ref} is ambiguous")
        if not found:
            raise RegistryError(f"{self._root} has no {ref}; it has {latest}")
        entry = found[-1]
        known = self._layers.get(entry.model)
        if known is None or known[0] != entry.manifest:
            raw = read_blob(self._root, entry.manifest, limit=MAX_INDEX_BYTES)
            layers = parse_layers(raw, f"{ref}")
            if len(self._layers) >= MAX_REMEMBERED:
                self._layers.clear()
            self._layers[entry.model] = (entry.manifest, layers)
        return entry.model

    def signature(self, model: Resolved) -> bytes:
        """Return the model's signature; VerificationError if it has none."""
        return self._bundle(model, SIGNATURE_FILE, "signed")

    def release(self, model: Resolved) -> bytes:
        """Return the model's release; VerificationError if it has none."""
        return self._bundle(model, RELEASE_FILE, "released")

    def attestations(self, model: Resolved) -> Mapping[str, bytes]:
        """Return the bundles that refer to the model, by name, as of now."""
        where = f"{self._root / INDEX_FILE}"
        found = parse_referrers(self._index().referrers, model, where)
        return {one.name: self._attestation(one.name, one.node) for one in found}

    def _attestation(self, name: str, node: Object) -> bytes:
        where = f"{self._root}: the attestation {name!r}"
        try:
            raw = read_blob(self._root, parse_blob(node), limit=MAX_REFERRER_BYTES)
            bundle = parse_blob(parse_bundle_layer(raw, where))
        except Malformed as error:
            raise RegistryError(f"{where}: {error}") from error
        return read_blob(self._root, bundle, limit=MAX_ATTESTATION_BYTES)

    def files(self, model: Resolved) -> Mapping[str, int]:
        """List the files that the model's image manifest names, with their sizes."""
        layers = self._of(model)
        return {n: b.size for n, b in layers.items() if n not in SIGNATURE_FILES}

    def open(self, model: Resolved, name: str) -> FileReader:
        """Open the blob of one file."""
        layers = self._of(model)
        if name not in layers:
            raise VerificationError(f"{self._root}: {model.name} has no file {name!r}")
        return self._open(layers[name], name)

    def _bundle(self, model: Resolved, name: str, done: str) -> bytes:
        layers = self._of(model)
        if name not in layers:
            raise VerificationError(
                f"{model.name}:{model.version} in {self._root} is not {done}: it has "
                f"no {name}"
            )
        return read_blob(self._root, layers[name], limit=MAX_BUNDLE_BYTES)

    def _index(self) -> Index:
        try:
            raw = read_file(self._root, INDEX_FILE, limit=MAX_INDEX_BYTES)
        except FileNotFoundError as error:
            raise RegistryError(f"{self._root} has no {INDEX_FILE}") from error
        with self._parsing:  # one for all who ask meanwhile
            if self._known is None or self._known.raw != raw:
                self._known = parse_index(raw, f"{self._root / INDEX_FILE}")
            return self._known

    def _of(self, model: Resolved) -> Mapping[str, Blob]:
        found = self._layers.get(model)
        if found is None:
            self.resolve(model.ref)
            found = self._layers.get(model)
        if found is None:
            raise RegistryError(f"{self._root} has no {model.ref}")
        return found[1]

    def _open(self, blob: Blob, what: str) -> FileReader:
        return open_blob(self._root, blob, what)


def open_blob(root: Path, blob: Blob, what: str) -> FileReader:
    """Open a blob of a layout, through no link; its digest is not checked.

    Raises RegistryError where it is missing, VerificationError where its size is
    another than its descriptor says.
    """
    name = f"blobs/sha256/{blob.digest.removeprefix('sha256:')}"
    try:
        reader = open_file(root, name)
    except FileNotFoundError as error:
        raise RegistryError(f"{root}: {what}: {name} is missing") from error
    if reader.size != blob.size:
        with reader:
            raise VerificationError(
                f"{root / name} ({what}) has {reader.size} bytes; the "
                f"registry's manifest says {blob.size}"
            )
    return reader


def read_blob(root: Path, blob: Blob, *, limit: int) -> bytes:
    """Read a blob of a layout; RegistryError unless it is what its digest says."""
    name = f"blobs/sha256/{blob.digest.removeprefix('sha256:')}"
    try:
        raw = read_file(root, name, limit=limit)
    except FileNotFoundError as error:
        raise RegistryError(f"{root}: {name} is missing") from error
    if "sha256:" + hashlib.sha256(raw).hexdigest() != blob.digest:
        raise RegistryError(f"{root / name} is not what its name says")
    return raw


def parse_index(raw: bytes, where: str) -> Index:
    """Parse index.json: its models, and what refers to them. Raises RegistryError."""
    try:
        index = load_object(raw, limit=MAX_INDEX_BYTES)
        entries = get_objects(index, "manifests", limit=MAX_MODELS)
        models = [_entry(e) for e in entries if NAME in _annotations(e)]
        return Index(raw, models, [e for e in entries if OF in _annotations(e)])
    except Malformed as error:
        raise RegistryError(f"{where}: {error}") from error


def parse_layers(raw: bytes, where: str) -> dict[str, Blob]:
    """Parse an image manifest into file name → blob; raises RegistryError."""
    layers: dict[str, Blob] = {}
    try:
        manifest = load_object(raw, limit=MAX_INDEX_BYTES)
        for layer in get_objects(
            manifest, "layers", limit=MAX_FILES + len(SIGNATURE_FILES)
        ):
            title = get(_annotations(layer), TITLE, str)
            if title in layers:
                raise Malformed(f"the layer {title!r} is listed twice")
            layers[title] = parse_blob(layer)
    except Malformed as error:
        raise RegistryError(f"the image manifest of {where}: {error}") from error
    return layers


def _entry(node: Object) -> Entry:
    notes = _annotations(node)
    model = Resolved(
        get(notes, NAME, str), get(notes, VERSION, str), get(notes, DIGEST, str)
    )
    aliases = get(notes, ALIASES, str) if ALIASES in notes else ""
    return Entry(model, frozenset(filter(None, aliases.split(","))), parse_blob(node))


def _annotations(node: Object) -> Object:
    return as_object(node.get("annotations", {}), "annotations")


def parse_blob(node: Object) -> Blob:
    """Read a descriptor; raises Malformed."""
    digest, size = get(node, "digest", str), get(node, "size", int)
    if not _DIGEST.match(digest) or not 0 <= size <= MAX_BLOB_BYTES:
        raise Malformed(
            f"the descriptor {digest!r:.100} is not usable: of {size} bytes"
        )
    return Blob(digest, size)
