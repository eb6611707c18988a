"""From a reference to a verified model, step by step; each step raises or goes on."""

import os
from collections.abc import Mapping
from datetime import datetime

from ztserve import types
from ztserve.artifacts.loading.buffers import Buffer
from ztserve.artifacts.loading.content import check_contents, check_suffixes
from ztserve.artifacts.loading.judging import Purpose, gather, judge
from ztserve.artifacts.loading.memory import Memory, PrivateMemory, Wanted
from ztserve.artifacts.loading.model import VerifiedModel
from ztserve.artifacts.registry.protocol import Registry, open_registry
from ztserve.artifacts.statements.manifest import Manifest, SignedFile
from ztserve.artifacts.statements.serialization import Serialization
from ztserve.artifacts.trust.policy import TrustPolicy
from ztserve.errors import VerificationError
from ztserve.types import ModelRef


def verify_model(
    source: Registry | str | os.PathLike[str],
    ref: ModelRef | str,
    trust: TrustPolicy,
    *,
    now: datetime | None = None,
    purpose: Purpose = "load",
    max_bytes: int | None = None,
    memory: Memory | None = None,
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

    Raises RegistryError where the registry is away or answers nonsense (waiting may
    help), VerificationError where a check does not hold (waiting does not help).
    """
    if purpose not in {"load", "deploy"}:
        raise ValueError(f"purpose {purpose!r} is neither 'load' nor 'deploy'")
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
    # 7.
    buffers = (memory or PrivateMemory()).fill(
        Wanted(
            found.ref,
            listed,
            manifest.serialization,
            lambda name: registry.open(found, name),
            max_bytes,
        )
    )
    check_digests(manifest, buffers)
    # 8.
    files = {name: buffer.view for name, buffer in buffers.items()}
    layouts = check_contents(files)
    # 9.
    return VerifiedModel(
        name=ref.name,
        judged=judged,
        evidence=evidence,
        files=files,
        layouts=layouts,
    )


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
    """Raise VerificationError unless every file, or shard, has its signed digest."""
    for name, signed in manifest.files.items():
        if buffers[name].digests != signed.digests:
            raise VerificationError(
                f"{name!r} was changed after signing: "
                + _first_change(manifest.serialization, signed, buffers[name])
            )


def _first_change(how: Serialization, signed: SignedFile, buffer: Buffer) -> str:
    if len(buffer.digests) != len(signed.digests):
        return f"it has {len(buffer.digests)} shards, signed were {len(signed.digests)}"
    rows = zip(how.spans(len(buffer.view)), buffer.digests, signed.digests, strict=True)
    (start, end), found, expected = next(row for row in rows if row[1] != row[2])
    title = how.hash_type.replace("sha", "SHA-").replace("blake", "BLAKE")
    what = (
        f"the {title} of its bytes {start} to {end}" if signed.size else f"its {title}"
    )
    return f"{what} is {found}, signed was {expected}"
