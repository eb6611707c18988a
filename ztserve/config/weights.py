"""Weights that the replicas of a node share: its broker, and those who borrow."""

from collections.abc import Callable
from pathlib import Path

from ztserve import artifacts, identity
from ztserve.audit import Log
from ztserve.config.registry import open_registry
from ztserve.config.rooms import agent_directory
from ztserve.config.settings import Settings
from ztserve.config.trust import load_trust
from ztserve.doors import DoorRegistry
from ztserve.types import ModelRef


def weights_broker(
    settings: Settings,
    source: identity.Source,
    log: Log,
    quarantine: identity.Quarantine,
) -> artifacts.Broker:
    """Return this node's weights broker, not yet started.

    It reads the registry as itself: a registry door has to let it.
    """

    def load(ref: ModelRef, memory: artifacts.Memory) -> None:
        registry = open_registry(settings, source, quarantine)
        try:
            trust = load_trust(settings)
            artifacts.verify_model(registry, ref, trust, memory=memory)
        finally:
            if isinstance(registry, DoorRegistry):
                registry.close()

    return artifacts.Broker(
        _socket(settings),
        source,
        load,
        max_bytes=settings.artifacts.max_shared_bytes,
        on_event=lambda kind, fields: log.event(kind, **fields),
    )


def shared_memory(
    settings: Settings,
    source: identity.Source,
    log: Log,
    quarantine: identity.Quarantine,
    summon: Callable[[], None],
) -> artifacts.SharedMemory:
    """Return what borrows weights from the node's broker, which `summon` starts."""
    return artifacts.SharedMemory(
        _socket(settings),
        settings.broker_id,
        source,
        summon=summon,
        check_peer=quarantine.check,
        on_event=lambda kind, fields: log.event(kind, **fields),
    )


def _socket(settings: Settings) -> Path:
    return agent_directory(settings) / "weights.sock"
