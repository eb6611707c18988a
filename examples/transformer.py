"""A character-level transformer, as small as one can be and still learn by heart."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

CONTEXT = 224
"""Most characters of a prompt and its answer together."""

END = "\n"
"""The character that ends a prompt, and ends an answer."""


class Block(nn.Module):
    """Attend to the characters before, then think about what was seen."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attend = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width))
        self.join = nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        split = self.attend(x).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        query, key, value = split.unbind(2)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(seen.transpose(1, 2).flatten(2))
        return cast("Tensor", x + self.think(x))


class Transformer(nn.Module):
    """Map codes of characters [batch, n] to scores of the next ones [batch, n, all]."""

    def __init__(self, characters: int, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(Block(width, heads), Block(width, heads))
        self.head = nn.Linear(width, characters)

    def forward(self, codes: Tensor) -> Tensor:
        places = torch.arange(codes.shape[1], device=codes.device)
        x = self.blocks(self.characters(codes) + self.places(places))
        return cast("Tensor", self.head(x))
