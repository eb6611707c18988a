"""A Llama of `transformers` with a LoRA adapter, each signed, served from memory.

Needs the extra: ``pip install ztserve[transformers]``. Configuration, tokenizer, shards
of weights and adapter come from the verified models only, never from a hub::

    python -m examples.llama publish
    ztserve run examples.llama:app

The model is small and its weights are random: what it says means nothing.
"""

import json
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ztserve import ModelRef, TextSpec, VerifiedModel, ZTDeployment

MAX_TOKENS = 24


class Llama(ZTDeployment):
    """Continue a prompt, token by token, always with the likeliest."""

    model: ClassVar[Mapping[str, ModelRef]] = {
        "base": ModelRef("llama@production"),
        "adapter": ModelRef("llama-adapter@production"),
    }
    service = "llama"
    inputs = (TextSpec("prompt", max_chars=200),)
    outputs = (TextSpec("text", max_chars=2000),)

    def load(self, models: Mapping[str, VerifiedModel]) -> None:
        base, adapter = models["base"], models["adapter"]
        # A folder of the signed files, for libraries that insist on paths.
        self.tokenizer = AutoTokenizer.from_pretrained(
            base.directory(), local_files_only=True
        )
        config = LlamaConfig.from_dict(json.loads(base.read("config.json")))
        self.network = LlamaForCausalLM(config)
        # Over the verified memory itself; a layer that is adapted has its own.
        weights = adapted(dict(base.tensors()), adapter)
        self.network.load_state_dict(weights, strict=True, assign=True)
        self.network.to(self.device).eval()

    def predict(self, prompt: str) -> Iterator[str]:
        codes = self.tokenizer(prompt, return_tensors="pt").input_ids.to(self.device)
        known, said, text = None, [], ""
        for _ in range(MAX_TOKENS):
            answer = self.network(codes, past_key_values=known, use_cache=True)
            known, codes = answer.past_key_values, answer.logits[:, -1:].argmax(-1)
            said.append(int(codes))
            whole = str(self.tokenizer.decode(said))
            yield whole[len(text) :]
            text = whole


def adapted(
    weights: dict[str, torch.Tensor], adapter: VerifiedModel
) -> dict[str, torch.Tensor]:
    """Return the weights with an adapter's deltas added: W + B A alpha / r.

    Hu et al., LoRA (arXiv 2106.09685), section 4.1, in the file names and the layout of
    the `peft` library. Raises KeyError where it adapts a layer that is not there.
    """
    config = json.loads(adapter.read("adapter_config.json"))
    scale = config["lora_alpha"] / config["r"]
    deltas = dict(adapter.tensors())
    for name, down in deltas.items():
        layer, is_down, _ = name.partition(".lora_A.weight")
        if is_down:
            target = layer.removeprefix("base_model.model.") + ".weight"
            up = deltas[f"{layer}.lora_B.weight"]
            weights[target] = weights[target] + scale * (up @ down)
    return weights


app = Llama.bind()

if __name__ == "__main__":
    from examples.training.llama import train, train_adapter
    from examples.training.release import main

    main("llama", train)
    main("llama-adapter", train_adapter)
