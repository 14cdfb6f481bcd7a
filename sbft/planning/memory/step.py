"""One training step on the meta device: what `SmallBatchTrainer` would allocate, phase by phase."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel

from sbft.grid.buffer import planned_buffer
from sbft.native.device_type import standing_for
from sbft.planning.memory.attention import attention_on
from sbft.planning.memory.optimizers import PlannedOptimizer
from sbft.planning.memory.skeleton import layers_of, skeleton
from sbft.planning.memory.trace import BUILD, AllocationTrace, Phase
from sbft.planning.memory.vocabulary import PlannedVocabulary
from sbft.recipe import Recipe
from sbft.training.loss.cross_entropy import Receiver, linear_cross_entropy
from sbft.training.loss.head import Head, UnknownHead, head_candidates
from sbft.training.peft_models import unwrap

_usual_autocast = torch.autocast

FORWARD: Phase = ("forward", None)
LOSS: Phase = ("loss", None)
BACKWARD: Phase = ("backward", None)
LOSS_BACKWARD: Phase = ("backward of the loss", None)
UPDATE: Phase = ("update", None)


@dataclass(frozen=True)
class StepShape:
    """The shape of a forward pass's input."""

    batch_size: int
    tokens: int
    """Length of each row, padding included."""
    labelled: int
    """Positions with a label, in all rows together."""
    padded: bool
    """Whether there is padding, which requires an attention mask."""


@dataclass(frozen=True)
class TracedStep:
    """The memory of a step that is not the first."""

    phases: dict[Phase, Counter[str]]
    """Bytes of each kind at each phase's peak: "weights", "gradients", "optimizer_state", "activations", "logits",
    "workspace". A phase of backward has its layer's number, and begins when the layer's first gradient is complete."""
    heap_bytes: int | None
    """On a CPU, the peak resident bytes of the heap beside the model."""
    products: int
    """On a CPU, the number of different shapes of bfloat16 matrix products that depend on the batch's length. Layers that are
    alike add none, so this does not depend on whether all layers are traced."""
    head_products: int
    """The same for products that depend on the number of labels."""


def trace_step(
    recipe: Recipe, config: PreTrainedConfig, shape: StepShape, device: str, *, checkpointing: bool
) -> TracedStep:
    """Trace the memory of a step that is not the first, on the meta device.

    Args:
        recipe: resolved.
        config: of its model.
        shape: of the batch.
        device: type of device that it would run on, which this machine need not have.
        checkpointing: whether activations are recomputed in backward.
    """
    model = skeleton(recipe, config)
    if checkpointing:
        # transformers' newer name first: the older one warns.
        newer = getattr(model, "activation_checkpointing_enable", None)
        (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        if recipe.lora is not None:
            model.enable_input_require_grads()
    with (
        standing_for(device),
        _replaced(shape, device),
        torch.device("meta"),
        AllocationTrace(device) as trace,
        planned_buffer() as buffer,
    ):
        return _Simulation(model.train(), recipe, shape, device, trace, buffer).run()


class _Simulation:
    def __init__(
        self,
        model: PreTrainedModel,
        recipe: Recipe,
        shape: StepShape,
        device: str,
        trace: AllocationTrace,
        buffer: list[Tensor],
    ) -> None:
        self.model, self.recipe, self.shape, self.device, self.trace = model, recipe, shape, device, trace
        self.buffer = buffer
        self.releases = bool(recipe.optimizer.gradient_release)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = PlannedOptimizer(recipe, model, device)

    def run(self) -> TracedStep:
        trace = self.trace
        trace.label([*self.model.parameters(), *self.model.buffers()], "weights")
        if trace.heap is None:
            for parameter in self.trainable:
                trace.label(self.optimizer.make_state(parameter), "optimizer_state")
        self._hook_parameters()
        head = self._head()
        vocabulary = PlannedVocabulary(self.recipe, self.model, head, self.optimizer, trace, self.device)
        begin = 0
        # The heap still has the gaps that the first step left.
        for _ in range(1 if trace.heap is None else 2):
            begin = trace.events
            self._step(head, vocabulary)
        phases = trace.peaks(begin)
        phases.pop(BUILD, None)
        head_products = sum(phase in (LOSS[0], LOSS_BACKWARD[0]) for phase in trace.products.values())
        heap_bytes = None if trace.heap is None else trace.heap.peak_bytes
        return TracedStep(phases, heap_bytes, len(trace.products) - head_products, head_products)

    def _step(self, head: Head | None, vocabulary: PlannedVocabulary) -> None:
        passes = 1 if self.recipe.training["gradient_accumulation_steps"] == 1 else 2
        with vocabulary.step() as head_weight:
            for _ in range(passes):
                self._forward_and_backward(head, head_weight, vocabulary.receiver)
        self.trace.phase = UPDATE
        if not self.releases:
            for parameter in self.trainable:
                self.trace.label(self.optimizer.make_state(parameter), "optimizer_state")
            self.optimizer.update(self.trace)
        for parameter in self.trainable:
            parameter.grad = None

    def _head(self) -> Head | None:
        """The head as the trainer finds it, without the trial, which needs values."""
        if self.recipe.optimizer.logits_free_loss is False:
            return None
        try:
            return head_candidates(self.model)[0]
        except UnknownHead:
            return None

    def _hook_parameters(self) -> None:
        layer_of = layers_of(self.model)

        def complete(parameter: Tensor, layer: int | None) -> None:
            grad = parameter.grad
            if grad is None:  # it was handed over in slices
                return
            self.trace.label([grad], "gradients")
            if layer is not None:
                self.trace.phase = ("backward", layer)
            if self.releases:
                self.trace.label(self.optimizer.make_state(parameter), "optimizer_state")
                self.optimizer.update_one(parameter, self.trace)
                parameter.grad = None

        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                layer = layer_of.get(name)
                parameter.register_post_accumulate_grad_hook(lambda p, layer=layer: complete(p, layer))

    def _forward_and_backward(self, head: Head | None, head_weight: Tensor | None, receiver: Receiver | None) -> None:
        trace, shape = self.trace, self.shape
        size = (shape.batch_size, shape.tokens)
        trace.phase = FORWARD
        begin = trace.count
        inputs = {name: torch.zeros(size, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
        labels = torch.zeros(size, dtype=torch.int64)
        trace.answer = 0 if shape.padded else 1  # for code that asks whether the mask is all ones
        items = torch.tensor(shape.labelled)
        if head is None:
            loss = self._model_loss({**inputs, "labels": labels, "num_items_in_batch": items}, begin)
        else:
            assert head_weight is not None
            hidden = head.hidden_states(self.model, {**inputs, "use_cache": False})
            self._label_activations(begin)
            trace.phase = LOSS
            rows = torch.zeros(shape.labelled, dtype=torch.int64)
            labelled = hidden[:, :-1][rows, rows]
            _at_gradient(labelled, trace)
            loss = linear_cross_entropy(
                labelled,
                head_weight,
                rows,
                bias=head.linear.bias,
                num_items=items,
                scale=head.scale,
                softcap=head.softcap,
                receiver=receiver,
            )
            del hidden, labelled
        trace.label_born_in(LOSS, "logits")
        trace.phase = LOSS_BACKWARD
        loss.backward()
        trace.label_born_in(LOSS_BACKWARD, "logits")

    def _label_activations(self, begin: int) -> None:
        """Label what the forward pass leaves as activations, except the buffer of weights on a grid."""
        self.trace.label(self.buffer, "workspace")
        self.trace.label_unknown("activations", since=begin)

    def _model_loss(self, inputs: dict[str, Any], begin: int) -> Tensor:
        base: Any = unwrap(self.model)
        trace = self.trace

        def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._label_activations(begin)
            _at_gradient(args[0], trace)
            trace.phase = LOSS

        handle = base.get_output_embeddings().register_forward_pre_hook(enter)
        loss: Tensor = self.model(**inputs).loss
        handle.remove()
        return loss


def _at_gradient(hidden: Tensor, trace: AllocationTrace) -> None:
    """Switch to the phase "backward" when the gradient of the head's input is complete."""

    def left(grad: Tensor) -> None:
        trace.phase = BACKWARD

    hidden.register_hook(left)


@contextlib.contextmanager
def _replaced(shape: StepShape, device: str) -> Iterator[None]:
    """Replace functions that require a real device.

    A mode of torch would not do: it is off in backward, where checkpointing recomputes attention.
    """
    with (
        mock.patch.object(functional, "scaled_dot_product_attention", attention_on(device, shape.tokens)),
        mock.patch.object(torch, "autocast", _autocast),
    ):
        yield


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[Any]:
    """Autocast that does nothing on the meta device, which has none; PEFT switches it off there."""
    return contextlib.nullcontext() if device_type == "meta" else _usual_autocast(device_type, *args, **kwargs)
