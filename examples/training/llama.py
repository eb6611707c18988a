"""A small Llama with random weights, saved by `transformers`, and an adapter of it."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.training.dialogues import dialogues
from examples.training.repeatable import repeatable

SEED = 40
VOCABULARY = 320
SHARD = "200KB"
"""`transformers` splits the weights into files of at most this, and an index."""
RANK, ALPHA = 4, 16
LAYERS = "base_model.model.model.layers"
ADAPTED = ("q_proj", "v_proj")


def train(directory: Path) -> Mapping[str, object]:
    """Write a model and its tokenizer to `directory`, as `save_pretrained` does."""
    tokenizer = ByteLevelBPETokenizer()
    texts = [text for pair in dialogues() for text in pair]
    tokenizer.train_from_iterator(texts, VOCABULARY, show_progress=False)
    PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer
    ).save_pretrained(directory)
    with repeatable(SEED):
        model = LlamaForCausalLM(_config())
    model.save_pretrained(directory, max_shard_size=SHARD)
    size = sum(one.numel() for one in model.parameters())
    return {"parameters": size, "files": len(list(directory.iterdir())), "seed": SEED}


def train_adapter(directory: Path) -> Mapping[str, object]:
    """Write a LoRA adapter for the model of `train`, in the layout of `peft`."""
    config = _config()
    shapes = {"A": (RANK, config.hidden_size), "B": (config.hidden_size, RANK)}
    with repeatable(SEED + 1):
        deltas = {
            f"{LAYERS}.{layer}.self_attn.{name}.lora_{part}.weight": torch.randn(shape)
            for layer in range(config.num_hidden_layers)
            for name in ADAPTED
            for part, shape in shapes.items()
        }
    save_file(deltas, directory / "adapter_model.safetensors")
    facts = {
        "peft_type": "LORA",
        "base_model_name_or_path": "llama",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(ADAPTED),
    }
    (directory / "adapter_config.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


def _config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=None,
    )
