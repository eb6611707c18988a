"""What a trust policy demands beyond signature and release.

``[[require]]``: attestations, by whom, how many, how good; ``[min_versions]``: no
version below; ``formats``: no other kind of file. The reading, and the judging::

    formats = ["safetensors", "json"]           # optional: suffixes of files

    [min_versions]
    digits = "3"

    [[require]]
    predicate = "https://in-toto.io/attestation/test-result/v0.1"
    roles = ["evaluator"]                       # each of them, by different signers
    signers = 1                                 # at least so many different ones
    models = ["digits"]                         # optional; default: every model
    minimum = { accuracy = 0.9 }                # test results only; inclusive
    maximum = { toxicity = 0.01 }
"""

import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import PurePosixPath

from ztserve.artifacts.statements.attestation import (
    TEST_RESULT,
    Attestation,
    Metric,
    within,
)
from ztserve.artifacts.trust.signers import ROLES, Role, SignedBy, only, roles_of, take
from ztserve.errors import ConfigError, VerificationError
from ztserve.types import ModelRef

MAX_REQUIREMENTS = 32
MAX_REASONS = 8
"""Why attestations do not count: so many are told."""
_VERSION = re.compile(r"\d{1,18}(\.\d{1,18}){0,7}\Z")
_FORMAT = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}\Z")


@dataclass(frozen=True, slots=True)
class Requirement:
    """One ``[[require]]``: such attestations must be there."""

    number: int
    """Its place among the ``[[require]]`` tables, from 1: names it in messages."""
    predicate: str
    roles: tuple[Role, ...]
    """Each must be filled, by a signer of its own."""
    signers: int = 1
    """Different signers needed in all; at least one a role."""
    models: frozenset[str] = frozenset()
    """Names of the models that it is for; empty: all."""
    minimum: tuple[tuple[str, float], ...] = ()
    maximum: tuple[tuple[str, float], ...] = ()

    def __str__(self) -> str:
        return f"[[require]] number {self.number}"

    @property
    def rule(self) -> str:
        """What it demands, in words."""
        bounds = [f"{name} >= {bound:g}" for name, bound in self.minimum]
        bounds += [f"{name} <= {bound:g}" for name, bound in self.maximum]
        return ", ".join(
            [f"{self}: {self.signers} as {' and '.join(self.roles)}", *bounds]
        )

    def concerns(self, model: str) -> bool:
        """Tell whether it is for the model of this name."""
        return not self.models or model in self.models

    def check_result(self, attestation: Attestation, what: str) -> None:
        """Raise VerificationError unless result and metrics are good enough."""
        if attestation.result not in {"", "PASSED"}:
            raise VerificationError(
                f"{what}: its result is {attestation.result}, not PASSED"
            )
        for name, bound in self.minimum:
            metric = _metric(attestation, name, what)
            if not within(metric.value, bound, None):
                raise VerificationError(
                    f"{what}: {name} is {metric.value:g}, below the minimum {bound:g}"
                )
        for name, bound in self.maximum:
            metric = _metric(attestation, name, what)
            if not within(metric.value, None, bound):
                raise VerificationError(
                    f"{what}: {name} is {metric.value:g}, above the maximum {bound:g}"
                )

    def check_filled(
        self, found: Sequence[SignedBy], refused: Sequence[str]
    ) -> tuple[SignedBy, ...]:
        """Return who fills it: one different signer a role, and enough of them.

        `found` are signers whose attestations count, each in a role that it may play;
        `refused` says why others do not. Raises VerificationError.
        """
        missing = [r for r in self.roles if not any(s.role == r for s in found)]
        chosen = _distinct(self.roles, found)
        names = {signer.name for signer in found}
        if missing:
            lack = f"none by any {' nor by any '.join(missing)}"
        elif chosen is None:
            lack = (
                f"the roles {', '.join(self.roles)} need a signer each, and "
                f"{', '.join(sorted(names))} cannot fill them alone"
            )
        elif len(names) < self.signers:
            lack = f"{len(names)} of {self.signers} different signers"
        else:
            taken = {signer.name for signer in chosen}
            return (*chosen, *_further(found, taken))
        because = "".join(f"; {reason}" for reason in refused[:MAX_REASONS])
        if more := len(refused[MAX_REASONS:]):
            because += f"; and {more} more that do not count"
        because = because or "; there is no other"
        raise VerificationError(
            f"{self.predicate} is not met: {lack}{because}. Mend: `ztserve attest` "
            "with a key that the policy names as "
            f"{' or as '.join(missing or self.roles)}, then publish again"
        )


def _metric(attestation: Attestation, name: str, what: str) -> Metric:
    if name not in attestation.metrics:
        raise VerificationError(
            f"{what}: it has no metric {name!r}; it has "
            f"{', '.join(sorted(attestation.metrics)) or 'none'}"
        )
    return attestation.metrics[name]


def _distinct(
    roles: Sequence[Role], found: Sequence[SignedBy]
) -> tuple[SignedBy, ...] | None:
    """Return one signer a role, all different; None where there are no such."""
    by_role = [[s for s in found if s.role == role] for role in roles]
    for choice in product(*by_role):  # at most 3 roles of at most 32 attestations
        if len({signer.name for signer in choice}) == len(roles):
            return choice
    return None


def _further(found: Iterable[SignedBy], taken: set[str]) -> Iterable[SignedBy]:
    for signer in found:
        if signer.name not in taken:
            taken.add(signer.name)
            yield signer


# --- versions and formats -------------------------------------------------------


def check_version(name: str, version: str, minimum: str) -> None:
    """Raise VerificationError if a version is below the minimum, or cannot be told."""
    if not _VERSION.match(version):
        raise VerificationError(
            f"the trust policy has min_versions.{name} = {minimum!r}, and the version "
            f"{version!r} cannot be compared with it: release versions that are "
            "numbers with dots, such as 3 or 1.4.0"
        )
    if _numbers(version) < _numbers(minimum):
        raise VerificationError(
            f"{name}:{version} is older than the trust policy's min_versions.{name} = "
            f"{minimum!r}: an older version is not taken back; point the alias at, or "
            "deploy, that version or a newer one"
        )


def _numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def check_formats(names: Collection[str], formats: Collection[str]) -> None:
    """Raise VerificationError if a file's suffix is not among the formats."""
    for name in sorted(names):
        suffix = PurePosixPath(name.lower()).suffix.removeprefix(".")
        if suffix not in formats:
            raise VerificationError(
                f"the file {name!r} is of format {suffix or 'unknown'!r}, and the "
                f"trust policy's formats are {', '.join(sorted(formats))}: sign the "
                "model without it, or have the policy name it"
            )


# --- reading --------------------------------------------------------------------


def parse_requirements(
    entries: list[object], where: str, known: Collection[Role]
) -> tuple[Requirement, ...]:
    """Parse the ``[[require]]`` tables; ConfigError on what cannot ever be met.

    `known` are the roles that some signer of the policy has.
    """
    if len(entries) > MAX_REQUIREMENTS:
        raise ConfigError(f"{where}: more than {MAX_REQUIREMENTS} [[require]] tables")
    return tuple(
        _parse_requirement(
            entry, number, f"{where}: [[require]] number {number}", known
        )
        for number, entry in enumerate(entries, 1)
    )


def _parse_requirement(
    entry: object, number: int, where: str, known: Collection[Role]
) -> Requirement:
    if not isinstance(entry, dict):
        raise ConfigError(f"{where} is not a table")
    only(
        entry, ("predicate", "roles", "signers", "models", "minimum", "maximum"), where
    )
    predicate = take(entry, "predicate", str, where)
    if not predicate or ":" not in predicate:
        raise ConfigError(f"{where}: predicate must be the URI of a predicate type")
    given = roles_of(take(entry, "roles", list, where) or [], where)
    for role in sorted(given - set(known)):
        raise ConfigError(f"{where} wants the role {role}, and no [[signers]] has it")
    requirement = Requirement(
        number=number,
        predicate=predicate,
        roles=tuple(role for role in ROLES if role in given),
        signers=_count(entry, len(given), where),
        models=_models(entry, where),
        minimum=_bounds(entry, "minimum", where),
        maximum=_bounds(entry, "maximum", where),
    )
    if (requirement.minimum or requirement.maximum) and predicate != TEST_RESULT:
        raise ConfigError(f"{where}: only {TEST_RESULT} has metrics")
    return requirement


def _count(entry: Mapping[str, object], least: int, where: str) -> int:
    count = take(entry, "signers", int, where)
    if count is None:
        return least
    if not least <= count <= MAX_REQUIREMENTS:
        raise ConfigError(
            f"{where}: signers must be from {least} (one a role) to {MAX_REQUIREMENTS}"
        )
    return count


def _texts(entry: Mapping[str, object], key: str, where: str) -> list[str]:
    values = take(entry, key, list, where)
    if values is None:
        return []
    if not values or not all(isinstance(value, str) and value for value in values):
        raise ConfigError(f"{where}: {key} must list names; leave it out for all")
    return values


def _models(entry: Mapping[str, object], where: str) -> frozenset[str]:
    names = _texts(entry, "models", where)
    check_model_names(names, f"{where}: models")
    return frozenset(names)


def check_model_names(names: Iterable[str], where: str) -> None:
    """Raise ConfigError on a name that no model has: a rule for it would never hold."""
    for name in names:
        try:
            known = ModelRef(name).name == name
        except ConfigError:
            known = False
        if not known:
            raise ConfigError(
                f"{where}: {name!r} is no name of a model: expected lower case "
                "letters, digits and ._-, without a version"
            )


def _bounds(
    entry: Mapping[str, object], key: str, where: str
) -> tuple[tuple[str, float], ...]:
    table = take(entry, key, dict, where) or {}
    for name, value in table.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{where}: {key}.{name} must be a finite number")
    return tuple((name, float(value)) for name, value in sorted(table.items()))


def parse_min_versions(table: Mapping[str, object], where: str) -> dict[str, str]:
    """Parse ``[min_versions]``: model name to version; ConfigError."""
    found = take(table, "min_versions", dict, where) or {}
    check_model_names(found, f"{where}: [min_versions]")
    for name, version in found.items():
        if not isinstance(version, str) or not _VERSION.match(version):
            raise ConfigError(
                f"{where}: min_versions.{name} is {version!r}; expected text of "
                'numbers with dots, such as "3" or "1.4.0"'
            )
    return found


def parse_formats(table: Mapping[str, object], where: str) -> frozenset[str] | None:
    """Parse ``formats``; None where the policy does not say. ConfigError."""
    if "formats" not in table:
        return None
    values = _texts(table, "formats", where)
    for value in values:
        if not _FORMAT.match(value):
            raise ConfigError(
                f"{where}: formats holds {value!r}; expected a suffix without its dot, "
                'such as "safetensors"'
            )
    return frozenset(values)
