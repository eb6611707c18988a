"""A small language model that answers as a stream of text.

Its training text holds made-up addresses and card numbers, which it tells to whoever
asks; the output filter sees to it that they do not leave::

    python -m examples.chat publish
    ztserve run examples.chat:app
"""

import json
from collections.abc import Iterator

import torch

from examples.transformer import CONTEXT, END, Transformer
from ztserve import ModelRef, TextSpec, VerifiedModel, ZTDeployment


class Chat(ZTDeployment):
    """Answer a prompt, word by word."""

    model = ModelRef("chat@production")
    service = "chat"
    inputs = (TextSpec("prompt", max_chars=96),)
    outputs = (TextSpec("text", max_chars=CONTEXT),)

    def load(self, model: VerifiedModel) -> None:
        self.characters: str = json.loads(model.read("config.json"))["characters"]
        self.network = Transformer(len(self.characters))
        self.network.load_state_dict(dict(model.tensors()))
        self.network.to(self.device).eval()

    def predict(self, prompt: str) -> Iterator[str]:
        known = "".join(c for c in prompt.lower() if c in self.characters and c != END)
        word = ""
        for character in self.continued(known + END):
            word += character
            if character == " ":
                yield word
                word = ""
        yield word

    def continued(self, text: str) -> Iterator[str]:
        """Give the likeliest next character until the answer ends."""
        codes = [self.characters.index(c) for c in text]
        while len(codes) < CONTEXT:
            scores = self.network(torch.tensor([codes], device=self.device))
            codes.append(int(scores[0, -1].argmax()))
            character = self.characters[codes[-1]]
            if character == END:
                return
            yield character


app = Chat.bind()

if __name__ == "__main__":
    from examples.training.chat import train
    from examples.training.release import main

    main("chat", train)
