"""Which process is asking, and which SPIFFE ID may it have?

The kernel tells who is at the other end of a unix socket (SO_PEERCRED, and where there
is SO_PEERPIDFD a handle that pins the process). **A boundary** is another uid,
container or node: the kernel keeps those apart. Between processes of one uid the rules
here are **hygiene**: such processes can trace one another unless hardened, a worker can
leave its family tree by forking twice, one Ray worker can run code in another, and all
of them can reach the same sockets. They keep honest code from taking a wrong name by
mistake, and make a lie visible (`FalseClaim` becomes an alert).
"""

import errno
import os
import select
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeAlias

from ztserve.errors import IdentityError
from ztserve.identity.spiffe_id import SpiffeId, trust_domain_name, workload_id

if TYPE_CHECKING:
    from asyncio.trsock import TransportSocket

Connection: TypeAlias = "socket.socket | TransportSocket"

_SO_PEERPIDFD = 77  # linux >= 6.5; `socket` has no name for it
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_MAX_ANCESTORS = 64


class FalseClaim(IdentityError):
    """A claim that no honest process makes: refused, and an alert."""


class CannotTell(IdentityError):
    """What a process may be cannot be found out now: no refusal, ask again later."""


@dataclass(frozen=True, slots=True)
class Process:
    """A process as the kernel vouches for it, told apart by start from reused pids."""

    pid: int
    started: int
    """Clock ticks after boot."""
    uid: int
    gid: int

    def check_alive(self) -> None:
        """Raise IdentityError if it has ended, also if its pid is another's now."""
        if _stat(self.pid)[1] != self.started:
            raise IdentityError(f"process {self.pid} has ended; its pid is another's")


def this_process() -> Process:
    """Return the process that asks."""
    pid = os.getpid()
    return Process(pid, _stat(pid)[1], os.geteuid(), os.getegid())


def attest(connection: Connection) -> Process:
    """Return who opened the other end of a unix socket. Raises IdentityError."""
    raw = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
    )
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    if pid <= 0:
        raise IdentityError("the caller is in a process namespace that hides its pid")
    handle = _pidfd(connection)
    try:
        started = _stat(pid)[1]
        if handle is not None and _has_ended(handle):
            raise IdentityError(f"process {pid} ended before it was identified")
        return Process(pid, started, uid, gid)
    finally:
        if handle is not None:
            os.close(handle)


def _pidfd(connection: Connection) -> int | None:
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            return None  # an older kernel: the start time alone must do
        raise IdentityError(f"the calling process is gone: {error.strerror}") from error
    return int(struct.unpack("i", raw)[0])


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _stat(pid: int) -> tuple[int, int]:
    """Return parent and start time of a process (proc(5)); IdentityError if gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError as error:
        raise IdentityError(f"process {pid} is gone") from error
    fields = text.rpartition(")")[2].split()  # the command's name may hold anything
    if fields[0] in "ZX":
        raise IdentityError(f"process {pid} has ended")
    return int(fields[1]), int(fields[19])


def descends_from(pid: int, ancestor: int) -> bool:
    """Return whether `pid` is a child of `ancestor`, or a child's child, and so on."""
    for _ in range(_MAX_ANCESTORS):
        pid = _stat(pid)[0]
        if pid == ancestor:
            return True
        if pid <= 1:
            return False
    raise IdentityError(f"process {pid} has over {_MAX_ANCESTORS} ancestors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which process may have which SPIFFE ID; what is not said is refused.

    Workers are the descendants of the process `worker_parent` (Ray's raylet); all other
    processes of `uid` are local. Raises IdentityError for an ID of another trust
    domain.
    """

    trust_domain: str
    worker_parent: int | None = None
    worker_namespaces: tuple[str, ...] = ()
    """Workers may register ``/ns/<one of these>/sa/<any service>``."""
    worker_ids: tuple[str, ...] = ()
    """Further IDs that workers may register."""
    local_ids: tuple[str, ...] = ()
    """IDs that local processes may register."""
    default_id: str | None = None
    """The ID of a local process that registers none."""
    uid: int = field(default_factory=os.geteuid)

    def __post_init__(self) -> None:
        trust_domain_name(self.trust_domain)
        default = () if self.default_id is None else (self.default_id,)
        for spiffe_id in (*self.worker_ids, *self.local_ids, *default):
            self._own(spiffe_id)

    @classmethod
    def development(cls, trust_domain: str, *, worker_parent: int | None) -> Self:
        """Return the rules of one developer's machine."""
        root = f"spiffe://{trust_domain_name(trust_domain)}/ns"
        return cls(
            trust_domain=trust_domain,
            worker_parent=worker_parent,
            worker_namespaces=("ml-inference",),
            worker_ids=(f"{root}/ztserve/sa/directory",),
            local_ids=(f"{root}/ml-api/sa/api-gateway", f"{root}/ztserve/sa/registry"),
            default_id=f"{root}/dev/sa/cli",
        )

    def check_uid(self, process: Process) -> None:
        """Raise IdentityError unless `process` runs under our uid."""
        if process.uid != self.uid:
            raise IdentityError(
                f"process {process.pid} runs as uid {process.uid}; only uid {self.uid} "
                "is served here"
            )

    def check_claim(self, process: Process, spiffe_id: SpiffeId) -> None:
        """Raise IdentityError unless `process` may register `spiffe_id`."""
        self.check_uid(process)
        self._own(spiffe_id)
        if self.is_worker(process):
            self.check_worker(process, spiffe_id)
            kind, allowed = "a Ray worker", self._for_workers(spiffe_id)
        else:
            kind, allowed = "a local process", self.is_local(spiffe_id)
        if not allowed:
            raise IdentityError(
                f"process {process.pid} is {kind}, and none such may be {spiffe_id}"
            )

    def check_worker(self, process: Process, spiffe_id: SpiffeId) -> None:
        """Raise FalseClaim where `spiffe_id` is one that no worker ever gets.

        Those are the IDs of local processes: gateway, doors, developer.
        """
        if self.is_local(spiffe_id):
            raise FalseClaim(
                f"process {process.pid} is a Ray worker, and none such may be "
                f"{spiffe_id}"
            )

    def is_local(self, spiffe_id: SpiffeId) -> bool:
        """Return whether `spiffe_id` is for local processes alone."""
        return spiffe_id in (*self.local_ids, self.default_id)

    def default(self, process: Process) -> SpiffeId:
        """Return the ID of a process that registered none; IdentityError if none."""
        self.check_uid(process)
        if self.default_id is None or self.is_worker(process):
            raise IdentityError(f"process {process.pid} has registered no identity")
        return SpiffeId.parse(self.default_id)

    def is_worker(self, process: Process) -> bool:
        """Return whether `process` descends from the workers' parent."""
        parent = self.worker_parent
        return parent is not None and descends_from(process.pid, parent)

    def _for_workers(self, spiffe_id: SpiffeId) -> bool:
        match spiffe_id.path.split("/"):
            case ["", "ns", namespace, "sa", _] if namespace in self.worker_namespaces:
                return True
        return spiffe_id in self.worker_ids

    def _own(self, text: str) -> None:
        spiffe_id = workload_id(text)
        if spiffe_id.trust_domain != self.trust_domain:
            raise IdentityError(
                f"{spiffe_id} is not of the trust domain {self.trust_domain}"
            )
