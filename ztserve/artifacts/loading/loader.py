"""From a reference to a verified model, step by step; each step raises or goes on."""

import os
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import TypeAlias

from ztserve import types
from ztserve.artifacts.loading.buffers import Buffer, physical_memory
from ztserve.artifacts.loading.content import WEIGHTS, check_contents, check_suffixes
from ztserve.artifacts.loading.header import Layout
from ztserve.artifacts.loading.judging import Purpose, gather, judge
from ztserve.artifacts.loading.memory import Memory, PrivateMemory, Wanted
from ztserve.artifacts.loading.model import VerifiedModel
from ztserve.artifacts.loading.progress import Meter, Tell
from ztserve.artifacts.loading.shards import Shards, difference
from ztserve.artifacts.registry.protocol import Registry, open_registry
from ztserve.artifacts.statements.manifest import Manifest
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.errors import VerificationError
from ztserve.types import ModelRef


def verify_model(  # noqa: PLR0913 - what one may want to say, each with a default
    source: Registry | str | os.PathLike[str],
    ref: ModelRef | str,
    trust: TrustPolicy,
    *,
    now: datetime | None = None,
    purpose: Purpose = "load",
    max_bytes: int | None = None,
    memory: Memory | None = None,
    lazy: bool = False,
    progress: Tell | None = None,
) -> VerifiedModel:
    """Return the model that `ref` names, after these steps:

    1. the registry (untrusted) says which manifest the reference means; a pinned
       digest must be that one;
    2. a trainer whom the policy trusts now signed the manifest;
    3. the manifest is the one that step 1 named, and is not revoked;
    4. a deployer whom the policy trusts now released this very manifest under the
       name, and the version, that were asked for; it is not below the policy's
       min_versions;
    5. each ``[[require]]`` of the policy that concerns it is met by attestations of
       this very manifest; nobody acts in two roles;
    6. the registry has the signed files and no other (a closed world), none of a
       kind that can run, or of a format that the policy does not allow, each of
       its signed size where shards tell it;
    7. every file, read once into private memory, has its signed digest;
    8. what is in the files is data: safetensors in bounds, no pickles, no code;
    9. only now does anything of the model become reachable.

    `source` is a registry, its path, or the path of a signed directory. With purpose
    ``deploy`` (before there is a release) step 4 is left out, with what step 5 would
    require of deployers alone, and `release` of the result is None; such a model is for
    a deployer to look at, not to serve.
    `max_bytes` bounds the memory for the files (default: the machine's). `memory` has
    step 7 done elsewhere than in this process's own: whose digests it gives, it proves.
    `progress` is called on this thread as the files are read here, ten times a second
    at most and once at the end; what it raises ends the loading.

    With `lazy`, of the weight files only the headers are read in steps 7 and 8, and
    the model reads and verifies each shard of them when its tensors are first asked
    for: so a rank reads its part alone, where the model was signed with shards (else
    a shard is a whole file). All else is as above, and no byte is given out that was
    not verified; **of bytes that were not asked for nobody says that they are good**
    (`VerifiedModel.unread`). Not for purpose ``deploy``, which is to look at all, nor
    with a `memory`, which has all read.

    Raises RegistryError where the registry is away or answers nonsense (waiting may
    help), VerificationError where a check does not hold (waiting does not help).
    """
    if purpose not in {"load", "deploy"}:
        raise ValueError(f"purpose {purpose!r} is neither 'load' nor 'deploy'")
    if lazy and purpose == "deploy":
        raise ValueError("a model is released whole: purpose 'deploy' cannot be lazy")
    if lazy and memory is not None:
        raise ValueError("a lazy model has memory of its own: leave `memory` out")
    ref = ModelRef(ref) if isinstance(ref, str) else ref
    registry = (
        open_registry(source) if isinstance(source, str | os.PathLike) else source
    )
    moment = types.now() if now is None else now
    # 1.
    found = registry.resolve(ref)
    ref.pinned(found.digest)
    # 2. to 5.
    evidence = gather(registry, found, trust, now=moment, purpose=purpose)
    judged = judge(evidence, ref, trust, now=moment, purpose=purpose)
    # 6.
    manifest, listed = judged.manifest, registry.files(found)
    check_closed(manifest, listed)
    check_suffixes(listed)
    trust.check_formats(listed)
    check_sizes(manifest, listed)
    # 7. and 8.
    want = Wanted(
        found.ref,
        listed,
        manifest.serialization,
        lambda name: registry.open(found, name),
        max_bytes,
        Meter(progress, manifest) if progress else None,
    )
    files, layouts, shards = (
        _lazily(want, manifest)
        if lazy
        else _whole(want, manifest, memory or PrivateMemory())
    )
    # 9.
    return VerifiedModel(
        name=ref.name,
        judged=judged,
        evidence=evidence,
        files=files,
        layouts=layouts,
        shards=shards,
    )


_Content: TypeAlias = tuple[
    Mapping[str, memoryview], Mapping[str, Layout], Shards | None
]


def _whole(want: Wanted, manifest: Manifest, memory: Memory) -> _Content:
    """Read, hash and look into all of every file; return what the model is made of."""
    files = _filled(want, manifest, memory)
    return files, check_contents(files), None


def _lazily(want: Wanted, manifest: Manifest) -> _Content:
    """Do the same with all but weights, and with the headers of those."""
    weights = {name: n for name, n in want.sizes.items() if name.endswith(WEIGHTS)}
    others = {name: n for name, n in want.sizes.items() if name not in weights}
    files = _filled(replace(want, sizes=others), manifest, PrivateMemory())
    limit = physical_memory() if want.max_bytes is None else want.max_bytes
    limit -= sum(others.values())
    shards = Shards(want.open, manifest, weights, max_bytes=limit)
    heads = {name: shards.header(name) for name in weights}
    return files, check_contents(files | heads, want.sizes), shards


def _filled(want: Wanted, manifest: Manifest, memory: Memory) -> dict[str, memoryview]:
    buffers = memory.fill(want)
    check_digests(manifest, buffers)
    return {name: buffer.view for name, buffer in buffers.items()}


def check_closed(manifest: Manifest, listed: Mapping[str, int]) -> None:
    """Raise VerificationError unless exactly the signed files are there."""
    extra = sorted(listed.keys() - manifest.files.keys())
    if extra:
        raise VerificationError(
            f"extra file {extra[0]!r:.300} ({len(extra)} in all) is not signed: "
            "remove it, or sign the model again with it"
        )
    missing = sorted(manifest.files.keys() - listed.keys())
    if missing:
        raise VerificationError(
            f"missing file {missing[0]!r} ({len(missing)} in all) is signed but absent"
        )


def check_sizes(manifest: Manifest, listed: Mapping[str, int]) -> None:
    """Raise VerificationError where a file has not its signed size.

    Before anything is read: shards of a lying registry's size would have no end.
    """
    for name, signed in manifest.files.items():
        if signed.size is not None and listed[name] != signed.size:
            raise VerificationError(
                f"{name!r} was changed after signing: it has {listed[name]} bytes, "
                f"its signed shards have {signed.size}"
            )


def check_digests(manifest: Manifest, buffers: Mapping[str, Buffer]) -> None:
    """Raise VerificationError unless each file, or shard, has its signed digest."""
    for name, signed in manifest.files.items():
        if name in buffers and buffers[name].digests != signed.digests:
            raise VerificationError(
                f"{name!r} was changed after signing: "
                + _first_change(manifest, name, buffers[name])
            )


def _first_change(manifest: Manifest, name: str, buffer: Buffer) -> str:
    signed = manifest.files[name].digests
    if len(buffer.digests) != len(signed):
        return f"it has {len(buffer.digests)} shards, signed were {len(signed)}"
    spans = manifest.serialization.spans(len(buffer.view))
    rows = zip(spans, buffer.digests, signed, strict=True)
    span, found, expected = next(row for row in rows if row[1] != row[2])
    return difference(manifest, name, span, found, expected)
