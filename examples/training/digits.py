"""Train a network on scikit-learn's digits, and measure it on what it never saw.

Data: 1,797 images of 8x8 pixels, 0..16, from the UCI repository ("Optical Recognition
of Handwritten Digits"), which scikit-learn carries in its wheel; nothing is downloaded.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from examples.training.repeatable import repeatable

SEED = 20
HELD_BACK = 0.25
"""The share of the images that training never sees."""
EPOCHS = 30
BATCH = 32


def _split() -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels, labels = data.data.astype(np.float32), data.target.astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(labels))
    cut = int(len(labels) * HELD_BACK)
    held, seen = order[:cut], order[cut:]
    return (pixels[seen], labels[seen]), (pixels[held], labels[held])


def held_back() -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels [449, 64] (FP32, 0..16) and labels [449] kept from training."""
    return _split()[1]


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of rows of `scores` [n, 10] that are highest at their label."""
    return float((scores.argmax(axis=1) == labels).mean())


def train(directory: Path, network: Callable[[], nn.Module]) -> Mapping[str, object]:
    """Train, write ``model.safetensors`` and ``config.json`` to `directory`.

    Returns what was written to the latter: the accuracy on the held-back images and
    how it came about. The same on every run of one machine.
    """
    (pixels, labels), (unseen, answers) = _split()
    with repeatable(SEED):
        model = network()
        _fit(model, torch.from_numpy(pixels), torch.from_numpy(labels))
    model.eval()
    with torch.inference_mode():
        scores = model(torch.from_numpy(unseen)).numpy()
    facts = {
        "accuracy": accuracy(scores, answers),
        "held_back": len(answers),
        "trained_on": len(labels),
        "epochs": EPOCHS,
        "seed": SEED,
    }
    save_file(model.state_dict(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _fit(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4)
    for _ in range(EPOCHS):
        order = torch.randperm(len(labels))
        for at in range(0, len(order), BATCH):
            rows = order[at : at + BATCH]
            loss = functional.cross_entropy(model(pixels[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
