"""The deployment bundle: the deployer's word on all that decides what runs.

An in-toto Statement v1 of our own predicate type: settings, the files that they name,
each deployment with its class, arguments and models, the code. Its one subject is the
application, ``module:app``, under the digest of its code. in-toto's own `deployment`
predicate tells what was deployed; this one tells what may be.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from ztserve.artifacts.statements.envelope import (
    Envelope,
    parse_statement,
    subject_digest,
)
from ztserve.artifacts.statements.strict import (
    Malformed,
    Object,
    as_object,
    get,
    get_objects,
    only,
)
from ztserve.errors import ConfigError, VerificationError
from ztserve.types import ModelRef

PREDICATE_TYPE = "https://ztserve.dev/deployment/v1"
MAX_PARTS = 64
MAX_SETTINGS = 512
MAX_FILES = 64
MAX_TREE_FILES = 20_000
MAX_PACKAGES = 4096
MAX_SEQUENCE = 2**53 - 1
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_FIELDS = (
    "sequence",
    "trustPolicy",
    "settings",
    "files",
    "deployments",
    "code",
)


@dataclass(frozen=True, slots=True)
class Part:
    """One deployment of an application, as it is to run."""

    name: str
    """As Ray Serve calls it."""
    target: str
    """Its class, ``module:qualname``."""
    service: str
    """Of its SPIFFE ID."""
    labels: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)
    """Part to ``name:version@sha256:<hex>``; the sole part of most is ''."""
    arguments: str = "[[],{}]"
    """Of its constructor: canonical JSON of ``[[positional], {named}]``."""
    options: Mapping[str, int] = field(default_factory=dict)
    tree: str = ""
    """Digest of the tree that its class lies in; '': in an installed package."""

    @property
    def module(self) -> str:
        """The module that its class lies in."""
        return self.target.partition(":")[0]

    def ref(self, part: str) -> ModelRef | None:
        """Return which model is signed for a part; None: none is."""
        return ModelRef(self.models[part]) if part in self.models else None


@dataclass(frozen=True, slots=True)
class Code:
    """The code that an application is made of."""

    python: str
    """Version of the interpreter, ``3.11.2``."""
    ztserve: str
    """Version of ztserve; its files are among the packages."""
    packages: Mapping[str, tuple[str, ...]]
    """What lies in the folders of sys.path: name to digest, a place each."""
    trees: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Digest of a folder of the user's own modules to its files: path to digest."""

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of all of it."""
        return digest_of(code_node(self))


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a deployer signed of an application. Nothing counts before that is verified.

    `settings` are those in force, by key; `files` those that they name: path, relative
    to ztserve.toml where it lies below, to digest.
    """

    application: str
    """``module:app``."""
    sequence: int
    """Grows with each bundle of the application: an older one is not taken back."""
    trust_root: str
    """Key id of the root under which the trust policy is signed; '': it is not."""
    trust_version: int
    """Of the trust policy at that time: the oldest that may judge."""
    settings: Mapping[str, object]
    files: Mapping[str, str]
    parts: Mapping[str, Part]
    code: Code
    digest: str = ""
    """``sha256:<hex>`` of the signed payload; '' before it is signed."""


def canonical(value: object) -> str:
    """Return JSON with sorted keys and no spaces: equal values give equal text.

    Raises Malformed on what JSON cannot say, NaN and keys that are not text included.
    """
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
        same = json.loads(text) == value
    except (TypeError, ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}") from error
    if not same:
        raise Malformed(
            "not what JSON gives back: tuples, and keys that are not text, change"
        )
    return text


def digest_of(value: object) -> str:
    """Return ``sha256:<hex>`` of a value's canonical JSON; raises Malformed."""
    return "sha256:" + hashlib.sha256(canonical(value).encode()).hexdigest()


# --- writing ----------------------------------------------------------------------


def code_node(code: Code) -> dict[str, object]:
    """Return code as the statement holds it."""
    return {
        "python": code.python,
        "ztserve": code.ztserve,
        "packages": {name: list(found) for name, found in code.packages.items()},
        "trees": {tree: dict(files) for tree, files in code.trees.items()},
    }


def predicate_of(deployment: Deployment) -> dict[str, object]:
    """Return the predicate of a deployment's statement."""
    return {
        "sequence": deployment.sequence,
        "trustPolicy": {
            "root": deployment.trust_root,
            "version": deployment.trust_version,
        },
        "settings": dict(deployment.settings),
        "files": dict(deployment.files),
        "deployments": [
            {
                "name": part.name,
                "class": part.target,
                "service": part.service,
                "labels": dict(part.labels),
                "models": dict(part.models),
                "arguments": part.arguments,
                "options": dict(part.options),
                "tree": part.tree,
            }
            for part in deployment.parts.values()
        ],
        "code": code_node(deployment.code),
    }


# --- reading ----------------------------------------------------------------------


def parse_deployment(envelope: Envelope) -> Deployment:
    """Parse a (verified) envelope's deployment; raises VerificationError."""
    try:
        subject, predicate = parse_statement(envelope, PREDICATE_TYPE)
        only(predicate, _FIELDS, "predicate")
        code = _code(as_object(get(predicate, "code", dict), "code"))
        if "sha256:" + subject_digest(subject) != code.digest:
            raise Malformed("the subject's digest is not that of the code")
        policy = as_object(get(predicate, "trustPolicy", dict), "trustPolicy")
        only(policy, ("root", "version"), "trustPolicy")
        nodes = get_objects(predicate, "deployments", limit=MAX_PARTS)
        parts = {part.name: part for part in map(_part, nodes)}
        if not parts or len(parts) != len(nodes):
            raise Malformed("deployments is empty, or names one twice")
        return Deployment(
            application=get(subject, "name", str),
            sequence=_counted(predicate, "sequence"),
            trust_root=get(policy, "root", str),
            trust_version=_counted(policy, "version"),
            settings=_bounded(predicate, "settings", MAX_SETTINGS),
            files=_digests(predicate, "files", MAX_FILES),
            parts=MappingProxyType(parts),
            code=code,
            digest=envelope.digest,
        )
    except (Malformed, ConfigError) as error:
        raise VerificationError(f"{envelope.what}: {error}") from error


def _part(node: Object) -> Part:
    only(
        node,
        (
            *("name", "class", "service", "labels", "models"),
            *("arguments", "options", "tree"),
        ),
        "a deployment",
    )
    part = Part(
        name=get(node, "name", str),
        target=get(node, "class", str),
        service=get(node, "service", str),
        labels=_texts(node, "labels"),
        models=_texts(node, "models"),
        arguments=get(node, "arguments", str),
        options={
            key: _counted(_bounded(node, "options", MAX_PARTS), key)
            for key in _bounded(node, "options", MAX_PARTS)
        },
        tree=get(node, "tree", str),
    )
    for name in part.models:
        ref = part.ref(name)
        if ref is None or ref.digest is None or ref.version is None:
            raise Malformed(
                f"model {part.models[name]!r} of {part.name!r} is not pinned: expected "
                "name:version@sha256:..."
            )
    return part


def _code(node: Object) -> Code:
    only(node, ("python", "ztserve", "packages", "trees"), "code")
    packages = {
        name: tuple(_digest(one, f"package {name!r}") for one in _list(found, name))
        for name, found in _bounded(node, "packages", MAX_PACKAGES).items()
    }
    trees = _bounded(node, "trees", MAX_PARTS)
    files = {tree: _digests(trees, tree, MAX_TREE_FILES) for tree in trees}
    for tree, found in files.items():
        if tree != digest_of(dict(found)):
            raise Malformed(f"the tree {tree!r} is not the digest of its files")
    return Code(
        python=get(node, "python", str),
        ztserve=get(node, "ztserve", str),
        packages=MappingProxyType(packages),
        trees=MappingProxyType(files),
    )


def _bounded(node: Object, key: str, limit: int) -> Object:
    found = as_object(get(node, key, dict), key)
    if len(found) > limit:
        raise Malformed(f"{key!r} has {len(found)} entries, the limit is {limit}")
    return MappingProxyType(dict(found))


def _texts(node: Object, key: str) -> Mapping[str, str]:
    found = _bounded(node, key, MAX_PARTS)
    return MappingProxyType({name: get(found, name, str) for name in found})


def _digests(node: Object, key: str, limit: int) -> Mapping[str, str]:
    found = _bounded(node, key, limit)
    return MappingProxyType({name: _digest(found[name], name) for name in found})


def _digest(value: object, where: str) -> str:
    if not isinstance(value, str) or not _DIGEST.match(value):
        raise Malformed(f"{where}: {value!r} is not sha256:<64 hex digits>")
    return value


def _list(value: object, name: str) -> list[object]:
    if not isinstance(value, list) or not 0 < len(value) <= MAX_PARTS:
        raise Malformed(f"package {name!r} has no list of digests")
    return value


def _counted(node: Object, key: str) -> int:
    value = get(node, key, int)
    if not 0 <= value <= MAX_SEQUENCE:
        raise Malformed(f"{key} is {value}, expected 0 to {MAX_SEQUENCE}")
    return value
