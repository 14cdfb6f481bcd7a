"""Which part of a causal language model is its head, so that the loss can be taken from hidden states alone.

The model's own forward runs, through every wrapper around it, up to the head, which is handed no rows; the hidden
states it would have been given go to `linear_cross_entropy`. What a model does to its logits (scaling, soft capping) is
read from its config and then checked once against the model itself, so that an unknown architecture is found out and
not mistrained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import is_peft_available

from sbft.likelihood import evaluating
from sbft.optim.sharding import differentiable_part, is_sharded, shard_of, tensor_parallel_group, whole
from sbft.training.loss import VocabularyPart, linear_cross_entropy

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule

# Where configs keep a factor on the logits. `logits_scaling` divides in Granite and multiplies in HyperCLOVA X.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


class UnknownHead(Exception):
    """A model's logits come about in a way that is not understood; the message says which."""


@dataclass(frozen=True)
class Head:
    """A linear head and what follows it: logits are `softcap(scale * (hidden @ weight.T + bias))`."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of `hidden` (..., hidden size) in float32, (..., vocabulary)."""
        bias = None if self.linear.bias is None else whole(self.linear.bias)
        logits = F.linear(hidden, whole(self.linear.weight), bias).float() * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def hidden_states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Runs `model`, which holds this head, up to it: (batch, positions, hidden size)."""
        caught: list[Tensor] = []

        def hand_few_rows(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append(args[0])
            # None, but for a head that is spread over ranks, where torch cannot multiply nothing.
            return (args[0][:, : int(is_sharded(self.linear.weight))],)

        with _pre_hook(self.linear, hand_few_rows):
            model(**inputs)
        return caught[0]

    def loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items: Tensor | float | None = None,
        *,
        weight: Tensor | None = None,
        every_position: bool = False,
        all_labelled: bool = False,
    ) -> Tensor:
        """Next-token cross entropy, summed over the positions with a label, over `num_items` (default: their number).

        Args:
            model: the model, or a wrapper around it.
            inputs: its inputs with `labels` (batch, positions), -100 where there is none, or `shift_labels`, shifted
                already.
            num_items: labels that the sum is divided by, for example those of a whole accumulated batch.
            weight: stands in for the head's weight, and receives its gradient.
            every_position: the logits of all are made, so that those with a label need not be looked for, which would wait for
                the device.
            all_labelled: with `every_position`, none is without a label.
        """
        inputs = dict(inputs)
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        hidden = self.hidden_states(model, {**inputs, "use_cache": False})
        if shifted is None:
            assert labels is not None
            shifted, hidden = labels[:, 1:], hidden[:, :-1]
        shifted = shifted.to(hidden.device)
        chosen: Any = shifted != -100
        counted = None
        if every_position:
            counted = None if all_labelled else chosen.flatten()
            hidden, shifted, chosen = hidden.flatten(0, 1), shifted.flatten(), ...
        weight = self.linear.weight if weight is None else weight
        return linear_cross_entropy(
            hidden[chosen],
            differentiable_part(weight),
            shifted[chosen],
            bias=None if self.linear.bias is None else differentiable_part(self.linear.bias),
            num_items=num_items,
            scale=self.scale,
            softcap=self.softcap,
            counted=counted,
            part=vocabulary_part(weight),
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model as it is.

    Raises:
        UnknownHead: if the PEFT method puts positions in front of the inputs.
    """
    if not is_peft_available():
        return model
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise UnknownHead("prompt learning puts positions in front of the labels")
    return model.get_base_model()


def vocabulary_part(weight: Tensor) -> VocabularyPart | None:
    """What a head's weight is of the whole where tensor parallelism has spread its rows over ranks; None if it is whole."""
    shard = shard_of(weight)
    if shard is None:
        return None
    group = tensor_parallel_group(weight)

    def gather(message: Tensor) -> Tensor:
        ranks = [torch.empty_like(message) for _ in range(group.size())]
        torch.distributed.all_gather(ranks, message, group=group)
        return torch.stack(ranks, 1)

    return VocabularyPart(shard.offset // weight.shape[1], gather, shard.all_reduce)


def find_head(model: nn.Module) -> Head:
    """The head of a causal language model, or of the one inside a PEFT model; runs the model once on two tokens.

    Raises:
        UnknownHead: if the model's logits or its loss are not those of a plain linear head.
    """
    return _verified(unwrap(model), head_candidates(model))


def head_candidates(model: nn.Module) -> list[Head]:
    """What the head may be by the model's config, the likeliest first; nothing is run.

    Raises:
        UnknownHead: as `find_head`, as far as it shows without running the model.
    """
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise UnknownHead(f"{type(model).__name__} is no transformers model")
    linear = model.get_output_embeddings()
    kind = type(linear)
    if torch.distributed.is_available() and isinstance(linear, FSDPModule):
        kind = kind.__bases__[1]  # FSDP2 makes a class of its own class and the module's
    if kind is not nn.Linear:
        raise UnknownHead(f"its output embedding is {kind.__name__}, not a plain Linear")
    if model.loss_function is not ForCausalLMLoss:
        raise UnknownHead("its loss is not the usual next-token loss")
    shard = shard_of(linear.weight)
    if shard is not None and shard.columns_split:
        raise UnknownHead("its output head is cut along its columns")
    settings = model.config.get_text_config().to_dict()
    if settings.get("output_router_logits"):
        raise UnknownHead("its loss has a part for the balance of experts (`output_router_logits`)")
    return [Head(linear, scale, _first(settings, _SOFTCAPS)) for scale in _scales(settings)]


def _scales(settings: dict[str, Any]) -> list[float]:
    factor = _first(settings, _FACTORS)
    return [1.0] if factor is None else [factor, 1.0 / factor, 1.0]


def _first(settings: dict[str, Any], names: tuple[str, ...]) -> float | None:
    return next((float(settings[name]) for name in names if settings.get(name) is not None), None)


@torch.no_grad()
def _verified(model: Any, heads: list[Head]) -> Head:
    """The one of `heads` that makes of large random hidden states the logits which the model itself makes of them."""
    linear = heads[0].linear
    generator = torch.Generator().manual_seed(0)
    weight = whole(linear.weight)
    probe = torch.randn(2, linear.in_features, generator=generator).to(weight)
    # Raw logits of 60 and more: a soft cap or a factor that was overlooked shows.
    probe = probe * (60.0 / F.linear(probe, weight).float().std().clamp(min=1e-6)).to(probe)
    ids = torch.tensor([[0, 1]], device=model.device)
    with evaluating(model), _pre_hook(linear, lambda module, args: (probe.unsqueeze(0),)):
        found = model(input_ids=ids, use_cache=False).logits
    shard_again(model)
    for head in heads:
        expected = head.logits(probe.unsqueeze(0))
        if found.shape == expected.shape and _close(found.float(), expected, linear.weight.dtype):
            return head
    raise UnknownHead("its logits are not those of its head, scaled and capped as its config says")


def shard_again(model: nn.Module) -> None:
    """After a forward that no backward follows FSDP2 keeps some weights whole, in the place of the sharded ones."""
    if torch.distributed.is_available():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    # Up to four roundings in `dtype` (product, factor, cap, tanh), of numbers up to the largest logit.
    tolerance = 4 * torch.finfo(dtype).eps * expected.abs().max()
    return bool((found - expected).abs().max() <= tolerance)


@contextmanager
def _pre_hook(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
