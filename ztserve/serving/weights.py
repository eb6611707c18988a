"""A replica's weights: resolved, pinned for the whole deploy, and verified."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from ztserve import config
from ztserve.artifacts import (
    FollowedPolicy,
    Memory,
    Progress,
    Registry,
    TrustPolicy,
    VerifiedModel,
    verify_model,
)
from ztserve.audit import Log
from ztserve.config import Settings, open_registry
from ztserve.doors import DoorAddress, DoorRegistry
from ztserve.errors import ArtifactError, ConfigError, RegistryError, ZTServeError
from ztserve.identity import Quarantine, Source
from ztserve.serving.withdrawal import Held
from ztserve.types import ModelRef

T = TypeVar("T")
Pin = Callable[[str, str], str]
"""Given a part and the digest it resolved to, returns the one that the deploy uses."""

CheckModel = Callable[[str, ModelRef, str], None]
"""Given a part, what it asks for and the digest that this resolved to; raises."""

_LOG = logging.getLogger("ray.serve")  # what Serve shows of a replica
_RETRY_S = 0.5
_TELL_S = 5.0
"""How often the log says how far a long load is."""


def check_published(settings: Settings, refs: Iterable[ModelRef]) -> str:
    """Raise ArtifactError where a replica would find no such model, or no policy.

    Returns what could not be checked, for people to read: a registry door answers
    replicas, and their identities come with the cluster. Empty: all was.
    """
    config.load_trust(settings)
    if isinstance(settings.artifacts.registry, DoorAddress):
        return (
            f"not checked before Ray starts: whether {', '.join(map(str, refs))} can "
            f"be had from {settings.artifacts.registry}, which answers replicas"
        )
    registry = open_registry(settings)
    for ref in refs:
        registry.resolve(ref)
    return ""


class Weights:
    """Gets the models of one replica, and audits what came of it.

    Waits for a registry that is away, `wait_s` for all of them together; what does not
    verify is refused at once. `memory` is where the weights come to lie; None: in this
    process's own. With `lazy` they are read, into that, when they are asked for.
    """

    def __init__(  # noqa: PLR0913 - the last five have defaults
        self,
        settings: Settings,
        log: Log,
        pin: Pin,
        source: Source | None = None,
        quarantine: Quarantine | None = None,
        memory: Memory | None = None,
        *,
        lazy: bool = False,
        check: CheckModel = lambda _part, _ref, _digest: None,
    ) -> None:
        self._all = settings
        self._settings = settings.artifacts
        self._log = log
        self._pin = pin
        self._source = source
        self._quarantine = quarantine
        self._memory = None if lazy else memory
        self._lazy = lazy
        self._check = check
        self.followed: FollowedPolicy | None = None
        """The trust policy; None before there was a model to judge."""
        self.held: dict[str, Held] = {}
        """What there is to judge of the models again, by part."""
        self._until = time.monotonic() + self._settings.wait_s

    @contextmanager
    def verified(
        self, refs: Mapping[str, ModelRef]
    ) -> Iterator[Mapping[str, VerifiedModel]]:
        """Give the models by part; until the block ends, weights can be read lazily.

        Raises VerificationError or RegistryError; an ArtifactError that the block
        raises is audited, too: a shard of theirs that does not verify.
        """
        with ExitStack() as ending:
            with self._audited(ArtifactError, ConfigError):
                models = self._all_of(refs, ending) if refs else {}
            with self._audited(ArtifactError):
                try:
                    yield models
                finally:
                    for model in models.values():
                        model.close()

    def _all_of(
        self, refs: Mapping[str, ModelRef], ending: ExitStack
    ) -> dict[str, VerifiedModel]:
        self.followed = config.follow_trust(self._all)
        trust = self.followed.policy
        registry = ending.enter_context(self._opened())
        return {
            part: self._verify(registry, part, ref, trust) for part, ref in refs.items()
        }

    @contextmanager
    def _audited(self, *refusals: type[ZTServeError]) -> Iterator[None]:
        try:
            yield
        except refusals as error:
            self._log.event(
                "model-refused", status_code=type(error).__name__, reason=str(error)
            )
            raise

    @contextmanager
    def _opened(self) -> Iterator[Registry]:
        registry = self._patiently(
            lambda: open_registry(self._all, self._source, self._quarantine)
        )
        try:
            yield registry
        finally:
            if isinstance(registry, DoorRegistry):
                registry.close()

    def _verify(
        self, registry: Registry, part: str, ref: ModelRef, trust: TrustPolicy
    ) -> VerifiedModel:
        resolved = self._patiently(lambda: registry.resolve(ref))
        self._check(part, ref, resolved.digest)
        pinned = ref.pinned(self._pin(part, resolved.digest))
        reading = _Reading(pinned)

        def attempt() -> VerifiedModel:
            with reading:
                return verify_model(
                    registry,
                    pinned,
                    trust,
                    memory=self._memory,
                    lazy=self._lazy,
                    progress=reading,
                )

        model = self._patiently(attempt)
        # The version is the release's word, which is verified only now.
        self._check(part, ModelRef(f"{model.name}:{model.version}"), model.digest)
        self.held[part] = Held(pinned, model.evidence, model.names)
        self._log.event(
            "model-verified",
            model=model.name,
            version=model.version,
            digest=model.digest,
            signers=", ".join(map(str, model.signers)),
            trust_policy=f"version {trust.version}, {trust.digest}",
            bytes=model.size,
            unread_bytes=model.unread,
            seconds=round(reading.seconds, 3),
        )
        return model

    def _patiently(self, attempt: Callable[[], T]) -> T:
        told = ""
        while True:
            try:
                return attempt()
            except RegistryError as error:
                if time.monotonic() >= self._until:
                    raise
                if str(error) != told:
                    told = str(error)
                    self._log.event("registry-away", reason=told)
                time.sleep(_RETRY_S)


class _Reading:
    """Follows the verifying of one model; a long one has a line of the log at times.

    Of a lazy model it sees what is read at once, not the weights.
    """

    def __init__(self, ref: ModelRef) -> None:
        self._ref = ref
        self._next = _TELL_S
        self._began = 0.0
        self.seconds = 0.0
        """What the last attempt took."""

    def __enter__(self) -> None:
        self._began, self._next = time.monotonic(), _TELL_S

    def __exit__(self, *_: object) -> None:
        self.seconds = time.monotonic() - self._began

    def __call__(self, progress: Progress) -> None:
        if progress.seconds >= self._next:
            self._next = progress.seconds + _TELL_S
            _LOG.info("loading %s: %s", self._ref, progress)
