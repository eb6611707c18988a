"""Which model is meant."""

import re
from dataclasses import dataclass

from ztserve.errors import ConfigError, VerificationError

_REF = re.compile(
    r"(?P<name>[a-z0-9](?:[a-z0-9._-]{0,127}))"
    r"(?::(?P<version>[A-Za-z0-9][A-Za-z0-9._-]{0,127}))?"
    r"(?:@(?:(?P<digest>sha256:[0-9a-f]{64})|(?P<alias>[a-z][a-z0-9._-]{0,63})))?\Z"
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model: ``name[:version][@alias | @sha256:<64 hex>]``.

    A bare name means its newest version. Raises ConfigError on anything else.
    """

    text: str

    def __post_init__(self) -> None:
        match = _REF.match(self.text)
        if not (match and not (match["alias"] and match["version"])):
            raise ConfigError(
                f"model reference {self.text!r}: expected name[:version], name@alias "
                "or name[:version]@sha256:<64 hex digits>, all in lower case"
            )

    def _part(self, group: str) -> str | None:
        match = _REF.match(self.text)
        return match[group] if match else None

    @property
    def name(self) -> str:
        """The model's name."""
        return self._part("name") or ""

    @property
    def version(self) -> str | None:
        """The version asked for, if one is."""
        return self._part("version")

    @property
    def alias(self) -> str | None:
        """The alias asked for, if one is."""
        return self._part("alias")

    @property
    def digest(self) -> str | None:
        """The pinned digest (``sha256:...``), if one is."""
        return self._part("digest")

    def pinned(self, digest: str) -> "ModelRef":
        """Return this reference fixed to `digest`.

        Raises VerificationError where it is already fixed to another.
        """
        if self.digest is not None and self.digest != digest:
            raise VerificationError(
                f"model {self.text} resolved to {digest}, not to its pinned digest"
            )
        version = f":{self.version}" if self.version else ""
        return ModelRef(f"{self.name}{version}@{digest}")

    def __str__(self) -> str:
        return self.text
