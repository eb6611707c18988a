"""Both models, trained once for all tests."""

import time
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

with warnings.catch_warnings():
    # What Ray warns of when it is imported is Ray's to mend.
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401

from examples.digits import network
from examples.training import chat, digits

# Tests share their cores; threads of one small model would only wait for each other.
torch.set_num_threads(1)


class Trained(NamedTuple):
    directory: Path
    facts: Mapping[str, object]
    seconds: float
    """Of one core."""


def _trained(directory: Path, train) -> Trained:
    start = time.process_time()
    facts = train(directory)
    return Trained(directory, facts, time.process_time() - start)


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory) -> Trained:
    train = partial(digits.train, network=network)
    return _trained(tmp_path_factory.mktemp("digits"), train)


@pytest.fixture(scope="session")
def trained_chat(tmp_path_factory) -> Trained:
    return _trained(tmp_path_factory.mktemp("chat"), chat.train)
