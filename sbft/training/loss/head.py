"""Which part of a causal language model is its head, so that the loss can be taken from hidden states alone.

The model's own forward runs, through every wrapper around it, up to the head, which is handed no rows; the hidden
states it would have been given go to `linear_cross_entropy`. What a model does to its logits (scaling, soft capping) is
read from its config. Then logits and loss are checked once against the model's own, so that an unknown architecture is
found out and not mistrained.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import is_peft_available

from sbft.errors import ModelError
from sbft.native.device_type import device_type
from sbft.optim.sharding import differentiable_part, is_sharded, shard_of, tensor_parallel_group, whole
from sbft.training.loss.cross_entropy import VocabularyPart, linear_cross_entropy
from sbft.training.loss.head_trial import (
    Otherwise,
    check_loss,
    head_that_makes_the_logits,
    pre_hook,
    small_part,
    trial_batch,
)
from sbft.training.loss.token_statistics import TokenStatistics

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule

# Where configs keep a factor on the logits. `logits_scaling` divides in Granite and multiplies in HyperCLOVA X.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_SETTINGS = (*_FACTORS, *_SOFTCAPS, "output_router_logits", "is_encoder_decoder")


class UnknownHead(Exception):
    """A model's logits or its loss come about in a way that is not understood; the message says which."""


class NoHead(UnknownHead):
    """A model makes no logits of tokens, so that a loss without them would save nothing."""


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

    def autocast_dtype(self) -> torch.dtype | None:
        """What autocast makes of products at this moment, where the head is; None without it."""
        kind = device_type(self.linear.weight)
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def autocast(self, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
        """Autocast as it was where `autocast_dtype` gave `dtype`."""
        return nullcontext() if dtype is None else torch.autocast(device_type(self.linear.weight), dtype)

    def hidden_states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Runs `model`, which holds this head, up to it: (batch, positions, hidden size)."""
        return self._reach(model, inputs)[0]

    def _reach(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, torch.dtype | None]:
        """Hidden states, and the autocast dtype within the model's forward, around which accelerate may have put one."""
        caught: list[tuple[Tensor, torch.dtype | None]] = []

        def hand_few_rows(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append((args[0], self.autocast_dtype()))
            # None, but for a head that is spread over ranks, where torch cannot multiply nothing.
            return (args[0][:, : int(is_sharded(self.linear.weight))],)

        with pre_hook(self.linear, hand_few_rows):
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
        statistics: TokenStatistics | None = None,
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
            statistics: is told how many tokens were right, and how sure the model was.

        Raises:
            ModelError: if the model makes more or fewer hidden states than there are labels.
        """
        inputs = dict(inputs)
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        hidden, autocast_dtype = self._reach(model, {**inputs, "use_cache": False})
        if shifted is None:
            assert labels is not None
            shifted, hidden = labels[:, 1:], hidden[:, :-1]
        if hidden.shape[:2] != shifted.shape:
            raise ModelError(
                f"The model makes hidden states of shape {tuple(hidden.shape)} for next tokens of shape "
                f"{tuple(shifted.shape)}, so that they cannot be told which belongs to which. Set logits_free_loss=False for "
                "the model's own loss, or look whether the batch holds logits_to_keep."
            )
        shifted = shifted.to(hidden.device)
        chosen: Any = shifted != -100
        counted = None
        if every_position:
            counted = None if all_labelled else chosen.flatten()
            hidden, shifted, chosen = hidden.flatten(0, 1), shifted.flatten(), ...
        weight = self.linear.weight if weight is None else weight
        with self.autocast(autocast_dtype):
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
                statistics=statistics,
            )


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model; any other model as it is."""
    if not is_peft_available():
        return model
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def learns_a_prompt(model: nn.Module) -> bool:
    """Whether a PEFT method puts positions of its own in front of the inputs."""
    config = _peft_config(model)
    return config is not None and bool(config.is_prompt_learning)


def learns_keys(model: nn.Module) -> bool:
    """Whether that method puts them into the cache of keys and values, as prefix tuning does."""
    config = _peft_config(model)
    return config is not None and config.peft_type == "PREFIX_TUNING"


def _peft_config(model: nn.Module) -> Any:
    if not is_peft_available():
        return None
    from peft import PeftModel

    return model.active_peft_config if isinstance(model, PeftModel) else None


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


def find_head(model: nn.Module, *, with_num_items: bool = False) -> Head:
    """The head of a causal language model, or of the one inside a PEFT model; runs the model three times on a few tokens.

    Args:
        model: in any mode, which it keeps.
        with_num_items: whether the model is told `num_items_in_batch`, the labels that its loss is divided by.

    Raises:
        UnknownHead: if the model's logits or its loss are not those of a plain linear head.
    """
    heads = head_candidates(model)
    base: Any = unwrap(model)
    try:
        batch = trial_batch(base, heads[0])
        head = head_that_makes_the_logits(model, heads, batch["input_ids"][:1])
        check_loss(model, head, batch, with_num_items=with_num_items)
    except Otherwise as reason:
        raise UnknownHead(str(reason)) from reason
    return head


def check_batch(model: nn.Module, head: Head, batch: dict[str, Any], *, with_num_items: bool) -> None:
    """Tries a small part of a batch that holds what a trial batch does not, such as weights of its tokens.

    Raises:
        UnknownHead: if the model makes another loss of it than its head does.
    """
    base: Any = unwrap(model)
    try:
        part = small_part(batch, trial_batch(base, head)["labels"])
        check_loss(model, head, part, with_num_items=with_num_items)
    except Otherwise as reason:
        raise UnknownHead(str(reason)) from reason


def source_of_head(model: nn.Module) -> Hashable:
    """What a head was made of: another value says that it has to be sought again."""
    base: Any = unwrap(model)
    if not isinstance(base, PreTrainedModel):
        return weakref.ref(base)
    linear: Any = base.get_output_embeddings()
    config = _text_config(base)
    return (
        weakref.ref(model),
        None if linear is None else (weakref.ref(linear), type(linear), tuple(linear._forward_hooks)),
        tuple(linear.weight.shape) if isinstance(linear, nn.Linear) else None,
        learns_a_prompt(model),
        base.loss_function,
        tuple(id(vars(one).get("forward")) for one in (model, base)),
        None if config is None else tuple(vars(config).get(name) for name in _SETTINGS),
    )


def head_candidates(model: nn.Module) -> list[Head]:
    """What the head may be by the model's config, the likeliest first; nothing is run.

    Raises:
        UnknownHead: as `find_head`, as far as it shows without running the model.
    """
    if learns_a_prompt(model):
        raise UnknownHead("a prompt that is learned puts positions in front of the labels")
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise UnknownHead(f"{type(model).__name__} is no transformers model")
    linear = model.get_output_embeddings()
    if linear is None:
        raise NoHead("it has no output embedding")
    if model.config.is_encoder_decoder:
        raise UnknownHead("it is an encoder-decoder, and makes the decoder's inputs of its labels")
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
    config = _text_config(model)
    if config is None:
        raise UnknownHead("its config holds those of several language models")
    settings = config.to_dict()
    if settings.get("output_router_logits"):
        raise UnknownHead("its loss has a part for the balance of experts (`output_router_logits`)")
    return [Head(linear, scale, _first(settings, _SOFTCAPS)) for scale in _scales(settings)]


def _text_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """None where transformers cannot tell which of several is meant."""
    try:
        return model.config.get_text_config()
    except ValueError:
        return None


def _scales(settings: dict[str, Any]) -> list[float]:
    factor = _first(settings, _FACTORS)
    return [1.0] if factor is None else [factor, 1.0 / factor, 1.0]


def _first(settings: dict[str, Any], names: tuple[str, ...]) -> float | None:
    return next((float(settings[name]) for name in names if settings.get(name) is not None), None)
