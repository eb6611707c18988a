"""``ztserve predict``: one call, as the identity that the agent gives this process."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ztserve import config, transport
from ztserve.cli import show
from ztserve.errors import InvalidInput
from ztserve.identity import WorkloadSource

HELP = "call a deployment over mTLS and print the answer"
MAX_INPUT_BYTES = 64 * 1024 * 1024


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("deployment", help="service, or namespace/service")
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an input: a text, a JSON list, or @file.json",
    )
    parser.add_argument(
        "--example", action="store_true", help="send an input made of zeros"
    )
    parser.add_argument("--stream", action="store_true", help="print piece by piece")
    parser.add_argument("--timeout-s", type=float, default=30.0)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(chosen: argparse.Namespace) -> int:
    """Call, and print who asked and what came back."""
    settings = config.load()
    source = config.obtain_identity(settings)
    with transport.Client(
        target(settings, chosen.deployment),
        source=source,
        directory=f"{settings.directory.host}:{settings.directory.port}",
        directory_id=settings.directory_id,
    ) as client:
        inputs = parsed(chosen.input)
        if chosen.example:
            inputs = {**client.example(), **inputs}
        print(f"as {source.current().svid.id}", file=sys.stderr)
        if chosen.stream:
            for piece in client.stream(inputs, timeout_s=chosen.timeout_s):
                _print_piece(piece, as_json=chosen.json)
            print()
        else:
            answer = client.infer(inputs, timeout_s=chosen.timeout_s)
            show.as_json({name: plain(value) for name, value in answer.items()})
    close(source)
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
            with Path(value[1:]).open("rb") as file:
                value = file.read(MAX_INPUT_BYTES).decode()
        inputs[name] = _json_or_text(value)
    return inputs


def plain(value: Any) -> Any:
    """Return a value that JSON can hold."""
    return value.tolist() if hasattr(value, "tolist") else value


def close(source: WorkloadSource) -> None:
    """Give the identity up."""
    source.close()


def _json_or_text(value: str) -> Any:
    if value[:1] in "[-0123456789":
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _print_piece(piece: dict[str, Any], *, as_json: bool) -> None:
    texts = [value for value in piece.values() if isinstance(value, str)]
    if as_json or not texts:
        print(json.dumps({name: plain(value) for name, value in piece.items()}))
    else:
        print("".join(texts), end="", flush=True)
