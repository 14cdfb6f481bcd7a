"""The floating point operations that training requires, counted from a model's shape."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_TRAINED, _FROZEN = 6, 4
_ATTENTION = 12
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def training_flops(model: PreTrainedModel, tokens: float, labels: float) -> float | None:
    """Operations of forward and backward for one example (PaLM, arXiv 2204.02311, appendix B).

    A weight takes 6 operations per token: 2 in the forward pass, 2 for the gradient of its input and 2 for its own
    gradient. A frozen weight (the base of an adapter) has no gradient of its own and takes 4. Attention takes 12 per token,
    position and unit of width over all heads, causal or not. Embeddings take none, and the output head only works at labels.

    Recomputation, logits at unlabelled tokens and the update are not counted: all methods count the same work alike.

    Args:
        model: as prepared for training.
        tokens: in the example.
        labels: tokens in the example that have a label.

    Returns:
        The operations; None for a model with experts or without attention, where the shape does not determine them.
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
    head_flops = 0 if head is None else sum(_module_flops(module) for module in in_head)
    heads = config.num_attention_heads
    width = heads * (shape.get("head_dim") or config.hidden_size // heads)
    attention = _ATTENTION * config.num_hidden_layers * width * tokens
    return (body + attention) * tokens + head_flops * labels


def _module_flops(module: nn.Module) -> int:
    """Operations per token of the matrices that the module itself holds."""
    if isinstance(module, nn.Linear):
        # Not weight.numel(): in 4 bits, one element holds two weights.
        size = module.in_features * module.out_features
        return size * (_TRAINED if module.weight.requires_grad else _FROZEN)
    return sum(
        parameter.numel() * (_TRAINED if parameter.requires_grad else _FROZEN)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() >= 2
    )
