"""Personal data out of a text, at once or while it is still being written."""

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from ztserve.errors import ConfigError, Withheld
from ztserve.filtering.segments import is_clean, last_cut, last_word, may_cut, suspects

_PUBLIC = "the model's answer could not be checked for personal data"


class Span(NamedTuple):
    """One finding: where, of what kind, and how sure."""

    start: int
    end: int
    kind: str
    score: float


class Recognizer(NamedTuple):
    """What looks for one kind of personal data."""

    needs: re.Pattern[str]
    """Found in every text that holds a finding: `find` runs only where this matches."""
    find: Callable[[str], Sequence[Span]]
    """Raises TimeoutError where it may have missed something."""
    refuses: re.Pattern[str] | None = None
    """A text where this matches is withheld: `find` would take too long."""


@dataclass(frozen=True, slots=True)
class Filtered:
    """A text with each finding replaced by its kind, as ``<EMAIL_ADDRESS>``."""

    text: str
    findings: Mapping[str, int]
    """Kind to count; never the content."""


class TextFilter:
    """Replaces personal data in texts. Immutable, so that threads share it.

    Fails closed: where a text holds a run too long to be looked at, or looking takes
    too long, Withheld is raised.
    """

    def __init__(
        self,
        recognizers: Sequence[Recognizer],
        *,
        max_run_chars: int = 4096,
        max_scan_s: float = 2.0,
    ) -> None:
        """Build a filter of `recognizers`.

        `max_run_chars` bounds the stretch between two cuts (``segments.py``), which is
        the most that a stream holds back; `max_scan_s` the CPU time spent on one text.
        """
        if not recognizers:
            raise ConfigError("a text filter needs at least one recognizer")
        if max_run_chars < 1 or max_scan_s <= 0:
            raise ConfigError("max_run_chars and max_scan_s must be positive")
        self.recognizers = tuple(recognizers)
        self.max_run_chars = max_run_chars
        self.max_scan_s = max_scan_s

    @classmethod
    def default(
        cls, *, max_run_chars: int = 4096, max_scan_s: float = 2.0
    ) -> "TextFilter":
        """Return the filter of Presidio's model-free recognizers.

        EMAIL_ADDRESS, CREDIT_CARD, US_SSN, US_ITIN, IBAN_CODE, PHONE_NUMBER,
        IP_ADDRESS, MAC_ADDRESS and CRYPTO, at scores from 0.4: identifiers of a person
        or a person's device that a pattern or checksum can tell. Not URL, DATE_TIME and
        the like, which are mostly not personal, nor names, which need a model.

        Imports Presidio (seconds) and opens no connection, now or later. Raises
        ConfigError where it is not installed.
        """
        try:
            from ztserve.filtering.recognizers import recognizers
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"a text output is filtered by Presidio, and {error.name} is missing: "
                "pip install 'ztserve[text]'"
            ) from error
        return cls(recognizers(), max_run_chars=max_run_chars, max_scan_s=max_scan_s)

    def apply(self, text: str) -> Filtered:
        """Return `text` redacted: by definition what its stream gives, fed at once.

        Raises Withheld where it cannot be checked.
        """
        stream = self.stream()
        redacted = stream.feed(text) + stream.close()
        return Filtered(redacted, stream.findings)

    def stream(self) -> "TextStream":
        """Return a stream for one text that arrives in pieces."""
        return TextStream(self)


class TextStream:
    """One text on its way out, redacted; for one thread.

    What has been fed leaves up to the last cut (``segments.py``); the rest, most often
    the last word, is held back. Segments are those of the whole text and each is looked
    at on its own, so that the pieces do not matter to the result.
    """

    def __init__(self, rules: TextFilter) -> None:
        self._recognizers = rules.recognizers
        self._max_run_chars = rules.max_run_chars
        self._left_s = rules.max_scan_s
        self._held = ""
        self._word = 0  # where in it the last word begins
        self._over = ""
        self._counts: Counter[str] = Counter()

    @property
    def has_found(self) -> bool:
        """Whether anything has been replaced so far."""
        return bool(self._counts)

    @property
    def findings(self) -> Mapping[str, int]:
        """What has been replaced so far, kind to count."""
        return MappingProxyType(dict(self._counts))

    def feed(self, chunk: str) -> str:
        """Take the next piece; return what may leave by now, which may be nothing.

        Raises Withheld where the text cannot be checked; the stream is then dead.
        """
        if self._over:
            raise Withheld(_PUBLIC, self._over)
        text = self._held + chunk
        start, end, leaving = 0, 0, ""
        if may_cut(chunk):
            while end < len(text):
                end = start + self._max_run_chars
                cut = last_cut(text, start, end, self._word)
                if cut == start:
                    break
                leaving += self._clean(text[start:cut])
                start = self._word = cut
            self._word = last_word(text, self._word) - start
        self._held = text[start:]
        if len(self._held) > self._max_run_chars:
            raise self._refusal(
                f"more than {self._max_run_chars} characters without a place to cut; "
                "expected words or lines"
            )
        return leaving

    def close(self) -> str:
        """Return the rest of the text; nothing can be fed after it.

        Raises Withheld as `feed` does.
        """
        if self._over:
            raise Withheld(_PUBLIC, self._over)
        rest = self._clean(self._held)
        self._over = "text: it had been closed"
        return rest

    def _refusal(self, reason: str) -> Withheld:
        self._over = f"text: {reason}"
        return Withheld(_PUBLIC, self._over)

    def _clean(self, text: str) -> str:
        if is_clean(text):
            return text
        at = 0
        leaving: list[str] = []
        for start, end in suspects(text):
            leaving += (text[at:start], self._redact(text[start:end]))
            at = end
        leaving.append(text[at:])
        return "".join(leaving)

    def _redact(self, segment: str) -> str:
        at = 0
        leaving: list[str] = []
        for found in merged(self._scan(segment)):
            self._counts[found.kind] += 1
            leaving += (segment[at : found.start], f"<{found.kind}>")
            at = found.end
        leaving.append(segment[at:])
        return "".join(leaving)

    def _scan(self, segment: str) -> list[Span]:
        spans: list[Span] = []
        for recognizer in self._recognizers:
            if not recognizer.needs.search(segment):
                continue
            if recognizer.refuses and recognizer.refuses.search(segment):
                raise self._refusal("a word no recognizer could get through in time")
            started = time.thread_time()
            try:
                spans += recognizer.find(segment)
            except Exception as error:
                # Of its message only our own is known to hold no content.
                why = str(error) if type(error) is TimeoutError else "a search failed"
                raise self._refusal(why) from error
            self._left_s -= time.thread_time() - started
            if self._left_s <= 0:
                raise self._refusal("looking through it took too long")
        return spans


def merged(spans: Sequence[Span]) -> list[Span]:
    """Return `spans` in order, those that overlap made one: of the surest kind."""
    result: list[Span] = []
    for span in sorted(spans):
        if not result or span.start >= result[-1].end:
            result.append(span)
            continue
        last = result[-1]
        kind = max(last, span, key=lambda one: (one.score, one.end - one.start))
        result[-1] = kind._replace(start=last.start, end=max(last.end, span.end))
    return result
