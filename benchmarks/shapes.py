"""Models by name, without their weights: parameter shapes for the optimizers, random weights for whole steps."""

from __future__ import annotations

import re
from typing import Any

import torch

LLAMA_3 = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
LLAMAS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 160, "num_hidden_layers": 2, "intermediate_size": 320, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-1b": {
        **LLAMA_3, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "tie_word_embeddings": True,
    },
    "llama-8b": {
        **LLAMA_3, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Settings of `transformers.LlamaConfig`, as published with SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B."""


def parameter_shapes(name: str) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a named model, a folder with a config.json, or a single tensor such as "4096x11008"."""
    if re.fullmatch(r"\d+(x\d+)*", name):
        return [tuple(int(size) for size in name.split("x"))]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config or AutoConfig.from_pretrained(name))
    return [tuple(parameter.shape) for parameter in model.parameters()]


def random_model(name: str, *, dtype: torch.dtype, device: str) -> Any:
    """A model of random weights, in training mode; None if `name` is none of `LLAMAS`."""
    from transformers import AutoModelForCausalLM

    config = _config(name)
    if config is None:
        return None
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _config(name: str) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**LLAMAS[name], max_position_embeddings=8192) if name in LLAMAS else None
