"""Teach a transformer its dialogues by heart."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional

from examples.training.dialogues import dialogues
from examples.training.repeatable import repeatable
from examples.transformer import END, Transformer

SEED = 20
MAX_STEPS = 600
"""Training ends here at the latest, and fails if anything is not known by then."""
PEAK_RATE = 4e-3
UNSURE = 0.9
"""Every character must be this probable: too sure for rounding to matter."""


def train(directory: Path) -> Mapping[str, object]:
    """Train, write ``model.safetensors`` and ``config.json`` to `directory`.

    Returns what was written to the latter. The same on every run of one machine.
    Raises RuntimeError if the dialogues were not learnt within `MAX_STEPS`.
    """
    pairs = dialogues()
    characters = "".join(sorted(set(END.join(map("".join, pairs)))))
    with repeatable(SEED):
        network = Transformer(len(characters))
        steps = _learn(network, *_examples(pairs, characters))
    facts = {
        "characters": characters,
        "dialogues": len(pairs),
        "steps": steps,
        "seed": SEED,
    }
    save_file(network.state_dict(), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _examples(
    pairs: tuple[tuple[str, str], ...], characters: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes [n, longest] and what follows each; -100 where nothing is asked."""
    longest = max(len(prompt) + len(answer) + 1 for prompt, answer in pairs)
    codes = torch.zeros(len(pairs), longest, dtype=torch.long)
    follow = torch.full((len(pairs), longest), -100)
    for row, (prompt, answer) in enumerate(pairs):
        text = [characters.index(c) for c in prompt + END + answer + END]
        codes[row, : len(text) - 1] = torch.tensor(text[:-1])
        # Only answers are learnt: what people ask is theirs.
        asked = len(prompt)
        follow[row, asked : len(text) - 1] = torch.tensor(text[asked + 1 :])
    return codes, follow


def _learn(network: Transformer, codes: torch.Tensor, follow: torch.Tensor) -> int:
    """Train until every character is known; return the steps that it took."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.05, total_iters=20)
    for step in range(1, MAX_STEPS + 1):
        scores = network(codes).transpose(1, 2)
        losses = functional.cross_entropy(scores, follow, reduction="none")
        if float(losses.detach().neg().exp().min()) > UNSURE:
            return step
        optimizer.zero_grad()
        loss = losses.sum() / follow.ne(-100).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        warm_up.step()
    raise RuntimeError(f"the dialogues were not learnt in {MAX_STEPS} steps")
