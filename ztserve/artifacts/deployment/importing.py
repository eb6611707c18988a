"""Importing a tree's modules from the very bytes that were measured.

Between measuring and importing a file could change, and ``__pycache__`` could hold
other code than its source. So modules below a guarded tree are read once: these bytes
are hashed, held against the tree, and compiled. Compiled and extension modules are not
found there; install those as a package.
"""

import hashlib
import sys
from collections.abc import Callable
from importlib import import_module, invalidate_caches
from importlib.machinery import FileFinder, SourceFileLoader
from pathlib import Path
from types import CodeType

from ztserve.artifacts.deployment.measuring import Tree, covers
from ztserve.errors import ConfigError, VerificationError

_guarded: dict[Path, Tree] = {}


def guard(tree: Tree) -> None:
    """Have modules below the tree's root imported from the measured bytes only.

    What was imported from there already, except ztserve itself, is forgotten: the next
    import brings it in again, from these bytes. Holds for the life of the process; a
    root that is guarded again is held against the newer tree.
    """
    root = tree.root.resolve()
    if root not in _guarded:
        sys.path_hooks.insert(0, _hook(root))
    _guarded[root] = tree
    _forget(root)


def release(root: Path) -> None:
    """Guard a tree no longer, and forget its modules: for tests, which go on."""
    _guarded.pop(root.resolve(), None)
    _forget(root.resolve())


def load_class(target: str, *, tree: str = "") -> type:
    """Import a class by ``module:qualname``; raises ConfigError.

    `tree`: digest of the guarded tree that its module is to come from; '': anything.
    VerificationError where it does not: it was not there when the code was measured,
    or was imported in another way.
    """
    module, _, qualname = target.partition(":")
    if tree and all(known.digest != tree for known in _guarded.values()):
        raise VerificationError(
            f"module {module!r} was not found when the code was held against the "
            "deployment bundle: put the signed code on sys.path, then start again"
        )
    found = _found(target, module, qualname)
    loader = getattr(getattr(sys.modules.get(module), "__spec__", None), "loader", None)
    if tree and not isinstance(loader, MeasuredLoader):
        raise VerificationError(
            f"module {module!r} was imported by {type(loader).__name__}, not from the "
            "code that was held against the deployment bundle: find out what on "
            "sys.path, sys.meta_path or in sys.modules comes before it"
        )
    return found


def _found(target: str, module: str, qualname: str) -> type:
    try:
        found: object = import_module(module)
        for name in qualname.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{target!r} cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{target!r} is no class")
    return found


def _hook(root: Path) -> Callable[[str], FileFinder]:
    def finder(path: str) -> FileFinder:
        if root not in _guarded or not covers(root, Path(path).resolve()):
            raise ImportError(path)
        return FileFinder(path, (MeasuredLoader, [".py"]))

    return finder


def _forget(root: Path) -> None:
    for path in [*sys.path_importer_cache]:
        if covers(root, Path(path).resolve()):
            del sys.path_importer_cache[path]
    invalidate_caches()
    for name, module in [*sys.modules.items()]:
        place = getattr(module, "__file__", None)
        if place is None:  # a namespace package has folders only
            place = next(iter(getattr(module, "__path__", ())), None)
        ours = name.partition(".")[0] in ("ztserve", "__main__", "__mp_main__")
        if place and not ours and covers(root, Path(place).resolve()):
            del sys.modules[name]


class MeasuredLoader(SourceFileLoader):
    """Compiles a module from bytes that are those of its tree."""

    def get_code(self, fullname: str) -> CodeType:
        """Read, check, compile; raises VerificationError on other bytes."""
        named = Path(self.get_filename(fullname))
        # Not resolved itself: a link counts under its own name, as it was measured.
        path = named.parent.resolve() / named.name
        raw = self.get_data(str(path))
        check_bytes(path, raw)
        code: CodeType = self.source_to_code(raw, str(path))
        return code


def check_bytes(path: Path, raw: bytes) -> None:
    """Raise VerificationError unless these are the bytes that a guarded tree has."""
    inside = False
    for root, tree in _guarded.items():
        if covers(root, path):
            inside = True
            name = path.relative_to(root).as_posix()
            found = "sha256:" + hashlib.sha256(raw).hexdigest()
            if tree.files.get(name) != found:
                raise VerificationError(
                    f"{path} is {found}, and was {tree.files.get(name, 'not there')} "
                    "when the code was held against the deployment bundle: it was "
                    "changed since; find out by whom, then start again"
                )
    if not inside:
        raise VerificationError(f"{path} lies in no tree that was measured")
