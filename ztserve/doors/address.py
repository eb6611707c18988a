"""Where a registry door is: ``ztserve://host:port``, as ztserve.toml names it."""

from dataclasses import dataclass
from typing import Self

from ztserve.errors import ConfigError, InvalidInput
from ztserve.transport.directory import checked_address

SCHEME = "ztserve://"


@dataclass(frozen=True, slots=True)
class DoorAddress:
    """The address of a door; who answers there must prove its SPIFFE ID."""

    target: str
    """``host:port``"""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse ``ztserve://host:port``; raises ConfigError."""
        rest = text.removeprefix(SCHEME)
        try:
            if rest == text:
                raise InvalidInput(f"does not begin with {SCHEME}")
            return cls(checked_address(rest))
        except InvalidInput as error:
            raise ConfigError(
                f"registry door {text!r:.300}: {error}; expected {SCHEME}HOST:PORT"
            ) from None

    @property
    def host_port(self) -> tuple[str, int]:
        """Host (of an IPv6 address without brackets) and port."""
        host, _, port = self.target.rpartition(":")
        return host.strip("[]"), int(port)

    def __str__(self) -> str:
        return SCHEME + self.target
