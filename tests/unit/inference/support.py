"""What the tests of inference share: calls, threads, patience."""

import threading
import time
from collections.abc import Callable

from ztserve.types import Call, operations


def a_call(seconds: float = 10.0, cancelled: Callable[[], bool] = bool) -> Call:
    """Return a call with `seconds` left."""
    return Call(
        id="c",
        peer=None,  # type: ignore[arg-type]
        caller=None,
        operation=operations("m")["ModelInfer"],
        deadline=time.monotonic() + seconds,
        cancelled=cancelled,
    )


def in_threads(*works: Callable[[], object]) -> list:
    """Run all at once; return what each returned or raised."""
    results: list = [None] * len(works)

    def one(i: int) -> None:
        try:
            results[i] = works[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def eventually(fact: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until `fact` holds."""
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until
        time.sleep(0.002)
