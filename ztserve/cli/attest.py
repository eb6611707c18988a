"""``ztserve attest``: what an evaluator says of a signed model."""

import argparse
import hashlib
import re
import sys
from pathlib import Path

from ztserve import config
from ztserve.artifacts import publish
from ztserve.cli import certified, signer
from ztserve.errors import ConfigError

_ASSIGNED = re.compile(r"([^=]+)=([^=]+)\Z")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_MAX_PREDICATE_BYTES = 1 << 20


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("directory", type=Path, help="a signed model")
    signer.arguments(parser, "keys/evaluator.pem of the project")
    certified.arguments(parser)
    parser.add_argument("--name", default="evaluation", help="attestations/NAME.sig")
    parser.add_argument(
        "--digest",
        help="the model that was evaluated, as sha256:..., where others may write the "
        "folder: any other is refused (default: whichever is there now)",
    )
    for word, what in (
        ("metric", "a measured value, such as accuracy=0.97; may be repeated"),
        ("minimum", "its threshold, such as accuracy=0.9; may be repeated"),
        ("maximum", "its threshold, such as toxicity=0.01; may be repeated"),
    ):
        parser.add_argument(f"--{word}", action="append", default=[], help=what)
    parser.add_argument(
        "--result",
        choices=("PASSED", "WARNED", "FAILED"),
        help="default: PASSED where every metric is within its thresholds, else FAILED",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        type=Path,
        help="a file that it was evaluated with; its digest is attested",
    )
    parser.add_argument(
        "--predicate", type=Path, help="a JSON file to attest instead, as it is"
    )
    parser.add_argument("--predicate-type", help="the URI of that predicate's type")


def run(chosen: argparse.Namespace) -> int:
    """Write the attestation into the directory."""
    if (chosen.predicate is None) != (chosen.predicate_type is None):
        raise ConfigError("--predicate FILE and --predicate-type URI go together")
    if chosen.digest is not None and not _DIGEST.match(chosen.digest):
        raise ConfigError(
            f"--digest {chosen.digest!r}: expected sha256: and 64 hex digits, as "
            "`ztserve sign` prints it"
        )
    if chosen.predicate is not None:
        kind, predicate = str(chosen.predicate_type), _predicate(chosen)
    else:
        kind, predicate = publish.TEST_RESULT, _evaluation(chosen)
    signing = certified.signer(chosen, lambda: _key(chosen), "evaluator")
    path = publish.attest_model(
        chosen.directory,
        signing,
        name=chosen.name,
        predicate_type=kind,
        predicate=predicate,
        digest=chosen.digest,
    )
    print(path)
    if chosen.predicate is None and predicate["result"] != "PASSED":
        # Signed all the same: whoever signed it must see what it says.
        print(f"signed with the result {predicate['result']}", file=sys.stderr)
    return 0


def _key(chosen: argparse.Namespace) -> publish.StatementSigner:
    key = chosen.key or config.load().state / "keys/evaluator.pem"
    if isinstance(key, Path) and not key.exists():
        raise ConfigError(
            f"{key}: there is no such key; make one with `ztserve key new {key} --role "
            "evaluator`, and paste what it prints into the trust policy"
        )
    return signer.load(key, chosen.passphrase_file)


def _evaluation(chosen: argparse.Namespace) -> publish.Predicate:
    values = _numbers(chosen.metric, "--metric")
    bounds = {
        word: _numbers(getattr(chosen, word), f"--{word}")
        for word in ("minimum", "maximum")
    }
    for word, given in bounds.items():
        for name in given.keys() - values.keys():
            raise ConfigError(f"--{word} {name}: there is no --metric {name}=VALUE")
    if not values and chosen.result is None:
        raise ConfigError(
            "nothing to attest: give --metric NAME=VALUE, or --result, or --predicate"
        )
    metrics = {
        name: publish.Metric(
            value, bounds["minimum"].get(name), bounds["maximum"].get(name)
        )
        for name, value in values.items()
    }
    data = [_descriptor(path) for path in chosen.data]
    return publish.result_predicate(metrics, result=chosen.result, configuration=data)


def _numbers(words: list[str], option: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for word in words:
        match = _ASSIGNED.match(word)
        try:
            if match is None or match[1] in found:
                raise ValueError
            found[match[1]] = float(match[2])
        except ValueError as error:
            raise ConfigError(
                f"{option} {word!r}: expected NAME=NUMBER, each name once"
            ) from error
    return found


def _descriptor(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "digest": {"sha256": digest}}


def _predicate(chosen: argparse.Namespace) -> publish.Predicate:
    if chosen.metric or chosen.minimum or chosen.maximum or chosen.result:
        raise ConfigError("--predicate is attested as it is: leave out the metrics")
    with chosen.predicate.open("rb") as file:
        raw = file.read(_MAX_PREDICATE_BYTES + 1)
    return publish.parse_predicate(raw, str(chosen.predicate))
