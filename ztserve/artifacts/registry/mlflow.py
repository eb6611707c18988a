"""Models in MLflow's registry, read over its REST API: GET only, and not trusted.

An artifact folder of a model version is a signed directory: the model's files,
model.sig and release.sig (MLflow keeps no digest, and lets anybody who reaches it
overwrite them). The version of the release is the version's number in MLflow. The
tracking server must hand on artifacts itself (``--serve-artifacts``, its default), so
that we need no credentials for the storage behind it.
"""

import time
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote, urlencode, urlsplit

from ztserve.artifacts.registry.address import Access, RegistryUrl
from ztserve.artifacts.registry.http import (
    LIST_S,
    HttpReader,
    MissingError,
    RejectedError,
)
from ztserve.artifacts.registry.layout import MAX_BLOB_BYTES
from ztserve.artifacts.registry.protocol import Resolved, check_answered
from ztserve.artifacts.registry.ranges import RangeReader
from ztserve.artifacts.statements.envelope import MAX_BUNDLE_BYTES, parse_envelope
from ztserve.artifacts.statements.manifest import (
    MAX_DEPTH,
    MAX_FILES,
    RELEASE_FILE,
    SIGNATURE_FILE,
    SIGNATURE_FILES,
)
from ztserve.artifacts.statements.release import parse_release
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

MAX_ANSWER_BYTES = 4 << 20
MAX_FOLDERS = 256
MAX_REMEMBERED = 64
DIGEST_TAG = "ztserve.digest"
"""A tag of a model version by which it is found where only its digest is named."""
_ATTESTATIONS = "attestations"
MAX_ATTESTATIONS = 64
MAX_ATTESTATION_BYTES = 1 << 20


class _Folder(NamedTuple):
    """What a model version holds, as of when it was resolved."""

    path: str
    files: Mapping[str, int]


class MlflowRegistry:
    """Read-only access to the models of an MLflow tracking server."""

    def __init__(self, url: RegistryUrl, access: Access) -> None:
        self._url = url
        self._http = HttpReader(url.origin, access)
        self._folders: dict[Resolved, _Folder] = {}

    def __repr__(self) -> str:
        return f"MlflowRegistry({str(self._url)!r})"

    def resolve(self, ref: ModelRef) -> Resolved:
        """Ask which version is meant, and what its own signature files claim to be.

        Raises RegistryError where there is none, VerificationError where it is not
        signed.
        """
        number = ref.version or self._number(ref)
        folder = self._folder(ref, number)
        raw = self._read(folder, SIGNATURE_FILE, MAX_BUNDLE_BYTES)
        envelope = parse_envelope(raw, what=SIGNATURE_FILE)
        model = Resolved(*self._released(folder, ref, number), envelope.digest)
        check_answered(model, ref, f"{self._url}")
        if len(self._folders) >= MAX_REMEMBERED:
            self._folders.clear()
        self._folders[model] = folder
        return model

    def signature(self, model: Resolved) -> bytes:
        """Return model.sig; VerificationError if there is none."""
        return self._read(self._of(model), SIGNATURE_FILE, MAX_BUNDLE_BYTES)

    def release(self, model: Resolved) -> bytes:
        """Return release.sig; VerificationError if there is none."""
        return self._read(self._of(model), RELEASE_FILE, MAX_BUNDLE_BYTES)

    def attestations(self, model: Resolved) -> Mapping[str, bytes]:
        """Return attestations/NAME.sig by NAME; RegistryError where they are many."""
        folder = self._of(model)
        names = [name for name in sorted(folder.files) if _is_attestation(name)]
        if len(names) > MAX_ATTESTATIONS:
            raise RegistryError(
                f"{self._url}: {model.ref} has {len(names)} attestations, more than "
                f"the {MAX_ATTESTATIONS} allowed"
            )
        return {
            name.partition("/")[2].removesuffix(".sig"): self._read(
                folder, name, MAX_ATTESTATION_BYTES
            )
            for name in names
        }

    def files(self, model: Resolved) -> Mapping[str, int]:
        """List every file of the folder but signatures and attestations."""
        return {
            name: size
            for name, size in self._of(model).files.items()
            if name not in SIGNATURE_FILES and not _is_attestation(name)
        }

    def open(self, model: Resolved, name: str) -> RangeReader:
        """Open one of its files; nothing is asked before it is read."""
        folder = self._of(model)
        if name not in folder.files:
            raise VerificationError(f"{self._url}: {model.name} has no file {name!r}")
        return RangeReader(self._http, self._artifact(folder, name), folder.files[name])

    def _of(self, model: Resolved) -> _Folder:
        found = self._folders.get(model)
        if found is None:
            self.resolve(model.ref)
            found = self._folders.get(model)
        if found is None:
            raise RegistryError(f"{self._url} has no {model.ref}")
        return found

    # --- which version --------------------------------------------------------------

    def _number(self, ref: ModelRef) -> str:
        """Return the version that an alias, a digest or a bare name means now."""
        if ref.alias is not None:
            answer = self._ask(
                "registered-models/alias", ref, name=ref.name, alias=ref.alias
            )
            return self._version(answer, "model_version", ref)
        # Names and digests hold no quote: `ModelRef` sees to that.
        wanted = f"name = '{ref.name}'"
        if ref.digest is not None:
            wanted += f" and tags.`{DIGEST_TAG}` = '{ref.digest}'"
        answer = self._ask(
            "model-versions/search",
            ref,
            filter=wanted,
            order_by="version_number DESC",
            max_results="1",
        )
        try:
            versions = get_objects(answer, "model_versions", limit=1)
        except Malformed:
            versions = []  # protobuf's JSON leaves an empty list out
        if not versions:
            hint = f" (by the tag {DIGEST_TAG})" if ref.digest else ""
            raise RegistryError(f"{self._url} has no {ref}{hint}")
        return self._version({"found": versions[0]}, "found", ref)

    def _version(self, answer: Object, key: str, ref: ModelRef) -> str:
        try:
            return get(as_object(answer.get(key), key), "version", str)
        except Malformed as error:
            raise RegistryError(f"{self._url}: {ref}: {error}") from error

    def _released(self, folder: _Folder, ref: ModelRef, number: str) -> tuple[str, str]:
        if RELEASE_FILE not in folder.files:
            return ref.name, number
        raw = self._read(folder, RELEASE_FILE, MAX_BUNDLE_BYTES)
        release = parse_release(parse_envelope(raw, what=RELEASE_FILE))
        return release.name, release.version

    # --- where it lies, and what lies there -----------------------------------------

    def _folder(self, ref: ModelRef, number: str) -> _Folder:
        answer = self._ask(
            "model-versions/get-download-uri", ref, name=ref.name, version=number
        )
        try:
            uri = urlsplit(get(answer, "artifact_uri", str))
        except (Malformed, ValueError) as error:
            raise RegistryError(f"{self._url}: {ref}: {error}") from error
        if uri.scheme != "mlflow-artifacts" or uri.netloc or uri.query or uri.fragment:
            raise RegistryError(
                f"{self._url}: {ref} lies at {uri.geturl()[:300]!r}: only what the "
                "tracking server hands on itself is read (mlflow-artifacts:/...); "
                "start it with --serve-artifacts"
            )
        path = uri.path.strip("/")
        _check_path(path, f"{self._url}: {ref}")
        return _Folder(path, self._list(path, ref))

    def _list(self, root: str, ref: ModelRef) -> dict[str, int]:
        """Return every file beneath a folder, relative name to size; bounded."""
        found: dict[str, int] = {}
        folders = [""]
        until = time.monotonic() + LIST_S
        for asked, folder in enumerate(folders):
            if asked >= MAX_FOLDERS or folder.count("/") >= MAX_DEPTH:
                raise RegistryError(
                    f"{self._url}: {ref} has more than {MAX_FOLDERS} folders, or they "
                    f"lie deeper than {MAX_DEPTH}"
                )
            below = f"{root}/{folder}".rstrip("/")
            for name, size in self._entries(below, ref, until):
                if size is None:
                    folders.append(f"{folder}{name}/")
                else:
                    found[f"{folder}{name}"] = size
            if len(found) > MAX_FILES:
                raise RegistryError(f"{self._url}: {ref} has over {MAX_FILES} files")
        return found

    def _entries(
        self, folder: str, ref: ModelRef, until: float
    ) -> list[tuple[str, int | None]]:
        """Return name and size of a folder's entries; None: another folder."""
        target = f"{self._url.path}/api/2.0/mlflow-artifacts/artifacts?"
        raw = self._http.read(
            target + urlencode({"path": folder}), limit=MAX_ANSWER_BYTES, until=until
        )
        try:
            answer = load_object(raw, limit=MAX_ANSWER_BYTES)
            if "files" not in answer:
                return []
            return [_entry(n) for n in get_objects(answer, "files", limit=MAX_FILES)]
        except Malformed as error:
            raise RegistryError(f"{self._url}: {ref}: {folder!r}: {error}") from error

    def _artifact(self, folder: _Folder, name: str) -> str:
        path = quote(f"{folder.path}/{name}")
        return f"{self._url.path}/api/2.0/mlflow-artifacts/artifacts/{path}"

    def _read(self, folder: _Folder, name: str, limit: int) -> bytes:
        if name not in folder.files:
            done = "released" if name == RELEASE_FILE else "signed"
            raise VerificationError(
                f"{folder.path!r} in {self._url} is not {done}: it has no {name}; sign "
                "the folder before it is logged to MLflow"
            )
        return self._http.read(self._artifact(folder, name), limit=limit, accept="*/*")

    def _ask(self, call: str, ref: ModelRef, **query: str) -> Object:
        target = f"{self._url.path}/api/2.0/mlflow/{call}?{urlencode(query)}"
        try:
            raw = self._http.read(target, limit=MAX_ANSWER_BYTES)
            return load_object(raw, limit=MAX_ANSWER_BYTES)
        except (MissingError, RejectedError) as error:  # 400: no such alias
            raise RegistryError(f"{self._url} has no {ref} ({error})") from error
        except Malformed as error:
            raise RegistryError(f"{self._url}: {ref}: {error}") from error


def _entry(node: Object) -> tuple[str, int | None]:
    name = get(node, "path", str)
    if not name or "/" in name or name in {".", ".."} or len(name) > 255:
        raise Malformed(f"{name!r:.100} is no name of a file in a folder")
    if get(node, "is_dir", bool):
        return name, None
    size = get(node, "file_size", int) if "file_size" in node else 0
    if not 0 <= size <= MAX_BLOB_BYTES:
        raise Malformed(f"{name!r} has {size} bytes")
    return name, size


def _check_path(path: str, where: str) -> None:
    if not path or {"", ".", ".."} & set(path.split("/")) or len(path) > 1024:
        raise RegistryError(f"{where}: {path!r:.200} is no path of a folder")


def _is_attestation(name: str) -> bool:
    folder, _, rest = name.partition("/")
    return folder == _ATTESTATIONS and rest.endswith(".sig") and "/" not in rest
