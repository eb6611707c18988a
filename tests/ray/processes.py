"""Processes as /proc shows them: who is whose child, and what lies in their memory."""

import ipaddress
import os
import re
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 16 * 1024 * 1024
_OVERLAP = 1024
"""Longer than whatever is looked for."""


@dataclass(frozen=True)
class Process:
    """One process, told apart by its start from a later one with its pid."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> "Process | None":
        found = _stat(pid)
        return None if found is None else cls(pid, found[1])

    def is_alive(self) -> bool:
        found = _stat(self.pid)
        return found is not None and found[1] == self.started

    def command(self) -> str:
        """Its command line, as `ps` shows it."""
        return self._read("cmdline").replace(b"\0", b" ").decode(errors="replace")

    def environment(self) -> bytes:
        """Its environment, as `ps e` shows it."""
        return self._read("environ")

    def kill(self) -> None:
        if self.is_alive():
            os.kill(self.pid, signal.SIGKILL)

    def memory(self) -> Iterator[bytes]:
        """All that it can write to, in overlapping pieces. Raises PermissionError."""
        maps = self._read("maps").decode(errors="replace")
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            for line in maps.splitlines():
                span, rights, *_ = line.split(maxsplit=2)
                if rights.startswith("rw") and "plasma" not in line:
                    yield from _span(memory, *(int(end, 16) for end in span.split("-")))

    def object_store(self) -> Iterator[bytes]:
        """The shared memory that a raylet holds open, where something is in it."""
        for descriptor in Path(f"/proc/{self.pid}/fd").iterdir():
            try:
                name = str(descriptor.readlink())
            except OSError:
                continue
            if "plasma" in name and name.startswith("/"):
                with descriptor.open("rb", buffering=0) as file:
                    yield from _filled(file)

    def _read(self, name: str) -> bytes:
        try:
            return Path(f"/proc/{self.pid}/{name}").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return b""


def family(pid: int) -> set[Process]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (found := _stat(int(entry.name))):
            parents.setdefault(found[0], []).append(int(entry.name))
    members, left = set(), [pid]
    while left:
        at = left.pop()
        left += parents.get(at, ())
        if process := Process.of(at):
            members.add(process)
    return members


def listening(members: set[Process]) -> dict[str, str]:
    """The TCP addresses that these processes listen on, and whose each is."""
    sockets = {}
    for process in members:
        try:
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                name = str(descriptor.readlink())
                if found := re.fullmatch(r"socket:\[(\d+)\]", name):
                    sockets[found[1]] = process.command()
        except OSError:
            continue
    open_now = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and rest[5] in sockets:
                host, port = local.split(":")
                open_now[f"{_host(host)}:{int(port, 16)}"] = sockets[rest[5]]
    return open_now


def _host(text: str) -> str:
    """An address as /proc/net writes it: 32-bit words of the host's byte order."""
    words = struct.unpack(f">{len(text) // 8}I", bytes.fromhex(text))
    raw = struct.pack(f"={len(words)}I", *words)
    address = ipaddress.ip_address(raw)
    return str(getattr(address, "ipv4_mapped", None) or address)


def _stat(pid: int) -> tuple[int, int] | None:
    """Parent and start of a process; None where it is gone or a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else (int(fields[1]), int(fields[19]))


def _span(file, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        try:
            file.seek(start)
            piece = file.read(min(_CHUNK, end - start))
        except OSError:
            return  # gone since, or not there to be read
        if not piece:
            return
        yield piece
        start += len(piece) if len(piece) <= _OVERLAP else len(piece) - _OVERLAP
        if end - start <= _OVERLAP:
            return


def _filled(file) -> Iterator[bytes]:
    end = os.fstat(file.fileno()).st_size
    at = 0
    while at < end:
        try:
            at = os.lseek(file.fileno(), at, os.SEEK_DATA)
        except OSError:
            return  # nothing but holes from here on
        hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
        yield from _span(file, at, hole)
        at = hole
