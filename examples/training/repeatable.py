"""Training that comes out the same each time, on one core, and disturbs nobody."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Train with random numbers from `seed`, on one thread.

    These models are too small to gain from more, and sums that are split between
    threads come out a little different for each number of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
