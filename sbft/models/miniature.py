"""Small models of a given class, to test without its weights how its code handles positions and packed rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

_LAYERS, _VOCABULARY = 4, 64
_HEADS, _HEAD_SIZE = 4, 16
_WIDTH = _HEADS * _HEAD_SIZE
# Largest value of each setting in a miniature. Smaller values, and settings that a config lacks, stay as they are.
_SMALL: dict[str, int] = {
    "hidden_size": _WIDTH, "num_attention_heads": _HEADS, "head_dim": _HEAD_SIZE, "intermediate_size": 2 * _WIDTH,
    "ffn_dim": 2 * _WIDTH, "word_embed_proj_dim": _WIDTH, "n_inner": 2 * _WIDTH, "embedding_size": _WIDTH,
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 2 * _WIDTH, "shared_expert_intermediate_size": 2 * _WIDTH,
    "q_lora_rank": _HEAD_SIZE, "kv_lora_rank": _HEAD_SIZE, "qk_rope_head_dim": _HEAD_SIZE, "rotary_dim": _HEAD_SIZE,
    "qk_nope_head_dim": _HEAD_SIZE, "v_head_dim": _HEAD_SIZE, "mamba_d_state": _HEAD_SIZE, "state_size": _HEAD_SIZE,
    "linear_num_value_heads": _HEADS, "linear_num_key_heads": _HEADS, "linear_key_head_dim": _HEAD_SIZE,
    "vocab_size_per_layer_input": _VOCABULARY, "hidden_size_per_layer_input": _HEAD_SIZE, "laurel_rank": _HEAD_SIZE,
    "num_kv_shared_layers": 0, "linear_value_head_dim": _HEAD_SIZE, "lru_width": _WIDTH, "attention_hidden_size": _WIDTH,
}  # fmt: skip
# Most parameters of a miniature whose widths cannot be reduced.
_MOST_PARAMETERS = 100_000_000


class NoMiniature(Exception):
    """A class of models that no miniature can be made of; the message says why."""


def miniatures(
    config: PreTrainedConfig, *, trust_remote_code: bool = False, **settings: Any
) -> Iterator[PreTrainedModel]:
    """Models of a config's class with few layers, a small vocabulary and random weights, the smallest first.

    Args:
        config: the model's config, which is not changed.
        trust_remote_code: run the Python code that comes with the checkpoint.
        **settings: further settings of its text config.

    Raises:
        NoMiniature: after the last one, or if none can be made.
    """
    reason = "it would be too large"
    for narrow in (True, False):
        try:
            small = _small(config, narrow, settings)
            with torch.device("meta"):
                size = AutoModelForCausalLM.from_config(small, trust_remote_code=trust_remote_code).num_parameters()
            if size > _MOST_PARAMETERS:
                continue
            made = _made(small, trust_remote_code)
        except Exception as error:  # of the config's and the model's own code
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        yield made
    raise NoMiniature(f"no small {config.model_type} can be made ({reason})")


def _made(config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        for parameter in model.parameters():  # zeros would hide the effect of later layers
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def _small(config: PreTrainedConfig, narrow: bool, settings: dict[str, Any]) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    for part in _parts(small):
        _cut_layers(part)
        if narrow:
            _narrow(part)
    text = small.get_text_config()
    for name, value in {"vocab_size": _VOCABULARY, **settings}.items():
        if _value(text, name) is not None:
            _set(text, name, value)
    for part in _parts(small):
        for name, value in list(vars(part).items()):
            too_large = isinstance(value, list) or (isinstance(value, int) and value >= _VOCABULARY)
            if name.endswith(("_token_id", "_token_index")) and too_large:
                _set(part, name, _VOCABULARY - 1)
    return small


def _parts(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    inner = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return [config, *(part for each in inner for part in _parts(each))]


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A setting by its usual name; None if the config lacks it.

    It is read from `vars`, because a config refuses to return a setting that differs between layers.
    """
    return vars(config).get(type(config).attribute_map.get(name, name))


def _set(config: PreTrainedConfig, name: str, value: Any) -> None:
    vars(config)[type(config).attribute_map.get(name, name)] = value


def _cut_layers(config: PreTrainedConfig) -> None:
    """Keep the first layers, enough that each kind is among them if the config lists kinds."""
    count = _value(config, "num_hidden_layers")
    if not isinstance(count, int):
        return
    listed = {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, (list, tuple)) and len(value) == count
    }
    firsts = [values.index(value) for values in listed.values() for value in values if isinstance(value, str)]
    kept = min(count, max([_LAYERS, *(1 + first for first in firsts)]))
    for name, values in listed.items():
        _set(config, name, values[:kept])
    _set(config, "num_hidden_layers", kept)


def _narrow(config: PreTrainedConfig) -> None:
    heads, groups = _value(config, "num_attention_heads"), _value(config, "num_key_value_heads")
    for name, most in _SMALL.items():
        value = _value(config, name)
        if isinstance(value, list) and all(isinstance(size, int) for size in value):
            _set(config, name, [min(size, most) for size in value])
        if isinstance(value, int) and not isinstance(value, bool) and value > most:
            _set(config, name, most)
    if isinstance(heads, int) and isinstance(groups, int):
        few = _value(config, "num_attention_heads")
        _set(config, "num_key_value_heads", 1 if groups == 1 else few if groups == heads else few // 2)
    expand = _value(config, "mamba_expand") or _value(config, "expand")
    if expand:
        inner = int(expand * _value(config, "hidden_size"))
        if _value(config, "mamba_d_ssm"):
            _set(config, "mamba_d_ssm", inner)
        for number, size in (("mamba_n_heads", "mamba_d_head"), ("num_heads", "head_dim")):
            if _value(config, number) and _value(config, size):
                _set(config, number, inner // _HEAD_SIZE)
                _set(config, size, _HEAD_SIZE)
