"""Has glibc keep the memory that bodies need, for the next ones."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
_KEPT_BYTES = 16 << 20
"""Of each arena; there are up to eight for each core, and a thread has one of its own.
Some bodies of 1 MiB fit, as often as they are copied."""
_MAPPED_BYTES = 32 << 20
"""The most that mallopt(3) takes; larger blocks go back to the kernel when freed."""


def keep_freed_memory() -> None:
    """Give freed memory back to the kernel only from 16 MiB on (mallopt(3)).

    By default glibc returns it at once, and each call with a large body takes it anew,
    page by page: of a call with 1 MiB each way, that is a third of the CPU time. A C
    library without mallopt is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _MAPPED_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
