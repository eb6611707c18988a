"""What a model's JSON may point at: itself.

Configurations of the transformers family can name code, or another model, for their
library to fetch; an index says which weight file holds which tensor. The closed world
holds for what they name, too. A name in the form of a hub's repository is let pass:
it is a note of origin, and nothing of ztserve looks anything up by it.
"""

import re
from collections.abc import Collection, Iterator, Mapping

from ztserve.artifacts.loading.header import Layout
from ztserve.artifacts.statements.strict import (
    Malformed,
    Object,
    as_object,
    get,
    load_object,
)
from ztserve.errors import VerificationError

INDEX = ".safetensors.index.json"
MAX_CONFIG_BYTES = 16 << 20
_CODE = ("auto_map", "custom_pipelines")
_ORIGIN = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?\Z", re.A)
"""``name`` or ``owner/name``: huggingface_hub's form of a repository's id."""


def check_config(name: str, view: memoryview, files: Collection[str]) -> None:
    """Raise VerificationError where a configuration has code or models fetched.

    `files`: what the model consists of; those, and folders of them, may be named.
    """
    for key, value in _fields(_parsed(name, view)):
        if key in _CODE or (key == "trust_remote_code" and value is not False):
            raise VerificationError(
                f"{name} asks for code by {key!r}: remove the field and sign again"
            )
        if key in _ORIGIN:
            check_origin(name, key, value, files)


def check_origin(name: str, key: str, value: object, files: Collection[str]) -> None:
    """Raise VerificationError where a configuration points at another place.

    That is a path, absolute or to what is not signed, and a URL. ``owner/name`` is
    where a model came from.
    """
    if value in (None, "", "."):
        return
    if type(value) is str:
        if any(file == value or file.startswith(value + "/") for file in files):
            return
        if _REPOSITORY.match(value) and ".." not in value:
            return
    raise VerificationError(
        f"{name} points out of the model: {key!r} is {str(value)[:200]!r}, expected a "
        "file or folder of the model, or owner/name as a note of its origin; remove "
        "the field and sign again"
    )


def check_index(name: str, view: memoryview, layouts: Mapping[str, Layout]) -> None:
    """Raise VerificationError where an index sends for tensors to another file.

    Each that it lists must be in the weight file beside it that it says.
    """
    folder = name.rpartition("/")[0]
    try:
        places = as_object(get(_parsed(name, view), "weight_map", dict), "weight_map")
    except Malformed as error:
        raise VerificationError(f"{name}: {error}") from error
    for tensor, place in places.items():
        file = f"{folder}/{place}" if folder else place
        if not isinstance(file, str) or file not in layouts:
            raise VerificationError(
                f"{name} places tensor {tensor[:200]!r} in {str(place)[:200]!r}, which "
                "is no weight file of this model: write the index anew and sign again"
            )
        if tensor not in layouts[file]:
            raise VerificationError(
                f"{name} places tensor {tensor[:200]!r} in {file}, which has no such "
                "tensor: write the index anew and sign again"
            )


def _parsed(name: str, view: memoryview) -> Object:
    try:
        return load_object(bytes(view), limit=MAX_CONFIG_BYTES)
    except Malformed as error:
        raise VerificationError(f"{name}: {error}") from error


def _fields(node: object) -> Iterator[tuple[str, object]]:
    """Yield every key and value of every object in a JSON document."""
    waiting = [node]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            yield from here.items()
            waiting.extend(here.values())
        elif isinstance(here, list):
            waiting.extend(here)
