"""The head of a causal language model, and the loss computed from the hidden states in front of it.

The model's own forward runs, through every wrapper around it. A hook in front of the head catches the hidden states for
`linear_cross_entropy` and hands the head an empty tensor, so that no logits are made. The config says what the model does
to its logits (scaling, soft capping). `head_trial` checks once that logits and loss match the model's own.
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

from sbft.data.collate import IGNORED_LABEL
from sbft.errors import ModelError
from sbft.native.device_type import device_type
from sbft.optim.sharding import differentiable_part, is_sharded, shard_of, tensor_parallel_group, whole
from sbft.training.loss.cross_entropy import Receiver, VocabularyPart, linear_cross_entropy
from sbft.training.loss.token_statistics import TokenStatistics
from sbft.training.model_state import pre_hook
from sbft.training.peft_models import learns_a_prompt, unwrap

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule

# Names that configs give to a factor on the logits. `logits_scaling` divides in Granite and multiplies in HyperCLOVA X.
_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")
_SETTINGS = (*_FACTORS, *_SOFTCAPS, "output_router_logits", "is_encoder_decoder")


class UnknownHead(Exception):
    """The model's logits or loss are not those of a plain linear head; the message says in what they differ."""


class NoHead(UnknownHead):
    """The model makes no logits of tokens, so a loss without logits would save nothing."""


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
        """The dtype of products under autocast on the head's device; None where autocast is off now."""
        kind = device_type(self.linear.weight)
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None

    def autocast(self, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
        """Autocast on the head's device with a dtype that `autocast_dtype` returned."""
        return nullcontext() if dtype is None else torch.autocast(device_type(self.linear.weight), dtype)

    def hidden_states(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Run `model` up to this head: (batch, positions, hidden size)."""
        return self._run_to_head(model, inputs)[0]

    def _run_to_head(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, torch.dtype | None]:
        """Hidden states, and the autocast dtype within the model's forward, which accelerate may have wrapped in one."""
        caught: list[tuple[Tensor, torch.dtype | None]] = []

        def hand_few_rows(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            caught.append((args[0], self.autocast_dtype()))
            # No rows; but one for a head that is sharded over ranks, because torch cannot multiply an empty DTensor.
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
        receiver: Receiver | None = None,
    ) -> Tensor:
        """Next-token cross entropy: its sum over the positions with a label, divided by `num_items`.

        Args:
            model: the model, or a wrapper around it.
            inputs: its inputs, with `labels` (batch, positions), `IGNORED_LABEL` where there is none; or with `shift_labels`,
                which are shifted already.
            num_items: for example the labels of a whole accumulated batch; None: the number of positions with a label.
            weight: used in place of the head's weight, and receives its gradient.
            every_position: compute the loss at all positions and mask it, since selecting those with a label waits for the
                device.
            all_labelled: with `every_position`, every position has a label.
            statistics: filled in with the number of correct tokens and the entropy.
            receiver: of the weight's gradient; see `linear_cross_entropy`.

        Raises:
            ModelError: if the number of hidden states differs from the number of labels.
        """
        inputs = dict(inputs)
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        hidden, autocast_dtype = self._run_to_head(model, {**inputs, "use_cache": False})
        if shifted is None:
            assert labels is not None
            shifted, hidden = labels[:, 1:], hidden[:, :-1]
        if hidden.shape[:2] != shifted.shape:
            raise ModelError(
                f"The model makes hidden states of shape {tuple(hidden.shape)} for labels of shape {tuple(shifted.shape)}, so "
                "they cannot be matched. Set logits_free_loss=False for the model's own loss, or remove logits_to_keep from "
                "the batch if it is there."
            )
        shifted = shifted.to(hidden.device)
        rows: Any = shifted != IGNORED_LABEL
        counted = None
        if every_position:
            counted = None if all_labelled else rows.flatten()
            hidden, shifted, rows = hidden.flatten(0, 1), shifted.flatten(), ...
        weight = self.linear.weight if weight is None else weight
        with self.autocast(autocast_dtype):
            return linear_cross_entropy(
                hidden[rows],
                differentiable_part(weight),
                shifted[rows],
                bias=None if self.linear.bias is None else differentiable_part(self.linear.bias),
                num_items=num_items,
                scale=self.scale,
                softcap=self.softcap,
                counted=counted,
                part=vocabulary_part(weight),
                statistics=statistics,
                receiver=receiver,
            )


def vocabulary_part(weight: Tensor) -> VocabularyPart | None:
    """This rank's part of a head whose rows tensor parallelism has sharded; None for a head that is whole here."""
    shard = shard_of(weight)
    if shard is None:
        return None
    group = tensor_parallel_group(weight)

    def gather(message: Tensor) -> Tensor:
        ranks = [torch.empty_like(message) for _ in range(group.size())]
        torch.distributed.all_gather(ranks, message, group=group)
        return torch.stack(ranks, 1)

    return VocabularyPart(shard.offset // weight.shape[1], gather, shard.all_reduce)


def source_of_head(model: nn.Module) -> Hashable:
    """A key of all that decides what `find_head` finds; when it changes, the head has to be looked for again."""
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
        tuple(id(vars(module).get("forward")) for module in (model, base)),
        None if config is None else tuple(vars(config).get(name) for name in _SETTINGS),
    )


def head_candidates(model: nn.Module) -> list[Head]:
    """The heads that the model may have according to its config, the likeliest first. The model is not run.

    Raises:
        UnknownHead: if the config or the classes show that it has no plain linear head.
    """
    if learns_a_prompt(model):
        raise UnknownHead("a prompt that is learned puts positions in front of the labels")
    model = unwrap(model)
    if not isinstance(model, PreTrainedModel):
        raise UnknownHead(f"{type(model).__name__} is not a transformers model")
    linear = model.get_output_embeddings()
    if linear is None:
        raise NoHead("it has no output embedding")
    if model.config.is_encoder_decoder:
        raise UnknownHead("it is an encoder-decoder, which makes the decoder's inputs from the labels")
    kind = type(linear)
    if torch.distributed.is_available() and isinstance(linear, FSDPModule):
        kind = kind.__bases__[1]  # FSDP2 gives the module a class derived from FSDPModule and its own
    if kind is not nn.Linear:
        raise UnknownHead(f"its output embedding is {kind.__name__}, not a plain Linear")
    if model.loss_function is not ForCausalLMLoss:
        raise UnknownHead("its loss is not the usual next-token loss")
    shard = shard_of(linear.weight)
    if shard is not None and shard.columns_split:
        raise UnknownHead("its output head is sharded along its columns")
    config = _text_config(model)
    if config is None:
        raise UnknownHead("its config holds those of several language models")
    settings = config.to_dict()
    if settings.get("output_router_logits"):
        raise UnknownHead("its loss has a term that balances experts (`output_router_logits`)")
    return [Head(linear, scale, _first(settings, _SOFTCAPS)) for scale in _scales(settings)]


def _text_config(model: PreTrainedModel) -> PreTrainedConfig | None:
    """None if the config holds several."""
    try:
        return model.config.get_text_config()
    except ValueError:
        return None


def _scales(settings: dict[str, Any]) -> list[float]:
    factor = _first(settings, _FACTORS)
    return [1.0] if factor is None else [factor, 1.0 / factor, 1.0]


def _first(settings: dict[str, Any], names: tuple[str, ...]) -> float | None:
    return next((float(settings[name]) for name in names if settings.get(name) is not None), None)
