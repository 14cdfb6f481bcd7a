"""The floating point operations that training needs, counted from a model's shape."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_TRAINED, _FROZEN = 6, 4
_ATTENTION = 12
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def training_flops(model: PreTrainedModel, tokens: float, labels: float) -> float | None:
    """Operations that forward and backward of one example need (PaLM, arXiv 2204.02311, appendix B).

    A weight takes 6 for each token: 2 in the forward pass, 2 for the gradient of its input and 2 for its own, which a
    frozen one (the base of an adapter) does not have: 4. Attention takes 12 for each token, position of the example and
    unit of all heads' width, causal or not. Embeddings are looked up, the output head works at labels alone. What a
    method does beyond (recomputation, logits of all tokens, the update) is not counted, so that the same work is the
    same number.

    Args:
        model: as prepared for training.
        tokens: in the example.
        labels: tokens of it that are learned.

    Returns:
        The operations; None for a model of experts, or without attention, whose work the shape does not tell.
    """
    config = model.config.get_text_config()
    shape = config.to_dict()
    if any(shape.get(name) for name in _EXPERTS) or not hasattr(config, "num_attention_heads"):
        return None
    head = model.get_output_embeddings()
    in_head = set() if head is None else set(head.modules())
    body = sum(
        _module_flops(module)
        for module in model.modules()
        if module not in in_head and not isinstance(module, nn.Embedding)
    )
    of_head = 0 if head is None else sum(_module_flops(module) for module in in_head)
    heads = config.num_attention_heads
    width = heads * (shape.get("head_dim") or config.hidden_size // heads)
    attention = _ATTENTION * config.num_hidden_layers * width * tokens
    return (body + attention) * tokens + of_head * labels


def _module_flops(module: nn.Module) -> int:
    """Of the matrices that the module itself holds, for each token."""
    if isinstance(module, nn.Linear):
        # Not the weight's elements: in 4 bits, two of them are one.
        size = module.in_features * module.out_features
        return size * (_TRAINED if module.weight.requires_grad else _FROZEN)
    return sum(
        parameter.numel() * (_TRAINED if parameter.requires_grad else _FROZEN)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() >= 2
    )
