"""Withdrawing a model that runs: its statements, judged anew with each trust policy."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ztserve import types
from ztserve.artifacts import Evidence, FollowedPolicy, TrustPolicy, judge
from ztserve.audit import Log
from ztserve.errors import ConfigError, VerificationError
from ztserve.types import ModelRef

LOOK_S = 1.0
"""How often the trust policy is looked at."""
GRACE_S = 3.0
"""What running calls have to end in: looking and this make less than five seconds."""


@dataclass(frozen=True, slots=True)
class Held:
    """What there is to judge of a model that a replica serves; not its weights."""

    ref: ModelRef
    """What it was asked for as."""
    evidence: Evidence
    names: tuple[str, ...]
    """Its files."""


class Withdrawal:
    """Follows the trust policy on a thread, and ends a replica that it turns against.

    A policy that cannot be taken is audited and changes nothing; one that has expired,
    that `check` refuses, or under which a model would not load now, ends the replica:
    `on_withdrawn` is called once, with the reason. Nothing more is looked at then.
    """

    def __init__(
        self,
        followed: FollowedPolicy,
        held: Mapping[str, Held],
        log: Log,
        on_withdrawn: Callable[[VerificationError], None],
        check: Callable[[TrustPolicy], None] = lambda _policy: None,
    ) -> None:
        self._followed = followed
        self._held = held
        self._log = log
        self._on_withdrawn = on_withdrawn
        self._check = check
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name="ztserve-trust", daemon=True
        )

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    @property
    def looks(self) -> bool:
        """Whether the policy is followed still."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Stop looking. May be called again, and by `on_withdrawn` itself."""
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(LOOK_S):
            try:
                self.look()
            except VerificationError as error:
                self._on_withdrawn(error)
                return

    def look(self) -> None:
        """Take a new policy if there is one; VerificationError where a model falls."""
        newer = self._newer()
        self._followed.policy.check_current()
        if newer is None:
            return
        self._log.event(
            "trust-policy-taken", version=newer.version, digest=newer.digest
        )
        self._check(newer)
        now = types.now()
        for held in self._held.values():
            judge(held.evidence, held.ref, newer, now=now)
            newer.check_formats(held.names)

    def _newer(self) -> TrustPolicy | None:
        try:
            return self._followed.look()
        except ConfigError as error:
            self._log.event("trust-policy-refused", reason=str(error))
            return None
