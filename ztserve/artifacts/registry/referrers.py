"""Attestations in an OCI image layout: referrers of a model's image manifest.

Each is an image manifest of one layer, the bundle, whose `subject` is the model's
(OCI image-spec v1.1, "Image Manifest"). The index names, beside each, the digest of
the model, its name and version, and the name of the attestation, so that only those of
one release are read.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ztserve.artifacts.registry.protocol import Resolved
from ztserve.artifacts.statements.attestation import (
    MAX_ATTESTATION_BYTES,
    MAX_ATTESTATIONS,
    file_of,
)
from ztserve.artifacts.statements.strict import (
    Malformed,
    Object,
    as_object,
    get,
    get_objects,
    load_object,
)
from ztserve.errors import RegistryError

OF = "dev.ztserve.attestation.of"
FOR = "dev.ztserve.attestation.for"
NAME = "dev.ztserve.attestation.name"
MAX_REFERRER_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Referrer:
    """An entry of the index: an attestation's name, and where its manifest is."""

    name: str
    node: Object


def parse_referrers(
    entries: Iterable[Object], model: Resolved, where: str
) -> list[Referrer]:
    """Return the attestations of a release among an index's entries; RegistryError."""
    try:
        found = [
            Referrer(get(_annotations(entry), NAME, str), entry)
            for entry in entries
            if refers_to(entry, model)
        ]
        for one in found:
            file_of(one.name)
        if len({one.name for one in found}) != len(found):
            raise Malformed(f"two attestations of {model.name} have the same name")
    except Malformed as error:
        raise RegistryError(f"{where}: {error}") from error
    if len(found) > MAX_ATTESTATIONS:
        raise RegistryError(
            f"{where}: {model.name}:{model.version} has {len(found)} attestations; the "
            f"limit is {MAX_ATTESTATIONS}"
        )
    return found


def refers_to(entry: Object, model: Resolved) -> bool:
    """Tell whether an entry of an index is an attestation of this release.

    One that does not say for which release it is, is for each of its model's.
    """
    notes = _annotations(entry)
    release = f"{model.name}:{model.version}"
    return notes.get(OF) == model.digest and notes.get(FOR, release) == release


def parse_bundle_layer(raw: bytes, where: str) -> Object:
    """Return the descriptor of a referrer's one layer, the bundle; RegistryError."""
    try:
        layers = get_objects(
            load_object(raw, limit=MAX_REFERRER_BYTES), "layers", limit=1
        )
        if len(layers) != 1:
            raise Malformed("no layer, where one bundle is expected")
        if get(layers[0], "size", int) > MAX_ATTESTATION_BYTES:
            raise Malformed(f"a bundle above {MAX_ATTESTATION_BYTES} bytes")
        return layers[0]
    except Malformed as error:
        raise RegistryError(f"{where}: {error}") from error


def _annotations(node: Object) -> Object:
    return as_object(node.get("annotations", {}), "annotations")
