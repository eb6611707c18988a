"""Models in an OCI registry, read over HTTP (OCI distribution-spec v1.1, "Pull").

Each model is a repository beneath the registry's path; ``name:version`` is its tag.
Tags that no version can have hold the rest: ``_ALIAS``, ``_sha256-HEX`` for a model by
its digest, ``_latest``. What a tag leads to is a claim, as all that a registry says.
Signatures are layers of the image, or bundles that refer to it.
"""

import hashlib
import math
import re
import time
from collections.abc import Mapping
from urllib.parse import quote

from ztserve.artifacts.registry.address import Access, RegistryUrl
from ztserve.artifacts.registry.http import LIST_S, HttpReader, MissingError
from ztserve.artifacts.registry.layout import (
    DIGEST,
    IMAGE_MANIFEST_TYPE,
    MAX_INDEX_BYTES,
    MAX_REMEMBERED,
    NAME,
    VERSION,
    Blob,
    parse_layers,
)
from ztserve.artifacts.registry.protocol import Resolved, check_answered
from ztserve.artifacts.registry.ranges import RangeReader
from ztserve.artifacts.statements.envelope import BUNDLE_TYPE, MAX_BUNDLE_BYTES
from ztserve.artifacts.statements.manifest import (
    RELEASE_FILE,
    SIGNATURE_FILE,
    SIGNATURE_FILES,
)
from ztserve.artifacts.statements.strict import (
    Malformed,
    as_object,
    get,
    get_objects,
    load_object,
)
from ztserve.errors import RegistryError, VerificationError
from ztserve.types import ModelRef

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MAX_REFERRERS = 64
MAX_ATTESTATION_BYTES = 1 << 20
_REPOSITORY = re.compile(
    r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*\Z"
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_ATTESTATION = re.compile(r"attestations/([^/]{1,128})\.sig\Z")


def repository_of(url: RegistryUrl, name: str) -> str:
    """Return the repository of a model; RegistryError where it cannot have one."""
    repository = f"{url.path}/{name}".lstrip("/")
    if len(repository) > 255 or not _REPOSITORY.match(repository):
        raise RegistryError(
            f"{url}: {repository!r} is no name of an OCI repository: lower case "
            "letters and digits, single . _ or dashes between them"
        )
    return repository


def tag_of(ref: ModelRef) -> str:
    """Return the tag under which a reference's image manifest is found."""
    if ref.digest is not None:
        return "_" + ref.digest.replace(":", "-")
    return ref.version or f"_{ref.alias or 'latest'}"


class DistributionRegistry:
    """Read-only access to the models of an OCI registry."""

    def __init__(self, url: RegistryUrl, access: Access) -> None:
        self._url = url
        self._access = access
        self._http: dict[str, HttpReader] = {}
        self._images: dict[Resolved, tuple[str, Mapping[str, Blob]]] = {}

    def __repr__(self) -> str:
        return f"DistributionRegistry({str(self._url)!r})"

    def resolve(self, ref: ModelRef) -> Resolved:
        """Ask what the reference's tag leads to; remember it for the other verbs.

        Raises RegistryError where there is no such model, or the server is away.
        """
        try:
            raw = self._manifest(ref.name, tag_of(ref), IMAGE_MANIFEST_TYPE)
        except MissingError as error:
            raise RegistryError(
                f"{self._url} has no {ref}: publish it with `ztserve registry push` "
                f"({error})"
            ) from error
        model = parse_claim(raw, f"{ref}")
        check_answered(model, ref, f"{self._url}")
        image = "sha256:" + hashlib.sha256(raw).hexdigest()
        if len(self._images) >= MAX_REMEMBERED:
            self._images.clear()
        self._images[model] = (image, parse_layers(raw, f"{ref}"))
        return model

    def signature(self, model: Resolved) -> bytes:
        """Return the model's signature; VerificationError if it has none."""
        return self._bundle(model, SIGNATURE_FILE, "signed")

    def release(self, model: Resolved) -> bytes:
        """Return the model's release; VerificationError if it has none."""
        return self._bundle(model, RELEASE_FILE, "released")

    def attestations(self, model: Resolved) -> Mapping[str, bytes]:
        """Return the bundles titled ``attestations/NAME.sig`` that refer to it."""
        return {
            match[1]: self._blob(model, blob, limit=MAX_ATTESTATION_BYTES)
            for title, blob in self._referrers(model).items()
            if (match := _ATTESTATION.match(title))
        }

    def files(self, model: Resolved) -> Mapping[str, int]:
        """List the files that the model's image manifest names, with their sizes."""
        layers = self._of(model)[1]
        return {n: b.size for n, b in layers.items() if n not in SIGNATURE_FILES}

    def open(self, model: Resolved, name: str) -> RangeReader:
        """Open the blob of one file; nothing is asked before it is read."""
        layers = self._of(model)[1]
        if name not in layers:
            raise VerificationError(f"{self._url}: {model.name} has no file {name!r}")
        blob = layers[name]
        http = self._reader(model.name)
        return RangeReader(
            http, self._target(model.name, "blobs", blob.digest), blob.size
        )

    def _bundle(self, model: Resolved, name: str, done: str) -> bytes:
        blob = self._of(model)[1].get(name) or self._referrers(model).get(name)
        if blob is None:
            raise VerificationError(
                f"{model.name}:{model.version} in {self._url} is not {done}: neither "
                f"is {name} a layer of it, nor does one refer to it"
            )
        return self._blob(model, blob, limit=MAX_BUNDLE_BYTES)

    def _of(self, model: Resolved) -> tuple[str, Mapping[str, Blob]]:
        found = self._images.get(model)
        if found is None:
            self.resolve(model.ref)
            found = self._images.get(model)
        if found is None:
            raise RegistryError(f"{self._url} has no {model.ref}")
        return found

    # --- what refers to an image --------------------------------------------------

    def _referrers(self, model: Resolved) -> dict[str, Blob]:
        """Return the bundles that refer to the model's image, by their title."""
        found: dict[str, Blob] = {}
        until = time.monotonic() + LIST_S
        for manifest in self._referring(model):
            raw = self._manifest(model.name, manifest, IMAGE_MANIFEST_TYPE, until)
            for title, blob in parse_layers(raw, f"{model.name}@{manifest}").items():
                if title in found:
                    raise RegistryError(
                        f"{self._url}: two bundles named {title!r:.100} refer to "
                        f"{model.ref}"
                    )
                found[title] = blob
        return found

    def _referring(self, model: Resolved) -> list[str]:
        """Return the manifests that refer to an image, by digest: at most 64.

        From the referrers API or, where the server has none, from the tag that stands
        in for it ("Unavailable Referrers API").
        """
        image = self._of(model)[0]
        query = f"?artifactType={quote(BUNDLE_TYPE, safe='')}"
        try:
            raw = self._reader(model.name).read(
                self._target(model.name, "referrers", image) + query,
                limit=MAX_INDEX_BYTES,
                accept=INDEX_TYPE,
            )
        except MissingError:
            try:
                raw = self._manifest(model.name, image.replace(":", "-"), INDEX_TYPE)
            except MissingError:
                return []
        return _parse_referrers(raw, f"{self._url}: what refers to {model.ref}")

    # --- one answer -----------------------------------------------------------------

    def _reader(self, name: str) -> HttpReader:
        """Return the reader of one repository: a token holds for no other."""
        http = self._http.get(name)
        if http is None:
            if len(self._http) >= MAX_REMEMBERED:
                self._http.clear()
            scope = f"repository:{repository_of(self._url, name)}:pull"
            http = HttpReader(self._url.origin, self._access, scope=scope)
            self._http[name] = http
        return http

    def _target(self, name: str, kind: str, reference: str) -> str:
        return f"/v2/{repository_of(self._url, name)}/{kind}/{reference}"

    def _manifest(
        self, name: str, reference: str, kind: str, until: float = math.inf
    ) -> bytes:
        raw = self._reader(name).read(
            self._target(name, "manifests", reference),
            limit=MAX_INDEX_BYTES,
            accept=kind,
            until=until,
        )
        return _checked(raw, reference, self._url) if ":" in reference else raw

    def _blob(self, model: Resolved, blob: Blob, *, limit: int) -> bytes:
        raw = self._reader(model.name).read(
            self._target(model.name, "blobs", blob.digest),
            limit=min(limit, blob.size),
            accept="*/*",
        )
        return _checked(raw, blob.digest, self._url)


def _checked(raw: bytes, digest: str, url: RegistryUrl) -> bytes:
    found = "sha256:" + hashlib.sha256(raw).hexdigest()
    if found != digest:
        raise RegistryError(f"{url}: asked for {digest}, and was sent {found}")
    return raw


def parse_claim(raw: bytes, where: str) -> Resolved:
    """Parse which model an image manifest claims to be; RegistryError."""
    try:
        image = load_object(raw, limit=MAX_INDEX_BYTES)
        notes = as_object(image.get("annotations", {}), "annotations")
        return Resolved(
            get(notes, NAME, str), get(notes, VERSION, str), get(notes, DIGEST, str)
        )
    except Malformed as error:
        raise RegistryError(
            f"the image manifest of {where} is none of a model's: {error}; publish it "
            "with `ztserve publish` and `ztserve registry push`"
        ) from error


def _parse_referrers(raw: bytes, where: str) -> list[str]:
    try:
        index = load_object(raw, limit=MAX_INDEX_BYTES)
        nodes = get_objects(index, "manifests", limit=MAX_REFERRERS)
        found = [
            get(node, "digest", str)
            for node in nodes
            if node.get("artifactType") == BUNDLE_TYPE
        ]
        for digest in found:
            if not _DIGEST.match(digest):
                raise Malformed(f"{digest!r:.100} is no digest")
    except Malformed as error:
        raise RegistryError(f"{where}: {error}") from error
    return found
