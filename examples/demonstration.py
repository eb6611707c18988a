"""The main job, on your own machine: `make run`.

Trains and signs two models, serves them on Ray, lets the gateway answer a verified
caller, and shows every refusal with what the caller saw and what the audit says.
"""

import argparse
import importlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from examples.gateway_client import GatewayClient
from ztserve import config
from ztserve.cli.init import initialise
from ztserve.serving import cluster

PROJECT = Path(".demonstration")
OPTIONS = {
    "ray_actor_options": {"num_cpus": 0.1},
    "graceful_shutdown_timeout_s": 3,
    "graceful_shutdown_wait_loop_s": 0.1,
}
PROMPT = "who do i write to about my order?"
START_S = 60.0

console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)


def main() -> int:
    """Run it; 1 if any line of it did not hold."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the showing")
    parser.add_argument("--project", type=Path, default=PROJECT)
    chosen = parser.parse_args()
    settings = prepare(chosen.project)
    with phase("Two models, trained, signed, released, published"):
        accuracy = publish(settings)
    with cluster.attached(num_cpus=8), serving(settings), visitor(settings) as client:
        with phase("A verified caller is answered, through the gateway"):
            held = [answered(client, accuracy), streamed(client)]
        with phase("Everybody else is refused"):
            held += refused(settings)
        if not chosen.once:
            wait(settings)
    failed = held.count(False)
    console.print(
        f"[red]{failed} lines did not hold" if failed else "[green]Every line held."
    )
    return 1 if failed else 0


@contextmanager
def phase(title: str) -> Iterator[None]:
    """Print a heading, and the time that it took."""
    console.print(f"\n[bold]{title}")
    start = time.perf_counter()
    yield
    console.print(f"[dim]  {time.perf_counter() - start:.1f} s")


# --- the project ------------------------------------------------------------------


def prepare(project: Path) -> config.Settings:
    """Make a project with two free ports, and have all that follows use it."""
    toml = project / config.FILE
    if not toml.exists():
        project.mkdir(exist_ok=True)
        initialise(project)
        toml.write_text(
            toml.read_text()
            .replace("port = 7443", f"port = {_free_port()}")
            .replace("port = 8443", f"port = {_free_port()}")
            .replace('["inference-service"]', '["inference-service", "chat"]')
        )
    config.default_environment(
        {"ZTSERVE_CONFIG": str(toml.resolve()), "RAY_SERVE_LOG_TO_STDERR": "0"}
    )
    return config.load()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def publish(settings: config.Settings) -> float:
    """Publish digits:1 and chat:1, unless they are; return the trained accuracy."""
    from ztserve.artifacts import TrustPolicy, verify_model
    from ztserve.errors import ArtifactError

    trust = TrustPolicy.load(settings.artifacts.trust_policy)
    for name in ("digits", "chat"):
        with suppress(ArtifactError):
            verify_model(settings.artifacts.folder, f"{name}:1", trust)
            continue
        _train(settings, name)
    facts = {}
    for name in ("digits", "chat"):
        model = verify_model(settings.artifacts.folder, f"{name}@production", trust)
        facts[name] = json.loads(model.read("config.json"))
        signers = " and ".join(f"{s.name} as {s.role}" for s in model.signers)
        console.print(f"  {name}:1 {model.digest[:19]}…  signed by {signers}")
    return float(facts["digits"]["accuracy"])


def _train(settings: config.Settings, name: str) -> None:
    from examples.training.release import released

    train = importlib.import_module(f"examples.training.{name}").train
    if name == "digits":
        train = partial(
            train, network=importlib.import_module("examples.digits").network
        )
    released(settings, name, "1", train)


# --- what runs --------------------------------------------------------------------


@contextmanager
def serving(settings: config.Settings) -> Iterator[None]:
    """Deploy both models and start the gateway; end the gateway at the end."""
    with phase("Ray Serve with agent, directory, replicas and gateway"):
        from examples.chat import Chat
        from examples.digits import Digits

        cluster.deploy(Digits.options(num_replicas=2, **OPTIONS).bind(), "digits")
        cluster.deploy(Chat.options(**OPTIONS).bind(), "chat")
        for key, endpoints in cluster.replicas(settings):
            for endpoint in endpoints:
                console.print(f"  {key} at {endpoint.address}")
        gateway = subprocess.Popen(
            [sys.executable, "-m", "ztserve.cli", "gateway"],
            stdout=subprocess.DEVNULL,
        )
        try:
            _await_port(gateway, settings.gateway.host, settings.gateway.port)
        except BaseException:
            gateway.kill()
            raise
        console.print(
            f"  gateway at https://{settings.gateway.host}:{settings.gateway.port}"
        )
    try:
        yield
    finally:
        gateway.terminate()
        try:
            gateway.wait(10)
        except subprocess.TimeoutExpired:
            gateway.kill()


def _await_port(process: subprocess.Popen[bytes], host: str, port: int) -> None:
    until = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < until:
        with suppress(OSError), socket.create_connection((host, port), 1):
            return
        time.sleep(0.1)
    raise SystemExit(f"the gateway did not open {host}:{port}")


@contextmanager
def visitor(settings: config.Settings) -> Iterator[GatewayClient]:
    """Connect to the gateway as the developer."""
    source = config.obtain_identity(settings)
    client = GatewayClient(
        f"{settings.gateway.host}:{settings.gateway.port}",
        source.current(),
        settings.gateway_id,
    )
    try:
        yield client
    finally:
        client.close()
        source.close()


# --- what is seen -----------------------------------------------------------------


def answered(client: GatewayClient, trained: float) -> bool:
    """Send the held-back digits; is the served accuracy the trained one?"""
    from examples.training.digits import accuracy, held_back

    pixels, labels = held_back()
    start = time.perf_counter()
    scores = np.concatenate(
        [
            client.predict("digits", pixels=pixels[i : i + 1])["probabilities"]
            for i in range(len(pixels))
        ]
    )
    took = time.perf_counter() - start
    served = accuracy(scores, labels)
    held = abs(served - trained) < 1e-9
    console.print(
        f"  {_mark(held)} digits: {len(labels)} calls in {took:.1f} s, accuracy "
        f"{served:.4f}, trained {trained:.4f}"
    )
    return held


def streamed(client: GatewayClient) -> bool:
    """Ask the chat for what it knows by heart; is what it must not say redacted?"""
    console.print(f"  [dim]you:[/] {PROMPT}\n  [dim]chat:[/] ", end="")
    text = ""
    for piece in client.stream("chat", prompt=PROMPT):
        console.print(piece, end="", markup=False)
        text += piece
    held = (
        "<EMAIL_ADDRESS>" in text
        and "<CREDIT_CARD>" in text
        and "@" not in text
        and not any(character.isdigit() for character in text)
    )
    console.print(f"\n  {_mark(held)} the address and the card number did not leave")
    return held


def refused(settings: config.Settings) -> list[bool]:
    """Try every attack; show what the attacker saw and what the audit wrote."""
    from examples.attempts import attempts

    table = Table("", "attempt", "the caller saw", "the audit says", show_lines=True)
    held = []
    with console.status("trying"):
        for refusal, record in attempts(settings, OPTIONS):
            held.append(bool(refusal.saw and record))
            told = (refusal.title, refusal.saw, record or "no record")
            table.add_row(_mark(held[-1]), *map(escape, told))
    console.print(table)
    return held


def _mark(held: bool) -> str:  # noqa: FBT001
    return "[green]✓[/]" if held else "[red]✗[/]"


def wait(settings: config.Settings) -> None:
    """Stay up until Ctrl-C."""
    ztserve = Path(sys.executable).with_name("ztserve")
    console.print(
        "\n[bold]It stays up until Ctrl-C.[/] In another shell:\n"
        f"  export RAY_AUTH_MODE=token ZTSERVE_CONFIG={settings.base / config.FILE}\n"
        f"  {ztserve} predict inference-service --example\n"
        f"  {ztserve} predict chat --stream --input prompt='{PROMPT}'\n"
        f"  {ztserve} status\n",
        soft_wrap=True,
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with suppress(KeyboardInterrupt):
        stop.wait()
    console.print("stopping")


if __name__ == "__main__":
    sys.exit(main())
