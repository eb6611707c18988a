import threading
import time
from collections.abc import Callable

import pytest

from ztserve.types import Call, operations


def make_call(
    seconds: float = 10.0, cancelled: Callable[[], bool] = lambda: False, call_id="c"
) -> Call:
    return Call(
        id=call_id,
        peer=None,  # type: ignore[arg-type]
        caller=None,
        operation=operations("m")["ModelInfer"],
        deadline=time.monotonic() + seconds,
        cancelled=cancelled,
    )


@pytest.fixture(name="a_call")
def a_call_maker():
    return make_call


def run_in_threads(*works: Callable[[], object]) -> list:
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
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.fixture(name="in_threads")
def in_threads_runner():
    return run_in_threads


def wait_until(fact: Callable[[], object], seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture(name="eventually")
def eventually_waiter():
    return wait_until
