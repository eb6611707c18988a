"""The differences from h2 that are known, each with the section by which ours is right.

A class is a predicate over one step: what arrived, what had been seen before, and what
each end made of it. None of them says merely that the ends differ. They are in
`http2_framing`, `http2_streams` and `http2_messages`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from tests.fuzz.http2_case import Case

    Predicate = Callable[[Case], bool]


@dataclass(frozen=True)
class Class:
    """A kind of difference."""

    ours: str
    theirs: str
    section: str
    why: str
    goes_on: bool = False
    """Whether both ends know the same afterwards."""


CLASSES: dict[str, Class] = {}
_PREDICATES: dict[str, Predicate] = {}


def is_(
    name: str, ours: str, theirs: str, section: str, why: str, *, on: bool = False
) -> Callable[[Predicate], Predicate]:
    """Add a class whose predicate is the function below."""

    def noted(predicate: Predicate) -> Predicate:
        CLASSES[name] = Class(ours, theirs, section, why, on)
        _PREDICATES[name] = predicate
        return predicate

    return noted


def name_of(case: Case) -> str:
    """Return the class of a difference, "" where it has none."""
    for name, predicate in _PREDICATES.items():
        if predicate(case):
            return name
    return ""


def table(counts: Counter[str], total: int) -> str:
    """Return the classes as a table in Markdown, with how often each was seen."""
    rows = [
        f"| {name} | {made.ours} | {made.theirs} | {made.section} | {made.why} "
        f"| {counts[name]:,} |"
        for name, made in CLASSES.items()
    ]
    return "\n".join(
        (
            "# Where our HTTP/2 differs from the `h2` library",
            "",
            f"Made by `python -m tests.fuzz.http2 --table FILE` from {total:,} inputs. "
            "Sections are those of RFC 9113 unless another is named.",
            "",
            "| What | Ours | h2 | Section | Why ours is right | Seen |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        )
    )
