"""With whom we federate: the parameters of one relationship (SPIFFE Federation, 5.1).

All of it is configured, nothing is learnt from the other side: a bundle does not say
whose it is, and whoever may change these parameters may be whom he likes in the foreign
trust domain (section 7.1).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, TypeAlias, get_args
from urllib.parse import SplitResult, urlsplit

from ztserve.errors import ConfigError, IdentityError
from ztserve.identity.bundle import MAX_JWKS_BYTES, MAX_TRUST_DOMAINS, TrustBundle
from ztserve.identity.guarded_files import read_guarded
from ztserve.identity.spiffe_id import SpiffeId, trust_domain_name, workload_id

Profile: TypeAlias = Literal["https_web", "https_spiffe", "file"]
PROFILES: tuple[str, ...] = get_args(Profile)
MAX_URL_CHARACTERS = 2048

_NEEDED: Mapping[str, set[str]] = {
    "https_web": {"url"},
    "https_spiffe": {"url", "spiffe_id"},
    "file": {"file"},
}
"""Per profile: what must be given beside trust domain and profile; nothing else may."""


@dataclass(frozen=True, slots=True)
class Relationship:
    """Where the bundle of one foreign trust domain comes from, and who vouches for it.

    Raises ConfigError for what its profile does not need, lacks or cannot use.
    """

    trust_domain: str
    """Its name, which the bundle itself does not hold."""
    profile: Profile
    url: str = ""
    """Of the bundle endpoint: https, without user."""
    spiffe_id: str = ""
    """https_spiffe: whom the endpoint must prove to be."""
    bootstrap: Path | None = None
    """https_spiffe: the bundle (a JWK Set) to verify the endpoint by at first. Needed
    where the endpoint is of `trust_domain` itself; elsewhere it is another
    relationship's bundle that counts."""
    file: Path | None = None
    """file: the bundle itself, followed as it changes."""

    def __post_init__(self) -> None:
        where = f"federation with {self.trust_domain!r:.80}"
        try:
            trust_domain_name(self.trust_domain)
            if self.spiffe_id:
                workload_id(self.spiffe_id)
        except IdentityError as error:
            raise ConfigError(f"{where}: {error}") from error
        if self.profile not in PROFILES:
            raise ConfigError(
                f"{where}: profile {self.profile!r:.80}, expected one of "
                + ", ".join(PROFILES)
            )
        self._check_given(where)
        if self.url:
            checked_url(self.url, where)

    @property
    def endpoint_domain(self) -> str:
        """The trust domain by whose bundle the endpoint is verified; "" for the Web."""
        return SpiffeId.parse(self.spiffe_id).trust_domain if self.spiffe_id else ""

    def _check_given(self, where: str) -> None:
        needed = set(_NEEDED[self.profile])
        if needed >= {"spiffe_id"} and self.endpoint_domain == self.trust_domain:
            needed.add("bootstrap")  # the endpoint is self-serving (5.2.2.2)
        names = ("url", "spiffe_id", "bootstrap", "file")
        given = {name for name in names if getattr(self, name)}
        for name in sorted(given - needed):
            raise ConfigError(f"{where}: {name} has no meaning here ({self.profile})")
        for name in sorted(needed - given):
            raise ConfigError(f"{where}: profile {self.profile} needs {name}")


def read_relationships(tables: object, directory: Path) -> tuple[Relationship, ...]:
    """Return what ``[[federation]]`` says, parsed TOML; paths are under `directory`.

    Raises ConfigError for an unknown key, a value that is no text, a trust domain given
    twice, and as `Relationship` does.
    """
    if not isinstance(tables, list):
        raise ConfigError("federation: expected tables, [[federation]]")
    return checked_relationships(
        _relationship(table, f"federation[{at}]", directory)
        for at, table in enumerate(tables)
    )


def checked_relationships(given: Iterable[Relationship]) -> tuple[Relationship, ...]:
    """Return them, if there is one a trust domain, 63 at most. Raises ConfigError."""
    relationships = tuple(given)
    if len(relationships) >= MAX_TRUST_DOMAINS:
        raise ConfigError(
            f"federation with {len(relationships)} trust domains, "
            f"at most {MAX_TRUST_DOMAINS - 1}"
        )
    known = [one.trust_domain for one in relationships]
    for one in relationships:
        where = f"federation with {one.trust_domain!r}"
        if known.count(one.trust_domain) > 1:
            raise ConfigError(f"{where}: given twice; which of the two should count?")
        if one.endpoint_domain and one.endpoint_domain not in known:
            raise ConfigError(
                f"{where}: {one.spiffe_id} is of a trust domain that we do not "
                "federate with; add a relationship with it"
            )
    return relationships


def _relationship(table: object, where: str, directory: Path) -> Relationship:
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where}: expected a table")
    known = {one.name for one in fields(Relationship)}
    values: dict[str, object] = {}
    for name, value in table.items():
        if name not in known:
            raise ConfigError(
                f"{where}: {name!r:.80} is not a known key; expected one of "
                + ", ".join(sorted(known))
            )
        if type(value) is not str or not value:
            raise ConfigError(f"{where} {name}: expected a string, got {value!r:.80}")
        values[name] = directory / value if name in ("bootstrap", "file") else value
    for name in ("trust_domain", "profile"):
        if name not in values:
            raise ConfigError(f"{where}: {name} is missing")
    return Relationship(**values)  # type: ignore[arg-type]


def checked_url(url: str, where: str) -> SplitResult:
    """Return the parts of a bundle endpoint's URL (5.2.1.1, 5.2.2.1).

    Its scheme is https, it has a host and no user, and is plain ASCII without spaces.
    Raises ConfigError that begins with `where`.
    """
    shown = f"{where}: url {url!r:.120}"
    if len(url) > MAX_URL_CHARACTERS or not all("!" <= mark <= "~" for mark in url):
        raise ConfigError(f"{shown}: expected at most 2048 printable ASCII characters")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{shown}: {error}") from error
    if parts.scheme != "https":
        raise ConfigError(f"{shown}: the scheme must be https")
    if "@" in parts.netloc:
        raise ConfigError(f"{shown}: user information is not allowed")
    if not parts.hostname or port == 0:
        raise ConfigError(f"{shown}: expected https://host[:port]/path")
    return parts


def read_bundle_file(path: Path, trust_domain: str) -> TrustBundle:
    """Return the bundle of `trust_domain` in the file `path`, at most 256 KiB.

    Raises IdentityError, also for a file that others than root and we can change;
    MissingFileError where there is none.
    """
    raw = read_guarded(path, MAX_JWKS_BYTES, secret=False)
    return TrustBundle.parse(raw, trust_domain)
