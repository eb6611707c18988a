"""Where can a text be cut so that nothing personal is cut in two?

A cut is a place that no match of the recognizers in ``recognizers.py`` can span and
behind which none looks, so that what is found in the pieces is what is found in the
whole. Whether a place is a cut depends only on the text before it, back to the cut
before, so that it is the same however the text arrives. Two kinds of place are cuts:

- after a character that no recognizer can match and that is as good as an end of text
  to those that look around: line ends, quotes, angle brackets, CJK punctuation;
- after white space behind a word that ends all that may hold spaces. Those are numbers
  (cards, SSN, ITIN, phones) and IBANs. Any letter ends a number but the x of a carrier
  code and the words before a telephone extension; a word with an opening bracket or a
  plus may begin one. An IBAN may go on for 43 characters.
"""

import re
from collections.abc import Iterator

_BREAK = (  # line ends, "<>\ and the quotes and punctuation of Europe and CJK
    r'\n\r"<>\\\u00ab\u00bb\u201c-\u201e\u3001\u3002\u300c-\u300f'
    r"\uff01\uff0c\uff1a\uff1b\uff1f"
)
_OPENING = r"(\[+\uff08\uff0b\uff3b"
_LETTER = r"a-wyz\u00c0-\u02af\u0370-\u1fff\u3041-\u30fb\u3400-\u9fff\uac00-\ud7a3"
_EXTENSION = (  # phonenumbers' explicit and ambiguous labels, in ASCII and full width
    r"(?i:e?xt(?:ensi(?:o\u0301?|\u00f3))?n?|\uff45?\uff58\uff54\uff4e?"
    r"|\u0434\u043e\u0431|anexo|x|\uff58|int|\uff49\uff4e\uff54)"
)
_WORD = (
    rf"(?:[^\s\d{_BREAK}{_OPENING}{_LETTER}]*+"  # up to the first telling letter,
    rf"(?![\s\d])[{_LETTER}]"  # which is this,
    rf"[^\s\d{_BREAK}{_OPENING}]*+"  # and whatever else is in the word;
    r"|[A-Z]++(?<!X)[.,;:!?]++)"  # or capitals at the end of a clause
)
_CUT = (
    rf"(?:[{_BREAK}]"
    rf"|(?<![^\s{_BREAK}])(?!,*{_EXTENSION}[:.\uff0e]?[,-]*\s){_WORD}\s)"
)
_NEXT = re.compile(_CUT)
_LAST = re.compile(rf".*{_CUT}", re.DOTALL)
_END = re.compile(rf"[\s{_BREAK}]")
_WORDS = re.compile(rf".*[\s{_BREAK}]", re.DOTALL)
_OPEN_IBAN = re.compile(
    r"(?<![a-z0-9])[a-z]{2}[0-9]{2}[a-z0-9 -]{0,44}\Z", re.IGNORECASE
)
_IBAN_CHARS = 48

_TRIGGER = re.compile(r"[\d@]|::|[:.-][A-Fa-f]{1,4}[:.-]")
"""A necessary part of all that the recognizers can find; never spans a cut."""


def may_cut(chunk: str) -> bool:
    """Say whether a cut may end in `chunk`, whatever comes before it."""
    return _END.search(chunk) is not None


def last_word(text: str, start: int) -> int:
    """Return where the last word begins, at or after `start`: cuts end at words."""
    match = _WORDS.match(text, start)
    return match.end() if match else start


def last_cut(text: str, start: int, end: int, word: int) -> int:
    """Return the last cut after `start` and not after `end`; `start` if none is.

    `start` is a cut or the beginning; up to `word`, where a word begins, is none.
    """
    while match := _LAST.match(text, word, end):
        if not _in_iban(text, start, match.end()):
            return match.end()
        end = match.end() - 1
    return start


def is_clean(text: str) -> bool:
    """Say whether nothing in `text` could be part of a finding."""
    return _TRIGGER.search(text) is None


def suspects(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each stretch between two cuts that may hold a finding.

    `text` begins at a cut or at the beginning.
    """
    at = 0
    while trigger := _TRIGGER.search(text, at):
        start = last_cut(text, at, trigger.start(), at)
        at = _next_cut(text, start)
        yield start, at


def _next_cut(text: str, start: int) -> int:
    at = start
    while match := _NEXT.search(text, at):
        at = match.end()
        if not _in_iban(text, start, at):
            return at
    return len(text)


def _in_iban(text: str, start: int, cut: int) -> bool:
    return bool(_OPEN_IBAN.search(text, max(start, cut - _IBAN_CHARS), cut))
