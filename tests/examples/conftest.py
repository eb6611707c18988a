"""Both models, trained once for all tests."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import nn

from examples.training import chat, digits


class Trained(NamedTuple):
    directory: Path
    facts: Mapping[str, object]
    seconds: float


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("digits")
    start = time.perf_counter()
    facts = digits.train(directory, network)
    return Trained(directory, facts, time.perf_counter() - start)


@pytest.fixture(scope="session")
def trained_chat(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("chat")
    start = time.perf_counter()
    facts = chat.train(directory)
    return Trained(directory, facts, time.perf_counter() - start)
