"""A weights broker for tests, in this process: real sockets, memory and identities."""

import time
from contextlib import ExitStack

from ztserve.artifacts import verify_model
from ztserve.artifacts.loading.shared.borrowing import SharedMemory
from ztserve.artifacts.loading.shared.broker import Broker
from ztserve.testing import ThrowAwayAuthority

DOMAIN = "dev.ztserve.internal"
BROKER_ID = f"spiffe://{DOMAIN}/ns/ztserve/sa/weights"
REPLICA_ID = f"spiffe://{DOMAIN}/ns/ml-inference/sa/inference-service"
MAX_BYTES = 1 << 30


class Node:
    """A node's authority, its broker and those who borrow from it."""

    def __init__(self, workshop, path):
        self.workshop = workshop
        self.path = path / "weights.sock"
        self.authority = ThrowAwayAuthority(DOMAIN)
        self.events = []
        self.reads = 0
        self.before_read = lambda: None
        self._ending = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._ending.close()

    def tell(self, kind, fields):
        self.events.append((kind, fields))

    def told(self, kind):
        return [fields for known, fields in self.events if known == kind]

    def wait_for(self, fact, seconds=5.0):
        until = time.monotonic() + seconds
        while not fact():
            assert time.monotonic() < until, f"not within {seconds} s: {self.events}"
            time.sleep(0.01)

    def load(self, ref, memory):
        self.before_read()
        self.reads += 1
        return verify_model(
            self.workshop.registry, ref, self.workshop.trust, memory=memory
        )

    def broker(self, *, source=None, load=None, max_bytes=MAX_BYTES, **more):
        made = Broker(
            self.path,
            source or self.authority.source(BROKER_ID),
            load or self.load,
            max_bytes=max_bytes,
            on_event=self.tell,
            **more,
        )
        made.start()
        self._ending.callback(made.stop)
        return made

    def memory(self, *, source=None, min_bytes=0, broker_id=BROKER_ID, **more):
        return SharedMemory(
            self.path,
            broker_id,
            source or self.authority.source(REPLICA_ID),
            min_bytes=min_bytes,
            on_event=self.tell,
            **more,
        )

    def verify(self, ref="digits:1", trust=None, **more):
        """Verify as a replica of this node does."""
        return verify_model(
            self.workshop.registry,
            ref,
            trust or self.workshop.trust,
            memory=self.memory(**more),
        )
