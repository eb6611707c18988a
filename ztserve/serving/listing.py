"""Which replicas are listed: those that Serve says run, less those that have left.

Serve takes its time over a replica that is not well: it looks each second, and believes
it after three. A replica that takes no more calls says so itself, and is listed no
longer.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from ztserve.transport import Endpoint
from ztserve.transport.directory import MAX_ENDPOINTS

Place: TypeAlias = tuple[str, str]
"""An application of Serve's, and a deployment in it."""
Endpoints: TypeAlias = tuple[Endpoint, ...]
LOOK_UP_S = 1.0
"""How often who watches is looked after, where nothing changes."""


class Listing:
    """Where the replicas of each ``namespace/service`` are; for several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._replicas: dict[str, dict[Place, Sequence[Mapping[str, Any]]]] = {}
        self._left: deque[str] = deque(maxlen=MAX_ENDPOINTS)
        """The newest that left: Serve soon names them no more."""

    def update(
        self, key: str, place: Place, replicas: Sequence[Mapping[str, Any]]
    ) -> None:
        """Take what Serve says of a place; each replica is its metadata.

        Several places may bear one identity; their replicas are listed together.
        """
        with self._changed:
            ours = [replica for replica in replicas if replica.get("ztserve")]
            self._replicas.setdefault(key, {})[place] = ours
            self._changed.notify_all()

    def leave(self, replica: str) -> None:
        """List a replica, by its ID of Serve's, no longer, whatever Serve says."""
        with self._changed:
            if replica not in self._left:
                self._left.append(replica)
                self._changed.notify_all()

    def all(self) -> dict[str, Endpoints]:
        """Return all that is listed, by namespace/service."""
        with self._changed:
            return {key: self._endpoints(key) for key in self._replicas}

    def watch(self, key: str, wanted: Callable[[], bool]) -> Iterator[Endpoints]:
        """Yield where the replicas are, now and at each change, while it is wanted."""
        seen: Endpoints | None = None
        while wanted():
            with self._changed:
                current = self._endpoints(key)
                if current == seen:
                    self._changed.wait(LOOK_UP_S)
                    continue
            seen = current
            yield current

    def _endpoints(self, key: str) -> Endpoints:
        return tuple(
            Endpoint(r["address"], r["model"], r["version"], r["digest"])
            for replicas in self._replicas.get(key, {}).values()
            for r in replicas
            if r["replica"] not in self._left
        )
