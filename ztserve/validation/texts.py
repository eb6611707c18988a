"""One text off the wire, checked against its spec."""

import re

from ztserve.errors import InvalidInput
from ztserve.types import Tensor, TextSpec

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_UTF8_BYTES = 4
"""Most bytes of one character (RFC 3629)."""


class TextCheck:
    """The checks of one declared text."""

    def __init__(self, spec: TextSpec) -> None:
        self.name = spec.name
        self._max_chars = spec.max_chars

    def read(self, tensor: Tensor) -> str:
        """Return the text of `tensor`: ``BYTES`` of shape [1] or [1, 1].

        Strict UTF-8, which holds no lone surrogate; no control character but tab, line
        feed and carriage return. Raises InvalidInput, saying what was expected.
        """
        if tensor.datatype != "BYTES" or tensor.shape not in ((1,), (1, 1)):
            raise self._refusal("expected one text (BYTES of shape [1])")
        if not isinstance(tensor.data, tuple) or len(tensor.data) != 1:
            raise self._refusal("expected exactly one string of bytes")
        raw = tensor.data[0]
        if len(raw) > self._max_chars * _UTF8_BYTES:
            raise self._refusal(f"expected at most {self._max_chars} characters")
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            at = f"byte {error.start} is not UTF-8"
            raise self._refusal(f"{at}; expected UTF-8 text") from None
        if len(text) > self._max_chars:
            expected = f"expected at most {self._max_chars} characters"
            raise self._refusal(f"{expected}, got {len(text)}")
        if found := _CONTROL.search(text):
            at = f"character {found.start()} is a control character"
            raise self._refusal(f"{at}; expected text")
        return text

    def _refusal(self, what: str) -> InvalidInput:
        return InvalidInput(f"input {self.name!r}: {what}")
