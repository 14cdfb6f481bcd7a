"""How llama.cpp stores a model: names of tensors, hyperparameters, order of rows."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from sbft.errors import ExportError, MissingPackageError, how_to_install

if TYPE_CHECKING:
    from gguf import GGUFWriter

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
_GEMMA_PERIOD = 6
"""Every sixth layer of Gemma 3 attends to all positions; llama.cpp supports no other pattern."""
_LAYERS_OF_GEMMA_27B = 62  # the only size that scales attention differently


@dataclass(frozen=True)
class Architecture:
    """A family of models in llama.cpp.

    Attributes:
        name: llama.cpp's name for it, the prefix of its hyperparameters.
        activation: of its feed-forward layers.
        adjacent_pairs: whether the two elements of each rotary pair are neighbours, where transformers has them half a head
            apart. Rows of the query and key projections are then reordered.
        norm_offset: what a norm adds to its weight; llama.cpp stores the sum.
        check: raises ExportError for settings of a config that llama.cpp's code cannot express.
    """

    name: str
    activation: str
    adjacent_pairs: bool = False
    norm_offset: float = 0.0
    check: Callable[[PreTrainedConfig], None] = lambda config: None


def _check_llama(config: PreTrainedConfig) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        raise _not_expressible(f"attention in a sliding window of {window} tokens")


def _check_qwen(config: PreTrainedConfig) -> None:
    if getattr(config, "use_sliding_window", False):
        raise _not_expressible(f"attention in a sliding window of {config.sliding_window} tokens")


def _check_gemma(config: PreTrainedConfig) -> None:
    full = [kind == "full_attention" for kind in config.layer_types]
    if full != [(i + 1) % _GEMMA_PERIOD == 0 for i in range(len(full))]:
        raise _not_expressible(f"full attention in other layers than every {_GEMMA_PERIOD}th")
    large = config.num_hidden_layers == _LAYERS_OF_GEMMA_27B
    scaled_by = config.hidden_size // config.num_attention_heads if large else config.head_dim
    if config.query_pre_attn_scalar != scaled_by:
        raise _not_expressible(f"a query_pre_attn_scalar of {config.query_pre_attn_scalar}, expected {scaled_by}")
    if config.attn_logit_softcapping is not None:
        raise _not_expressible("attn_logit_softcapping")


ARCHITECTURES = {
    "llama": Architecture("llama", "silu", adjacent_pairs=True, check=_check_llama),
    "mistral": Architecture("llama", "silu", adjacent_pairs=True, check=_check_llama),
    "qwen2": Architecture("qwen2", "silu", check=_check_qwen),
    "qwen3": Architecture("qwen3", "silu", check=_check_qwen),
    "gemma3_text": Architecture("gemma3", "gelu", norm_offset=1.0, check=_check_gemma),
}
"""Architectures by transformers' `model_type`."""


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture of a model, if its config can be written.

    Raises:
        ExportError: if sbft does not know the family, or llama.cpp's code for it lacks a setting of the config.
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ExportError(
            f"sbft cannot write a model of type {config.model_type} as GGUF, only {', '.join(ARCHITECTURES)}. Export it as "
            "safetensors (leave --format out), and convert that with llama.cpp's convert_hf_to_gguf.py."
        )
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if _ACTIVATIONS.get(activation) != architecture.activation:
        raise _not_expressible(f"the activation {activation}")
    architecture.check(config)
    _rope(config)
    return architecture


def _not_expressible(what: str) -> ExportError:
    return ExportError(f"The model has {what}, which llama.cpp's code for its family does not have. Leave --format out.")


def write_hyperparameters(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Write everything of a config that llama.cpp reads."""
    head_dim = head_dim_of(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(import_gguf().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
        writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
        if config.final_logit_softcapping is not None:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def head_dim_of(config: PreTrainedConfig) -> int:
    """Elements of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary settings of layers that attend to all positions.

    Raises:
        ExportError: if they are of a type that sbft cannot write.
    """
    rope: dict[str, Any] = config.rope_parameters
    rope = rope.get("full_attention", rope)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise _not_expressible(f"rotary embeddings of type {rope['rope_type']}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _not_expressible("rotary embeddings of a part of each head")
    return rope


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """The divisors of rotary frequencies in llama.cpp, float32 of shape (head_dim / 2,); None where all are 1.

    Llama 3.1 stretches low frequencies, as transformers computes them.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = head_dim_of(config)
    plain = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    return plain / stretched


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a checkpoint, and how it is stored in a GGUF file."""

    source: str
    name: str
    rotary_heads: int | None = None
    """Heads whose rows are reordered to adjacent pairs."""
    offset: float = 0.0
    """Added to each element."""

    def transform(self, tensor: Tensor) -> Tensor:
        """Reorder rows, or add the offset in float32."""
        if self.rotary_heads is not None:
            tensor = with_adjacent_pairs(tensor, self.rotary_heads)
        return tensor.float() + self.offset if self.offset else tensor


def named_tensors(names: list[str], config: PreTrainedConfig, architecture: Architecture) -> list[NamedTensor]:
    """How each tensor of a checkpoint is stored in a GGUF file, in the order of the names.

    Raises:
        ExportError: if llama.cpp has no place for a tensor.
    """
    gguf = import_gguf()
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    places = gguf.get_tensor_name_map(kinds[architecture.name], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    named = []
    for source in names:
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if source.endswith("rotary_emb.inv_freq"):  # older checkpoints store it, though it follows from their config
            continue
        name = places.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(
                f"llama.cpp's {architecture.name} has no place for the tensor {source}, so the model cannot be written as "
                "GGUF. Leave --format out."
            )
        projection = re.search(r"\.self_attn\.([qk]_proj)\.(?:weight|bias)$", source)
        rotary = heads[projection[1]] if projection and architecture.adjacent_pairs else None
        offset = architecture.norm_offset if source.endswith("norm.weight") else 0.0
        named.append(NamedTensor(source, name, rotary, offset))
    return named


def with_adjacent_pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder the rows of each head so that element i and element i + head_dim / 2 are neighbours.

    Args:
        rows: shape (heads * head_dim, ...).
        heads: number of heads.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def import_gguf() -> Any:
    """Import the package gguf.

    Raises:
        MissingPackageError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingPackageError("Writing GGUF requires the package gguf. " + how_to_install("'sbft[gguf]'")) from error
    return gguf
