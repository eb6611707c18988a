"""Presidio's recognizers, without a model, a download or a time-out that fails open.

The only module that imports Presidio (itself imported on first use). The recognizers
are its own; what differs from its `AnalyzerEngine`: no spaCy pipeline, the e-mail
recognizer has a suffix list that never asks the network, and each runs only where a
necessary part of what it finds is present. Findings are equal: a test compares them.

No model means no names of persons or places. Nor is a score raised by words nearby,
so that weak patterns (nine digits in a row as an SSN) don't count.
"""

import logging
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import tldextract
from phonenumbers import PhoneMetadata
from presidio_analyzer import EntityRecognizer, Pattern
from presidio_analyzer.pattern_recognizer import REGEX_TIMEOUT_SECONDS
from presidio_analyzer.predefined_recognizers import (
    CreditCardRecognizer,
    CryptoRecognizer,
    EmailRecognizer,
    IbanRecognizer,
    IpRecognizer,
    MacAddressRecognizer,
    PhoneRecognizer,
    UsItinRecognizer,
    UsSsnRecognizer,
)

from ztserve.filtering.text import Recognizer, Span

THRESHOLD = 0.4
"""Least score of a finding: a checksum that holds or a pattern of some strength."""

_PUNCTUATION = r"[^\d\n,;:@\"']{0,4}"  # at least what phonenumbers takes between digits

_LOCAL = r"[!#$%&'*+\-/=?^_`{|}~.\w]"
_ENDLESS_LOCAL_PART = rf"(?<!{_LOCAL}){_LOCAL}{{321,}}+@"
"""More than a whole address may have (RFC 3696, errata 1690, with room to spare).

Presidio's pattern takes the cube of its length: seconds for two thousand characters.
"""


class _OfflineEmailRecognizer(EmailRecognizer):
    """Presidio's own would fetch the public suffix list at the first address."""

    def __init__(self) -> None:
        super().__init__()
        self._suffixes = tldextract.TLDExtract(suffix_list_urls=(), cache_dir=None)

    def validate_result(self, pattern_text: str) -> bool:
        return self._suffixes(pattern_text).fqdn != ""


def recognizers() -> tuple[Recognizer, ...]:
    """Return the recognizers of the default filter, loaded and warm."""
    # It logs what it cannot parse, and that may be personal.
    logging.getLogger("presidio-analyzer").setLevel(logging.CRITICAL)
    # Otherwise read from disk region by region, while calls wait.
    PhoneMetadata.load_all()
    found = (
        _where("@", _OfflineEmailRecognizer(), refuses=_ENDLESS_LOCAL_PART),
        _where(r"(?:\d[- ]?){12}\d", CreditCardRecognizer()),
        _where(
            r"\d{3}[- .]\d{2}[- .]\d{4}",
            UsSsnRecognizer(_strong(UsSsnRecognizer.PATTERNS)),
        ),
        _where(
            r"\d{3}[- ]\d{2}[- ]\d{4}",
            UsItinRecognizer(_strong(UsItinRecognizer.PATTERNS)),
        ),
        _where(
            r"(?i)[A-Z]{2}[0-9]{2}[ -]?[A-Z0-9]{4}",
            # The flags that AnalyzerEngine gives it; its own would miss small letters.
            IbanRecognizer(regex_flags=re.DOTALL | re.MULTILINE | re.IGNORECASE),
        ),
        _where(
            r"\d\.\d{1,3}\.\d|:[0-9A-Fa-f]{0,4}:",
            IpRecognizer(_strong(IpRecognizer.PATTERNS)),
        ),
        _where(r"(?i)(?:bc1|[13])[a-z0-9]{25}", CryptoRecognizer()),
        _where(
            r"(?i)[0-9a-f]{2}[:-][0-9a-f]{2}[:-]|\.[0-9a-f]{4}\.",
            MacAddressRecognizer(),
        ),
        *_phones(),
    )
    for recognizer in found:
        recognizer.find("a@b.org 1.2.3.4 DE89 3704 0044 0532 0130 00")
    return found


def _where(
    needs: str, recognizer: EntityRecognizer, refuses: str | None = None
) -> Recognizer:
    kinds = recognizer.supported_entities
    no_artifacts: Any = None  # what a model would have made of the text

    def find(text: str) -> list[Span]:
        started = time.process_time()  # the clock of a pattern's time-out
        spans = [
            Span(found.start, found.end, found.entity_type, found.score)
            for found in recognizer.analyze(text, kinds, no_artifacts)
            if found.score >= THRESHOLD
        ]
        if time.process_time() - started >= REGEX_TIMEOUT_SECONDS:
            # Presidio logs a time-out and goes on as if it had found nothing.
            raise TimeoutError(f"the search for {kinds} may have skipped a pattern")
        return spans

    return Recognizer(re.compile(needs), find, re.compile(refuses) if refuses else None)


def _strong(patterns: Iterable[Pattern]) -> list[Pattern]:
    return [pattern for pattern in patterns if pattern.score >= THRESHOLD]


def _phones() -> Iterator[Recognizer]:
    """One recognizer a region, so that each runs only where it can find something.

    No number of these regions has fewer than seven digits, but for Germany's four; nor
    has a foreign one behind an international prefix. A plus makes the region no matter.
    """
    for region in PhoneRecognizer.DEFAULT_SUPPORTED_REGIONS:
        least = 4 if region == "DE" else 7
        yield _where(
            rf"(?:\d{_PUNCTUATION}){{{least - 1}}}\d",
            PhoneRecognizer(supported_regions=(region,)),
        )
