"""The deployment bundle of this configuration: verified, and held against what runs.

`load_deployment` comes first in whatever serves; what it returns goes with the settings
from there, and checks each thing where it is used.
"""

import hashlib
import os
import platform
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from ztserve import artifacts
from ztserve.artifacts import Code, RegistryUrl, Tree, VerifiedDeployment
from ztserve.audit import Log
from ztserve.config.settings import Settings, entries
from ztserve.config.trust import load_trust
from ztserve.doors import DoorAddress
from ztserve.errors import ArtifactError, ConfigError, IdentityError
from ztserve.identity.guarded_files import read_guarded

MAX_NAMED_BYTES = 1 << 20


def is_demanded(settings: Settings) -> bool:
    """Tell whether nothing may be served without a bundle.

    In production; and on a node with a trust root of its own, whatever the settings
    that were sent to it say of their profile.
    """
    return settings.profile == "production" or artifacts.anchored() is not None


def load_deployment(
    settings: Settings, *, remember: bool = True
) -> VerifiedDeployment | None:
    """Verify the bundle, and the settings against it; None where none is needed.

    In development a bundle holds where there is one. `remember`: it is the newest that
    this node has seen from now on. Raises VerificationError and ConfigError.
    """
    path = settings.artifacts.deployment_bundle
    demanded = is_demanded(settings)
    if not os.path.lexists(path):
        if demanded:
            raise ConfigError(
                f"there is no deployment bundle {path}: production serves only what a "
                "deployer signed: `ztserve bundle sign module:app --key deployer.pem`"
            )
        return None
    raw = read_bundle(path)
    trust = load_trust(settings)
    verified = artifacts.verify_deployment(raw, trust, what=str(path))
    floor = artifacts.DeploymentFloor(settings.state)
    if remember:
        floor.keep(verified.signed)
    else:
        floor.check(verified.signed)
    verified.check_settings(signed_settings(settings))
    return verified


def read_bundle(path: Path) -> bytes:
    """Read a bundle that only we and root can change; ConfigError."""
    try:
        return read_guarded(path, artifacts.MAX_BUNDLE_BYTES, secret=False)
    except IdentityError as error:
        raise ConfigError(f"the deployment bundle: {error}") from error


def admit(settings: Settings, log: Log) -> VerifiedDeployment | None:
    """Hold the bundle against the settings and the code of this process, and audit it.

    Each record from here on bears its digest. For whatever serves, before it opens
    anything; raises as `load_deployment`.
    """
    with admitted(log):
        verified = load_deployment(settings)
        if verified is None:
            return None
        check_code(settings, verified)
    log.bear(verified.digest)
    signed = verified.signed
    log.event(
        "deployment-verified",
        application=signed.application,
        sequence=signed.sequence,
        digest=verified.digest,
        signer=str(verified.signer),
        trust_policy=f"at least version {signed.trust_version}",
    )
    return verified


@contextmanager
def admitted(log: Log) -> Iterator[None]:
    """Audit that what was to run is not what was signed, where the block says so."""
    try:
        yield
    except (ArtifactError, ConfigError) as error:
        log.event(
            "deployment-refused", status_code=type(error).__name__, reason=str(error)
        )
        raise


# --- settings and the files that they name ----------------------------------------


def signed_settings(settings: Settings) -> dict[str, object]:
    """Return each key with its value in force, as JSON says it, and the folder.

    Defaults too: another version of ztserve could have others. The folder, because
    floors, quarantine and audit log lie below it: elsewhere they would be empty.
    """
    found = {key: _plain(settings, value) for key, value, _ in entries(settings)}
    return found | {"folder": settings.base.as_posix()}


def _plain(settings: Settings, value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(settings, item) for item in value]
    if isinstance(value, Path):
        if not value.is_absolute():
            # It would have the name of the signed one, and lie elsewhere.
            raise ConfigError(
                f"the path {str(value)!r} in the settings is relative to whatever "
                "folder a process is in: settings come from `config.load`"
            )
        return file_name(settings, value)
    return str(value) if isinstance(value, RegistryUrl | DoorAddress) else value


def file_name(settings: Settings, path: Path | str) -> str:
    """Return what a bundle calls a file: its path, relative where it lies below us."""
    whole = Path(path)
    below = whole.is_relative_to(settings.base)
    return (whole.relative_to(settings.base) if below else whole).as_posix()


def named_files(settings: Settings) -> Iterator[Path]:
    """Yield the files whose bytes are signed: they decide who may call whom."""
    yield from settings.authorization.policies
    for path in (settings.identity.federation, settings.identity.entries):
        if path is not None:
            yield path


def read_named(settings: Settings) -> dict[str, str]:
    """Return the digests of these files by name, to be signed; ConfigError."""
    found = {}
    for path in named_files(settings):
        try:
            raw = read_guarded(path, MAX_NAMED_BYTES, secret=False)
        except IdentityError as error:
            raise ConfigError(str(error)) from error
        digest = "sha256:" + hashlib.sha256(raw).hexdigest()
        found[file_name(settings, path)] = digest
    return found


def left_out(settings: Settings) -> list[Path]:
    """Return what lies in no tree of code: files signed by themselves, and state."""
    ours, chosen = settings.identity, settings.artifacts
    policy = chosen.trust_policy
    found: list[Path | RegistryUrl | DoorAddress | None] = [
        *named_files(settings),
        *(settings.file, ours.svid_folder, *ours.svid_files, ours.quarantine),
        ours.spire_admin_socket,
        *(policy, policy.with_name(policy.name + ".sig"), chosen.trust_root),
        *(chosen.registry, chosen.registry_credentials, chosen.deployment_bundle),
        settings.audit.directory,
    ]
    return [path for path in found if isinstance(path, Path)]


# --- code -------------------------------------------------------------------------


def measure_code(
    settings: Settings, modules: Collection[str]
) -> tuple[Code, Mapping[str, str]]:
    """Measure what this process could import, with the trees that `modules` lie in.

    Returns the code, and for each module the digest of its tree ('': it is installed).
    """
    roots = {module: artifacts.root_of(module) for module in modules}
    trees = {
        root: artifacts.measure_tree(root, leave_out=left_out(settings))
        for root in sorted({root for root in roots.values() if root is not None})
    }
    code = Code(
        python=platform.python_version(),
        ztserve=_version(),
        packages=artifacts.measure_packages(trees),
        trees={tree.digest: tree.files for tree in trees.values()},
    )
    return code, {
        module: "" if root is None else trees[root].digest
        for module, root in roots.items()
    }


def check_code(settings: Settings, verified: VerifiedDeployment) -> None:
    """Hold the code that this process could import against the bundle.

    Trees are guarded from here on: their modules come from the measured bytes. A tree
    that is not on sys.path here, as beside a gateway, is passed over: it cannot run.
    """
    modules = {part.module: part.tree for part in verified.signed.parts.values()}
    trees: dict[Path, Tree] = {}
    for module, digest in modules.items():
        if not artifacts.is_found(module):
            continue
        root = artifacts.root_of(module)
        if root is not None and root not in trees:
            trees[root] = artifacts.measure_tree(root, leave_out=left_out(settings))
        verified.check_tree(digest, {} if root is None else trees[root].files)
    verified.check_runtime(
        Code(
            python=platform.python_version(),
            ztserve=_version(),
            packages=artifacts.measure_packages(trees),
        )
    )
    for tree in trees.values():
        artifacts.guard(tree)


def _version() -> str:
    try:
        return metadata.version("ztserve")
    except metadata.PackageNotFoundError:
        return "not installed"
