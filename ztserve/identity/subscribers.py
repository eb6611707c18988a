"""Who wants to be told of a change."""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import TypeAlias

_LOG = logging.getLogger(__name__)

OnEvent: TypeAlias = Callable[[str, Mapping[str, object]], object]
"""Is told the name of an event and its facts; raising says that it was not taken."""


class Subscribers:
    """Callbacks that are called, one after the other, after each change. Thread-safe.

    They run on the thread that makes the change and should return at once.
    """

    def __init__(self) -> None:
        self._callbacks: dict[object, Callable[[], None]] = {}
        self._lock = threading.Lock()

    def subscribe(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have `callback` called after each change; return how to end that."""
        key = object()
        with self._lock:
            self._callbacks[key] = callback

        def unsubscribe() -> None:
            with self._lock:
                self._callbacks.pop(key, None)

        return unsubscribe

    def notify(self) -> None:
        """Call them all."""
        with self._lock:
            callbacks = list(self._callbacks.values())
        for callback in callbacks:
            try:
                callback()
            except Exception:  # noqa: BLE001
                # One listener's fault must not keep the others from being told.
                _LOG.exception("a listener to a change of identity failed")


def tell(on_event: OnEvent, name: str, facts: Mapping[str, object]) -> None:
    """Tell of an event; a listener's fault ends nothing and is logged."""
    try:
        on_event(name, facts)
    except Exception:  # noqa: BLE001
        _LOG.exception("the event %s could not be told", name)
