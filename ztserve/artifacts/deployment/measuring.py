"""Measuring code: the files that Python would import, hashed as they lie there.

A *tree* is the folder in which the user's own modules lie, file by file. *Packages* are
what lies in the other folders of sys.path, a digest for each name that can be imported
there. Not measured: the interpreter, its standard library, and ``__pycache__``: modules
of a tree are compiled from the measured bytes (`importing`), those of packages are not.
Whatever lies in a package counts, its RECORD or none: that file is in the same hands.
"""

import hashlib
import os
import stat
import sys
import sysconfig
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import invalidate_caches
from importlib.machinery import ModuleSpec, PathFinder
from itertools import islice
from pathlib import Path
from threading import Lock

from ztserve.artifacts.statements.deployment import (
    MAX_PACKAGES,
    MAX_TREE_FILES,
    digest_of,
)
from ztserve.errors import ConfigError

LEFT_OUT = frozenset({".git", ".venv", ".ztserve", "__pycache__"})
"""Folders that no tree and no package is made of, at any depth."""
INSTALLERS = frozenset({"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"})
"""Files of a ``.dist-info`` that say how it was installed, which differs by node."""
MAX_TREE_BYTES = 2 << 30
MAX_PACKAGE_FILES = 1 << 20
MAX_PACKAGE_BYTES = 64 << 30
MEASURE_S = 300.0
"""Longest that one measuring may take."""
MAX_DEPTH = 64
_CHUNK = 1 << 20
_BATCH = 64
_INSTALLED = {"site-packages", "dist-packages"}
_MODULES = (".py", ".pyc", ".so", ".pth", ".egg-link")


@dataclass(frozen=True, slots=True)
class Tree:
    """A folder of the user's own modules."""

    root: Path
    files: Mapping[str, str]
    """Path below the root, with ``/``, to ``sha256:<hex>``."""

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of the list of files."""
        return digest_of(dict(self.files))


def measure_tree(
    root: Path, *, leave_out: Collection[Path] = (), timeout_s: float = MEASURE_S
) -> Tree:
    """Hash each file below `root`, except in `LEFT_OUT` and what `leave_out` names.

    Raises ConfigError on a folder that is a link, on what is no plain file, and beyond
    20,000 files, 2 GiB or `timeout_s`.
    """
    left = frozenset(str(path.absolute()) for path in leave_out)
    budget = _Budget(root, MAX_TREE_FILES, MAX_TREE_BYTES, timeout_s)
    return Tree(root, _hashed(root, _files(root, left), budget))


def measure_packages(
    trees: Collection[Path] = (),
    *,
    path: Collection[str] | None = None,
    timeout_s: float = MEASURE_S,
) -> dict[str, tuple[str, ...]]:
    """Return what the folders of sys.path hold: name to digests, one a place.

    Without the standard library, and without `trees`, which are measured file by file.
    Raises ConfigError as `measure_tree`, beyond 2**20 files or 64 GiB.
    """
    if sys.pycache_prefix is not None:
        raise ConfigError(
            f"compiled modules would be taken from {sys.pycache_prefix}, which nobody "
            "measures: unset PYTHONPYCACHEPREFIX, and start again"
        )
    found: dict[str, list[str]] = {}
    path = list(sys.path if path is None else path)
    for archive in _archives(path):
        budget = _Budget(archive, 1, MAX_PACKAGE_BYTES, timeout_s)
        found.setdefault(archive.name, []).append(_hash(str(archive), budget))
    for root in import_roots(path, trees):
        budget = _Budget(root, MAX_PACKAGE_FILES, MAX_PACKAGE_BYTES, timeout_s)
        by_name: dict[str, dict[str, str]] = {}
        for file, digest in _hashed(root, _packaged(root), budget).items():
            by_name.setdefault(file.split("/", 1)[0], {})[file] = digest
        _check_editable(root, by_name)
        for name, contents in by_name.items():
            found.setdefault(name, []).append(digest_of(contents))
    if len(found) > MAX_PACKAGES:
        raise ConfigError(
            f"{len(found)} packages can be imported, the limit is {MAX_PACKAGES}: "
            "serve from a virtual environment of its own"
        )
    return {name: tuple(digests) for name, digests in sorted(found.items())}


def _archives(path: Collection[str]) -> list[Path]:
    """Return the zip files that Python imports from, also ``x.zip/folder``."""
    ways = ([Path(entry), *Path(entry).parents] for entry in path)
    files = (next((place for place in way if place.is_file()), None) for way in ways)
    return [file for file in dict.fromkeys(files) if file is not None]


def _check_editable(root: Path, names: Collection[str]) -> None:
    for name in names:
        if name.startswith("__editable__") and name.endswith("_finder.py"):
            raise ConfigError(
                f"{root / name}: a package is installed as editable, so its code lies "
                "elsewhere and is not measured; install it (pip install, without -e)"
            )


def import_roots(path: Collection[str], trees: Collection[Path]) -> list[Path]:
    """Return the folders of sys.path that are to be measured, each once.

    Folders within another one, or within the standard library's, are not named again.
    """
    measured = [tree.resolve() for tree in trees]
    roots: list[Path] = []
    for root in (Path(entry or ".").resolve() for entry in path):
        inner = any(covers(tree, root) for tree in measured)
        if root.is_dir() and not inner and not _is_standard(root):
            roots.append(root)
    return [
        root
        for root in dict.fromkeys(roots)
        if not any(_holds(other, root) for other in roots)
    ]


def covers(tree: Path, path: Path) -> bool:
    """Tell whether what lies at `path` is measured with the tree at `tree`."""
    return path.is_relative_to(tree) and LEFT_OUT.isdisjoint(
        path.relative_to(tree).parts
    )


def _holds(root: Path, inner: Path) -> bool:
    """Tell whether a folder is part of a package of another folder of sys.path."""
    return (
        inner != root
        and covers(root, inner)
        and inner.relative_to(root).parts[0].isidentifier()
    )


def _is_standard(root: Path) -> bool:
    """Tell whether a folder is the standard library's."""
    if _INSTALLED & set(root.parts):
        return False
    known = (sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib"))
    return any(root.is_relative_to(Path(folder).resolve()) for folder in known)


def is_found(module: str) -> bool:
    """Tell whether sys.path has a module's top package; nothing is imported."""
    return _top(module) is not None


def root_of(module: str) -> Path | None:
    """Return the folder of sys.path in which a module's top package lies.

    Nothing is imported. None for one that is installed, or not in any file; ConfigError
    where there is none.
    """
    spec = _top(module)
    if spec is None:
        raise ConfigError(
            f"there is no module {module!r} on sys.path: start where it lies, or "
            "install it"
        )
    places = list(spec.submodule_search_locations or ())
    if not places and spec.origin in (None, "built-in", "frozen"):
        return None
    root = Path(places[0] if places else str(spec.origin)).parent.resolve()
    return None if _INSTALLED & set(root.parts) or _is_standard(root) else root


def _top(module: str) -> ModuleSpec | None:
    # Files put on sys.path a moment ago must be seen.
    invalidate_caches()
    return PathFinder.find_spec(module.partition(".")[0])


# --- walking ----------------------------------------------------------------------


class _Budget:
    """What one measuring may take; ConfigError beyond."""

    def __init__(self, root: Path, files: int, size: int, timeout_s: float) -> None:
        self._root = root
        self._files, self._bytes = files, size
        self._most = f"{files} files, {size >> 20} MiB or {timeout_s:g} s"
        self._lock = Lock()
        self._until = time.monotonic() + timeout_s

    def take(self, size: int, files: int = 0) -> None:
        with self._lock:
            self._files -= files
            self._bytes -= size
        if self._files < 0 or self._bytes < 0 or time.monotonic() > self._until:
            raise ConfigError(
                f"{self._root} is more code than {self._most}: keep data and models "
                "elsewhere, and serve from a folder that holds the application alone"
            )


def _hashed(root: Path, files: Iterable[str], budget: _Budget) -> dict[str, str]:
    """Return path below the root to digest; many files of packages are small."""
    below = len(str(root.absolute())) + 1
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as hashers:
        batches, waiting = [], iter(files)
        while batch := list(islice(waiting, _BATCH)):
            budget.take(0, len(batch))
            batches.append(hashers.submit(_hash_each, batch, budget))
        try:
            found = [pair for batch in batches for pair in batch.result()]
        finally:
            hashers.shutdown(cancel_futures=True)
    return {file[below:]: digest for file, digest in found}


def _hash_each(files: list[str], budget: _Budget) -> list[tuple[str, str]]:
    return [(file, _hash(file, budget)) for file in files]


def _hash(file: str, budget: _Budget) -> str:
    try:
        # A pipe must not make the start wait for a writer.
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ConfigError(f"{file} is no plain file: code is")
            digest = hashlib.sha256()
            while piece := os.read(descriptor, _CHUNK):
                budget.take(len(piece))
                digest.update(piece)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    return "sha256:" + digest.hexdigest()


def _files(root: Path, left: Collection[str] = ()) -> Iterator[str]:
    """Yield the files below a folder; links to files are followed when read."""
    folders = [(str(root.absolute()), 0)]
    while folders:
        folder, depth = folders.pop()
        for entry in _entries(folder):
            if entry.path in left:
                continue
            if not entry.is_dir():
                yield entry.path
            elif entry.name in LEFT_OUT:
                continue
            elif entry.is_symlink() or depth >= MAX_DEPTH:
                raise ConfigError(
                    f"{entry.path} is a link to a folder, or {MAX_DEPTH} folders deep: "
                    "what lies there cannot be signed; put the files in its place"
                )
            else:
                folders.append((entry.path, depth + 1))


def _packaged(root: Path) -> Iterator[str]:
    """Yield the files that can be imported from a folder of sys.path."""
    for entry in _entries(root.absolute()):
        if not _is_importable(entry):
            continue
        if not entry.is_dir():
            yield entry.path
            continue
        in_info = entry.name.endswith(".dist-info")
        for file in _files(Path(entry)):
            if not (in_info and os.path.basename(file) in INSTALLERS):  # noqa: PTH119
                yield file


def _entries(folder: Path | str) -> "list[os.DirEntry[str]]":
    try:
        with os.scandir(folder) as found:
            return sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be read: {error.strerror}") from error


def _is_importable(entry: "os.DirEntry[str]") -> bool:
    """Tell whether a name in a folder of sys.path can bring code into a process.

    Wheels keep the native libraries that their modules load in folders such as
    ``numpy.libs``, which no import names.
    """
    if entry.is_dir():
        return entry.name not in LEFT_OUT and not entry.name.startswith(".")
    return entry.name.endswith(_MODULES) or ".so." in entry.name
