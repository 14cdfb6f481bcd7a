"""New models of named sizes for pretraining, `scratch:NAME`: the decoder of arXiv 2507.07101.

Rotary positions, RMSNorm before each block and on queries and keys, an MLP of four times the width with GELU and without a
gate, no biases, an untied output head. Apertus is the transformers architecture that has all of these. As in the
authors' code (github.com/martin-marek/batch-size, pretraining/model.py) the norms' scales are not trained.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sbft.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "scratch:"
_GPT2_VOCABULARY = 50257
_OFFLINE_VOCABULARY = 2048


@dataclass(frozen=True)
class Size:
    """The shape of a model. Its name says how many parameters it has, counting one of its two embeddings."""

    width: int
    layers: int
    head_size: int
    vocabulary: int
    """Vocabulary of the tokenizer that it is meant for. A run uses that of its data's tokenizer."""


SIZES = {
    "0.4m": Size(96, 2, 32, _OFFLINE_VOCABULARY),
    "1m": Size(128, 4, 32, _OFFLINE_VOCABULARY),
    "3m": Size(192, 6, 64, _OFFLINE_VOCABULARY),
    "30m": Size(384, 6, 128, _GPT2_VOCABULARY),
    "124m": Size(768, 12, 128, _GPT2_VOCABULARY),
    "1.3b": Size(2048, 24, 128, _GPT2_VOCABULARY),
}
"""The last three have the paper's widths, layers and heads of 128. Smaller widths have smaller heads, so that there are
several."""


def is_scratch(model: str) -> bool:
    """Whether a model is named `scratch:NAME`."""
    return model.startswith(PREFIX)


def scratch_config(model: str, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedConfig:
    """The transformers config of `scratch:NAME`.

    Args:
        model: `scratch:NAME`.
        tokenizer: the tokenizer of the data, for vocabulary and special tokens; if None, the size's own vocabulary.

    Raises:
        ModelError: if there is no such size.
    """
    from transformers import AutoConfig

    size = _size(model)
    tokens: dict[str, Any] = {
        "vocab_size": size.vocabulary,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if tokenizer is not None:
        tokens = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    return AutoConfig.for_model(
        "apertus",
        **tokens,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        intermediate_size=4 * size.width,
        num_attention_heads=size.width // size.head_size,
        num_key_value_heads=size.width // size.head_size,
        hidden_act="gelu_pytorch_tanh",
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )


def scratch_model(
    model: str, tokenizer: PreTrainedTokenizerBase, *, seed: int, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Make a new model, initialized as in the paper's code: matrices uniform (Glorot), embeddings normal.

    There, queries, keys and values are one kernel, for which Glorot's bound is lower; nothing is scaled by the depth. The
    numbers are drawn on the CPU in float32, separately for each parameter, so a seed gives the same model on every device
    and in every dtype.

    Args:
        model: `scratch:NAME`.
        tokenizer: the tokenizer of the data.
        seed: seed of the weights.
        dtype: dtype of all weights.
        device: where the weights are made.

    Returns:
        The model in evaluation mode; the scales of its norms are 1 and frozen.

    Raises:
        ModelError: if there is no such size.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = scratch_config(model, tokenizer)
    with torch.device(device), no_init_weights():
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    size = _size(model)
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.ones_(parameter)
            continue
        drawn = torch.empty(parameter.shape)
        generator = torch.Generator().manual_seed(_seed_of(seed, name))
        bound = _bound(name, size)
        if bound is None:
            drawn.normal_(std=size.width**-0.5, generator=generator)
        else:
            drawn.uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            parameter.copy_(drawn)
    freeze_scales(made)
    return made.eval()


def freeze_scales(model: PreTrainedModel) -> None:
    """Turn off the gradients of the norms' scales, as in the authors' code; the model is changed."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.requires_grad_(False)


def counted_parameters(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> int:
    """The parameters that a budget of tokens per parameter counts: the matrices, without an untied output head.

    For `scratch:NAME` these are the paper's 12 layers width^2 + vocabulary width.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
    head = model.get_output_embeddings()
    untied = head is not None and head.weight is not model.get_input_embeddings().weight
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() > 1)
    return matrices - (head.weight.numel() if untied else 0)


def _size(model: str) -> Size:
    name = model.removeprefix(PREFIX)
    if name not in SIZES:
        near = difflib.get_close_matches(name, SIZES, n=1)
        hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
        known = ", ".join(PREFIX + size for size in SIZES)
        raise ModelError(f"There is no size of a new model called {name!r}; expected {known}.{hint}")
    return SIZES[name]


def _bound(name: str, size: Size) -> float | None:
    """The bound of a matrix that is drawn uniformly; None for an embedding, which is not."""
    layer = name.rpartition(".weight")[0].rpartition(".")[2]
    heads, together = size.width // size.head_size, size.width + size.head_size
    fans = {
        "q_proj": 3 * heads * together,
        "k_proj": 3 * heads * together,
        "v_proj": 3 * heads * together,
        "o_proj": heads * together,
        "up_proj": 5 * size.width,
        "down_proj": 5 * size.width,
    }
    return math.sqrt(6 / fans[layer]) if layer in fans else None


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
