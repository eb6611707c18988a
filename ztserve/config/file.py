"""ztserve.toml, read once, strictly, into frozen settings.

The file is found by ZTSERVE_CONFIG, else it is ``ztserve.toml`` in the working
directory, else the development defaults hold; it is never looked for in parent
directories. An unknown key is an error. Paths are relative to the file.
"""

import os
import stat
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from ztserve.artifacts import RegistryUrl
from ztserve.config import environment
from ztserve.config.coherence import coherent
from ztserve.config.settings import FILE, Between, Settings
from ztserve.doors import SCHEME, DoorAddress
from ztserve.errors import ConfigError

MAX_FILE_BYTES = 256 * 1024

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    Path: "a string, the path of a file",
}


def load(path: Path | None = None) -> Settings:
    """Read the configuration.

    Raises ConfigError for a file that cannot be read, is writable by others, holds an
    unknown key, or a value of the wrong kind or beyond its bounds.
    """
    found = path or found_file()
    if found is None:
        return coherent(Settings(base=Path.cwd()))
    return coherent(_parse(found))


def found_file() -> Path | None:
    """Return the configuration file in force; None: there is none."""
    named = environment.config_file()
    if named:
        path = Path(named)
        if not path.exists():
            raise ConfigError(
                f"ZTSERVE_CONFIG names {named}, and there is no such file"
            )
        return path
    here = Path.cwd() / FILE
    # Also a link that leads nowhere: the defaults are not what somebody meant by it.
    return here if here.exists() or here.is_symlink() else None


def _parse(path: Path) -> Settings:
    known: dict[str, Any] = {}
    set_keys = set()
    hints = get_type_hints(Settings)
    for name, value in _read(path).items():
        kind = hints.get(name)
        if name == "profile":
            known[name] = _value(value, kind, f"{path}: profile")
            set_keys.add(name)
        elif is_dataclass(kind) and isinstance(value, dict):
            known[name] = _table(kind, value, f"{path}: [{name}]")
            set_keys |= {f"{name}.{key}" for key in value}
        else:
            tables = [f.name for f in fields(Settings) if is_dataclass(hints[f.name])]
            raise ConfigError(
                f"{path}: {name!r} is not a known key; expected profile or a table of "
                + ", ".join(tables)
            )
    whole = path.resolve()
    return Settings(
        **known, base=whole.parent, file=whole, set_keys=frozenset(set_keys)
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        # Not blocking: a pipe in its place must not hang the start.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # Of the file that is open: the path could name another one by now.
            _check_mode(path, os.fstat(descriptor).st_mode)
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                raw = file.read(MAX_FILE_BYTES + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    try:
        return tomllib.loads(raw.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply") from None


def _check_mode(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{path}: is not a regular file")
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{path}: others may write to it, and so decide who may call; run: "
            f"chmod go-w {path}"
        )


def _table(kind: Any, tree: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind, include_extras=True)
    _only(tree, hints, where)
    return kind(
        **{
            key: _value(value, hints[key], f"{where} {key}")
            for key, value in tree.items()
        }
    )


def _only(tree: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in tree:
        if key not in known:
            raise ConfigError(
                f"{where}: {key!r} is not a known key; expected one of "
                + ", ".join(sorted(known))
            )


def _value(value: Any, kind: Any, where: str) -> Any:
    origin, parameters = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in parameters:
            raise ConfigError(
                f"{where}: {value!r} is none of {', '.join(map(repr, parameters))}"
            )
        return value
    if RegistryUrl in parameters and isinstance(value, str) and "://" in value:
        address = DoorAddress if value.startswith(SCHEME) else RegistryUrl
        return address.parse(value)
    if origin is UnionType:  # or None, which TOML cannot say
        return _value(value, parameters[0], where)
    if origin is Annotated:
        return _number(value, parameters[0], parameters[1], where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where}: expected a list, got {value!r}")
        return tuple(_value(item, parameters[0], where) for item in value)
    if type(value) is not (bool if kind is bool else str):
        raise ConfigError(f"{where}: expected {_KINDS[kind]}, got {value!r}")
    return kind(value)


def _number(value: Any, kind: type, bounds: Between, where: str) -> Any:
    # By exact type: a bool is an int as well.
    if type(value) is not kind and (kind, type(value)) != (float, int):
        raise ConfigError(f"{where}: expected {_KINDS[kind]}, got {value!r}")
    if not bounds.least <= value <= bounds.most:  # nor is NaN
        raise ConfigError(
            f"{where}: {value!r} is out of range; expected {bounds.least} to "
            f"{bounds.most}; no limit can be switched off"
        )
    return kind(value)
