"""The writer of a race: a program by itself, which starts at once."""

import os
import struct
import sys
from pathlib import Path

FILES = ("model.safetensors", "labels.txt")
EVIL = struct.pack("<f", 666)


def write() -> None:
    """Take turns at the files that standard input names; leave them as they were."""
    root, turns = Path(sys.stdin.readline().strip()), int(sys.stdin.readline())
    good = {name: (root / name).read_bytes() for name in FILES}
    evil = {name: _poison(content) for name, content in good.items()}
    moves = (_swap, _edit, _cut, _lengthen, _unlink, _link)
    for turn in range(turns):
        name = FILES[turn % 2]
        path, move = root / name, moves[turn // 2 % len(moves)]
        move(path, evil[name])
        _swap(path, good[name])
    for name in FILES:
        _swap(root / name, good[name])


def _poison(content: bytes) -> bytes:
    """Another tail for half of the content, and of the same length."""
    half = len(content) // 2 // 4 * 4
    return content[: len(content) - half] + EVIL * (half // 4)


def _swap(path: Path, content: bytes) -> None:
    new = path.parent.parent / "new"
    new.write_bytes(content)
    new.replace(path)


def _edit(path: Path, content: bytes) -> None:
    with path.open("r+b") as file:
        file.write(content)


def _cut(path: Path, content: bytes) -> None:
    os.truncate(path, len(content) // 3)


def _lengthen(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def _unlink(path: Path, _: bytes) -> None:
    path.unlink()


def _link(path: Path, content: bytes) -> None:
    evil = path.parent.parent / "evil"
    evil.write_bytes(content)
    path.unlink()
    path.symlink_to(evil)


if __name__ == "__main__":
    write()
