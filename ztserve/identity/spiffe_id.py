"""A SPIFFE ID that cannot be anything else."""

import re
from typing import Self

from ztserve.errors import IdentityError

SCHEME = "spiffe://"
MAX_BYTES = 2048
MAX_TRUST_DOMAIN_BYTES = 255

# `fullmatch` throughout: with `match` and `$` a trailing newline would pass.
_CANONICAL = re.compile(
    r"spiffe://[a-z0-9._-]{1,255}(?:/(?!\.\.?(?:/|\Z))[a-zA-Z0-9._-]+)*"
)
_TRUST_DOMAIN = re.compile(r"[a-z0-9._-]+")
_SEGMENT = re.compile(r"[a-zA-Z0-9._-]+")


class SpiffeId(str):
    """The name of a workload, or of a trust domain where it has no path.

    Strict (SPIFFE-ID standard, sections 2.1-2.3): lower-case trust domain of at most
    255 bytes without user, port or percent-encoding; path of non-empty segments that
    are neither ``.`` nor ``..``; no query, fragment or trailing slash; at most 2048
    bytes. Two IDs are the same iff they are equal, so nothing is normalised: what is
    not written canonically raises IdentityError.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        """Check `text`; IdentityError says what is wrong with it."""
        _check(text)
        return super().__new__(cls, text)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return `text` as a SPIFFE ID; IdentityError says what is wrong with it."""
        return cls(text)

    @property
    def trust_domain(self) -> str:
        """The trust domain's name, e.g. ``dev.ztserve.internal``."""
        return self[len(SCHEME) :].partition("/")[0]

    @property
    def path(self) -> str:
        """The path with its leading slash; empty for a trust domain's own ID."""
        _, slash, rest = self[len(SCHEME) :].partition("/")
        return slash + rest

    def __repr__(self) -> str:
        return f"SpiffeId({str.__repr__(self)})"


def workload_id(text: str) -> SpiffeId:
    """Return `text` as the ID of a workload: one with a path. Raises IdentityError."""
    spiffe_id = SpiffeId.parse(text)
    if not spiffe_id.path:
        raise _wrong(text, "names a trust domain; a workload's ID needs a path")
    return spiffe_id


def trust_domain_name(text: str) -> str:
    """Return `text` as a trust domain's bare name, without scheme. IdentityError."""
    spiffe_id = SpiffeId.parse(f"{SCHEME}{text}")
    if spiffe_id.path:
        raise _wrong(text, "expected the bare name of a trust domain")
    return spiffe_id.trust_domain


def _wrong(text: object, why: str) -> IdentityError:
    shown = repr(text)
    return IdentityError(
        f"SPIFFE ID {shown if len(shown) <= 120 else shown[:117] + '...'}: {why}"
    )


def _check(text: object) -> None:
    """Raise IdentityError with the first rule that `text` breaks."""
    if not isinstance(text, str):
        raise _wrong(text, "must be text")
    if len(text) <= MAX_BYTES and _CANONICAL.fullmatch(text):
        return  # the rules in one look: what follows says which one is broken
    if len(text) > MAX_BYTES:
        raise _wrong(text, f"longer than {MAX_BYTES} bytes")
    if not text.startswith(SCHEME):
        raise _wrong(text, f"must begin with {SCHEME} in lower case")
    name, slash, path = text[len(SCHEME) :].partition("/")
    _check_trust_domain(text, name)
    if slash:
        _check_path(text, path)


def _check_trust_domain(text: str, name: str) -> None:
    if not name:
        raise _wrong(text, "the trust domain is missing")
    if len(name) > MAX_TRUST_DOMAIN_BYTES:
        raise _wrong(text, f"trust domain longer than {MAX_TRUST_DOMAIN_BYTES} bytes")
    if not _TRUST_DOMAIN.fullmatch(name):
        raise _wrong(
            text,
            "a trust domain has only lower-case letters, digits, '.', '-' and '_' "
            "(no user, port, percent-encoding, query or fragment)",
        )


def _check_path(text: str, path: str) -> None:
    for segment in path.split("/"):
        if not segment:
            raise _wrong(text, "empty path segment or trailing slash")
        if segment in (".", ".."):
            raise _wrong(text, "'.' and '..' are not allowed as path segments")
        if not _SEGMENT.fullmatch(segment):
            raise _wrong(
                text,
                "a path has only letters, digits, '.', '-' and '_' between slashes "
                "(no percent-encoding, query, fragment or control character)",
            )
