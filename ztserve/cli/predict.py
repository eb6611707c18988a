"""``ztserve predict``: one call, as the identity that the agent gives this process."""

import argparse
import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from ztserve import config, identity, transport
from ztserve.cli import show
from ztserve.cli.printing import printable
from ztserve.errors import InvalidInput

MAX_INPUT_BYTES = 64 * 1024 * 1024


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("deployment", help="service, or namespace/service")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input: a text, a JSON list, or @file of either",
    )
    parser.add_argument(
        "--example", action="store_true", help="send an input made of zeros"
    )
    parser.add_argument("--stream", action="store_true", help="print piece by piece")
    parser.add_argument(
        "--timeout-s",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long the call may take, all tries together (default: 30)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Call, and print who asked and what came back."""
    identity.harden_process()
    settings = config.load()
    inputs = parsed(chosen.input)
    with contextlib.ExitStack() as closing:
        quarantine = closing.enter_context(config.open_quarantine(settings))
        source = closing.enter_context(config.obtain_identity(settings))
        print(f"as {source.current().svid.id}", file=sys.stderr, flush=True)
        client = closing.enter_context(
            transport.Client(
                target(settings, chosen.deployment),
                source=source,
                directory=f"{settings.directory.host}:{settings.directory.port}",
                directory_id=settings.directory_id,
                timeout_s=chosen.timeout_s,
                quarantine=quarantine,
                tokens=config.open_tokens(settings, source),
            )
        )
        if chosen.example:
            inputs = {**client.example(), **inputs}
        if chosen.stream:
            for piece in client.stream(inputs, timeout_s=chosen.timeout_s):
                _print_piece(piece, as_json=chosen.json)
            print()
        else:
            answer = client.infer(inputs, timeout_s=chosen.timeout_s)
            show.as_json({name: plain(value) for name, value in answer.items()})
    return 0


def target(settings: config.Settings, deployment: str) -> str:
    """Return ``namespace/service`` for what a person typed."""
    if "/" in deployment:
        return deployment
    return f"{settings.identity.namespace}/{deployment}"


def parsed(pairs: list[str]) -> dict[str, Any]:
    """Read ``name=value`` arguments. Raises InvalidInput."""
    inputs = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InvalidInput(f"--input {pair}: expected name=value")
        if value.startswith("@"):
            value = _read(Path(value[1:]))
        inputs[name] = _list_or_text(value)
    return inputs


def plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    return value.tolist() if hasattr(value, "tolist") else value


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a positive number")
    return seconds


def _read(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise InvalidInput(f"{path}: larger than {MAX_INPUT_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path}: not UTF-8 at byte {error.start}") from error


def _list_or_text(value: str) -> Any:
    # A number alone is a text: no tensor is without its batch axis.
    if value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            return value
    return value


def _print_piece(piece: dict[str, Any], *, as_json: bool) -> None:
    texts = [value for value in piece.values() if isinstance(value, str)]
    if as_json or not texts:
        print(json.dumps({name: plain(value) for name, value in piece.items()}))
    else:
        print(printable("".join(texts)), end="", flush=True)
