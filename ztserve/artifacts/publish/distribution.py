"""Pushing what an OCI image layout holds to an OCI registry (distribution-spec v1.1).

A tool of the deployment pipeline, with credentials of its own: what serves has neither
this code nor the right to push. Blobs first, then the image, then the tags that lead
to it: whoever reads meanwhile sees the model whole or not at all.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from http.client import (
    HTTPConnection,
    HTTPException,
    HTTPSConnection,
    IncompleteRead,
)
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

from ztserve.artifacts.publish.uploading import PIECE, Upload, no_later_than
from ztserve.artifacts.registry.address import Access, RegistryUrl, origin_of
from ztserve.artifacts.registry.connection import client_context
from ztserve.artifacts.registry.distribution import (
    INDEX_TYPE,
    MAX_REFERRERS,
    parse_claim,
    repository_of,
    tag_of,
)
from ztserve.artifacts.registry.files import read_file
from ztserve.artifacts.registry.http import ANSWER_S, HttpReader
from ztserve.artifacts.registry.layout import (
    IMAGE_MANIFEST_TYPE,
    INDEX_FILE,
    MAX_INDEX_BYTES,
    MAX_MODELS,
    Blob,
    Entry,
    open_blob,
    parse_blob,
    parse_index,
    parse_layers,
    read_blob,
)
from ztserve.artifacts.registry.protocol import Resolved
from ztserve.artifacts.statements.envelope import BUNDLE_TYPE
from ztserve.artifacts.statements.strict import (
    Malformed,
    Object,
    as_object,
    get,
    get_objects,
    load_object,
)
from ztserve.errors import ConfigError, RegistryError
from ztserve.types import ModelRef

STALL_S = 30.0
"""Longest wait for the registry to take the next piece, or to answer."""
TAKES_S = 60.0
"""Longest that an answer may take as a whole, once the registry has all of a piece."""


def push(
    layout: str | os.PathLike[str],
    model: ModelRef | str,
    url: RegistryUrl,
    access: Access,
    *,
    aliases: Sequence[str] = (),
) -> Resolved:
    """Copy a published model, and what refers to it, to the registry at `url`.

    Points `aliases` at it, and the bare name where it is the layout's newest; pushing
    the same again only does that. Raises RegistryError where the layout has no such
    model, the registry does not take it, or has the version with other content.
    """
    if url.kind != "oci":
        raise ConfigError(f"{url}: models are pushed to an oci+https registry")
    ref = ModelRef(model) if isinstance(model, str) else model
    source = _Layout(Path(layout))
    entry, newest = source.find(ref)
    name = entry.model.name
    image = source.read(entry.manifest)
    tags = {entry.model.version, tag_of(entry.model.ref)}
    tags |= {tag_of(ModelRef(f"{name}@{alias}")) for alias in aliases}
    tags |= {tag_of(ModelRef(name))} if newest else set()
    with closing(_Repository(url, access, repository_of(url, name))) as target:
        target.check_not_taken(entry.model)
        for blob in _blobs(image, str(entry.model.ref)):
            target.put_blob(blob, source)
        for tag in sorted(tags):
            target.put_manifest(tag, image)
        _push_referrers(source, target, entry)
    return entry.model


def _push_referrers(source: "_Layout", target: "_Repository", entry: Entry) -> None:
    kept: list[dict[str, object]] = []
    for descriptor in source.referrers(entry.manifest.digest):
        raw = source.read(descriptor)
        for blob in _blobs(raw, descriptor.digest):
            target.put_blob(blob, source)
        if target.put_manifest(descriptor.digest, raw):
            continue  # it keeps the list of what refers to an image itself
        kept.append(
            {
                "mediaType": IMAGE_MANIFEST_TYPE,
                "digest": descriptor.digest,
                "size": descriptor.size,
                "artifactType": BUNDLE_TYPE,
            }
        )
    if kept:
        index = {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": kept}
        tag = entry.manifest.digest.replace(":", "-")
        target.put_manifest(tag, json.dumps(index).encode(), INDEX_TYPE)


def _blobs(raw: bytes, where: str) -> list[Blob]:
    """Return the config and the layers of an image manifest."""
    try:
        image = load_object(raw, limit=MAX_INDEX_BYTES)
        config = parse_blob(get(image, "config", dict))
        found = [*parse_layers(raw, where).values(), config]
    except Malformed as error:
        raise RegistryError(f"the image manifest of {where}: {error}") from error
    return list(dict.fromkeys(found))


class _Layout:
    """An OCI image layout, as the source of a push."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._where = str(root / INDEX_FILE)
        try:
            self._index = read_file(root, INDEX_FILE, limit=MAX_INDEX_BYTES)
        except FileNotFoundError as error:
            raise RegistryError(
                f"{root} is no OCI image layout: it has no {INDEX_FILE}; publish the "
                "model there first, with `ztserve publish`"
            ) from error

    def find(self, ref: ModelRef) -> tuple[Entry, bool]:
        """Return the entry of ``name:version``, and whether it is the newest."""
        if ref.version is None:
            raise ConfigError(f"{ref}: name the version to push: name:version")
        versions = [
            entry
            for entry in parse_index(self._index, self._where).models
            if entry.model.name == ref.name
        ]
        for entry in versions:
            if entry.model.version == ref.version:
                ref.pinned(entry.model.digest)
                return entry, entry is versions[-1]
        raise RegistryError(
            f"{self._root} has no {ref}: publish it with `ztserve publish`"
        )

    def referrers(self, image: str) -> Iterator[Blob]:
        """Yield the manifests of signed bundles whose subject is `image`."""
        try:
            index = load_object(self._index, limit=MAX_INDEX_BYTES)
            nodes = get_objects(index, "manifests", limit=MAX_MODELS)
            blobs = [parse_blob(n) for n in nodes if _is_bundle(n)]
            found = [blob for blob in blobs if self._subject(blob) == image]
        except Malformed as error:
            raise RegistryError(f"{self._where}: {error}") from error
        if len(found) > MAX_REFERRERS:
            raise RegistryError(
                f"{self._where}: {len(found)} bundles refer to {image}; nobody reads "
                f"more than {MAX_REFERRERS}"
            )
        yield from found

    def _subject(self, blob: Blob) -> str:
        manifest = load_object(self.read(blob), limit=MAX_INDEX_BYTES)
        if "subject" not in manifest:
            return ""
        return get(as_object(manifest["subject"], "subject"), "digest", str)

    def open(self, blob: Blob) -> Upload:
        """Open a blob; errors as `open_blob`."""
        return Upload(open_blob(self._root, blob, blob.digest))

    def read(self, blob: Blob) -> bytes:
        """Read a manifest; RegistryError unless it is what its digest says."""
        return read_blob(self._root, blob, limit=MAX_INDEX_BYTES)


def _is_bundle(node: Object) -> bool:
    return node.get("artifactType") == BUNDLE_TYPE


class _Answer(NamedTuple):
    status: int
    location: str
    challenge: str
    subject: str
    body: bytes


class _Repository:
    """One repository of a registry, to be written to."""

    def __init__(self, url: RegistryUrl, access: Access, repository: str) -> None:
        self._url = url
        self._path = f"/v2/{repository}"
        scope = f"repository:{repository}:pull,push"
        self._credentials = HttpReader(url.origin, access, scope=scope)
        self._authorization = f"Bearer {access.token}" if access.token else ""
        host, port = url.origin.host, url.origin.port
        self._connection = (
            HTTPSConnection(
                host,
                port,
                timeout=STALL_S,
                context=client_context(access.roots),
                blocksize=PIECE,
            )
            if url.origin.scheme == "https"
            else HTTPConnection(host, port, timeout=STALL_S, blocksize=PIECE)
        )

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def check_not_taken(self, model: Resolved) -> None:
        """Raise RegistryError where the version is there with other content."""
        target = f"{self._path}/manifests/{model.version}"
        answer = self._send("GET", target, accept=IMAGE_MANIFEST_TYPE)
        if answer.status == 404:
            return
        self._expect(answer, 200, "GET", target)
        there = parse_claim(answer.body, str(model.ref))
        if there.digest != model.digest:
            raise RegistryError(
                f"{self._url} has {model.name}:{model.version} already, with other "
                f"content ({there.digest}): a version never changes; publish a new one"
            )

    def put_blob(self, blob: Blob, source: _Layout) -> None:
        """Upload a file under its digest, which the registry checks, if not there."""
        if self._send("HEAD", f"{self._path}/blobs/{blob.digest}").status == 200:
            return
        target = f"{self._path}/blobs/uploads/"
        begun = self._send("POST", target)
        self._expect(begun, 202, "POST", target)
        place = self._here(begun.location)
        place += ("&" if "?" in place else "?") + f"digest={blob.digest}"
        with source.open(blob) as upload:
            done = self._send("PUT", place, upload, size=blob.size)
        self._expect(done, 201, "PUT", place)

    def put_manifest(
        self, reference: str, raw: bytes, kind: str = IMAGE_MANIFEST_TYPE
    ) -> bool:
        """Store a manifest under a tag or digest.

        Returns whether the registry keeps the list of referrers itself (OCI-Subject).
        """
        target = f"{self._path}/manifests/{reference}"
        answer = self._send("PUT", target, raw, size=len(raw), kind=kind)
        self._expect(answer, 201, "PUT", target)
        return bool(answer.subject)

    def _here(self, location: str) -> str:
        """Return path and query of where to upload to; it must be this registry."""
        base = f"{self._url.origin.scheme}://{self._url.origin.authority}"
        try:
            parts = urlsplit(urljoin(base, location))
            origin = origin_of(parts)
        except ValueError as error:
            raise RegistryError(
                f"{self._url}: wants the upload at {location[:300]!r}, which {error}"
            ) from error
        if origin != self._url.origin:
            raise RegistryError(
                f"{self._url}: wants the upload at another host, {origin.authority}"
            )
        return parts.path + (f"?{parts.query}" if parts.query else "")

    def _expect(self, answer: _Answer, status: int, verb: str, target: str) -> None:
        if answer.status != status:
            said = answer.body[:300].decode(errors="replace")
            raise RegistryError(
                f"{self._url}: answers {answer.status} to {verb} {target[:300]}, "
                f"expected {status}: {said}"
            )

    def _send(
        self,
        verb: str,
        target: str,
        body: bytes | Upload = b"",
        *,
        size: int = 0,
        kind: str = "application/octet-stream",
        accept: str = "application/json",
    ) -> _Answer:
        headers = {"Accept": accept, "Content-Length": str(size), "Content-Type": kind}
        answer = self._once(verb, target, body, headers)
        if answer.status == 401 and not isinstance(body, bytes):
            body.rewind()
        if answer.status == 401:
            until = time.monotonic() + ANSWER_S
            self._authorization = self._credentials.authorize(
                answer.challenge, str(self._url), until
            )
            answer = self._once(verb, target, body, headers)
        return answer

    def _once(
        self, verb: str, target: str, body: bytes | Upload, headers: dict[str, str]
    ) -> _Answer:
        if self._authorization:
            headers = {**headers, "Authorization": self._authorization}
        try:
            self._connection.request(verb, target, body, headers)
            with (
                no_later_than(self._connection.sock, TAKES_S),
                self._connection.getresponse() as response,
            ):
                raw = response.read(MAX_INDEX_BYTES + 1)
                if response.length and len(raw) <= MAX_INDEX_BYTES:
                    raise IncompleteRead(raw, response.length)
        except (OSError, HTTPException, ValueError) as error:
            self._connection.close()
            raise RegistryError(f"{self._url}: {verb} {target}: {error}") from error
        if len(raw) > MAX_INDEX_BYTES or response.will_close:
            self._connection.close()
        return _Answer(
            response.status,
            response.getheader("Location", ""),
            response.getheader("WWW-Authenticate", ""),
            response.getheader("OCI-Subject", ""),
            raw,
        )
