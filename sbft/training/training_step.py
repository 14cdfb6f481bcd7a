"""A training step: tokens and labels are counted, and a loss that is not finite reaches no weight."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sbft.errors import TrainingError
from sbft.optim.base import TokenOptimizer
from sbft.training.batches.batch_counts import labels_of
from sbft.training.batches.packing_probe import PackedBatches
from sbft.training.generation_config import generator_of
from sbft.training.graphs.cuda_graph import GraphedSteps
from sbft.training.plain_attention import fast_attention
from sbft.training.watch.labels import LabelWatch
from sbft.training.watch.training_watch import TrainingWatch

# The name of the counters among the callbacks' states in a checkpoint.
_COUNTERS = "SmallBatchMixin"


class _NonFiniteLoss(Exception):
    """Leaves a training step before its backward; carries the loss."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class FiniteLoss(Tensor):
    """A loss that is known to be finite: `torch.isnan` and `torch.isinf` answer without waiting for the device.

    `Trainer`'s loop calls them after every backward. Only that loop receives this class; other code gets plain tensors.
    """

    @classmethod
    def of(cls, loss: Tensor) -> FiniteLoss:
        """The same loss, detached."""
        return loss.detach().as_subclass(cls)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.isnan, torch.isinf):
            return torch.zeros((), dtype=torch.bool, device="cpu")
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TrainingStep(_Base):
    """Put before `LogitsFreeLoss`: runs, counts and times the steps, and skips those whose loss is not finite."""

    args: Any
    model: Any
    _is_overridden: Callable[[str], bool]
    _token_optimizer: TokenOptimizer | None
    _graphed: GraphedSteps | None
    _graphed_forward: Callable[..., Tensor | None]
    _count_step: Callable[[list[Any]], None]
    _agree_on_replicated: Callable[[], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.tokens_seen = 0
        self.skipped_steps = 0
        self.tokens_of_this_session = 0
        self._skipped_in_a_row = 0
        self._skip_this_step = False
        self._in_training_step = False
        self._is_known_finite = False
        self._step_tokens = 0
        self._step_began = 0.0
        self._optimizer_time = 0.0
        self._parameters_for_flos: int | None = None
        self._watch = TrainingWatch()
        self._labels = LabelWatch()
        self._packed = PackedBatches()
        super().__init__(*args, **kwargs)

    # Counting

    def _reset_counters(self) -> None:
        self.step_seconds.clear()
        self.optimizer_seconds.clear()
        self.tokens_seen = self.skipped_steps = self._skipped_in_a_row = self.tokens_of_this_session = 0

    def _resume_counters(self) -> None:
        """Continue from the counters in a checkpoint; one that another trainer has saved may have an optimizer's."""
        saved, optimizer = self.counted_in(self.state), self._token_optimizer
        if saved is not None:
            self.tokens_seen, self.skipped_steps = saved
        elif optimizer is not None:
            self.tokens_seen, self.skipped_steps = optimizer.tokens_seen, optimizer.skipped_steps

    @staticmethod
    def counted_in(state: TrainerState) -> tuple[int, int] | None:
        """Tokens seen and steps skipped up to a saved state; None if another trainer saved it."""
        saved = _saved_states(state).get(_COUNTERS)
        return None if saved is None else (saved["attributes"]["tokens_seen"], saved["attributes"]["skipped_steps"])

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; counts the tokens of the coming step, since the optimizer needs them before backward."""
        self._step_began = time.perf_counter()
        self._optimizer_time = 0.0
        self._skip_this_step = False
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches:
            self._count_step(batches)
            self._count_labels(batches)
        return batches, num_items

    def _count_labels(self, batches: list[Any]) -> None:
        """Count the labels of the coming step, all ranks together."""
        labels = labels_of(batches, of_next=generator_of(self.model) is not None)
        if self.accelerator.num_processes > 1:
            counted = torch.tensor(1 if labels is None else labels, device=self.args.device)
            labels = int(self.accelerator.gather(counted).sum())
        self._labels.add_step(labels)

    # Forward and backward

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer`; if the loss is not finite, backward does not run and the whole step is skipped."""
        self._in_training_step, self._is_known_finite = True, False
        self._packed.look(self.model, inputs)
        try:
            graphable = self._graphed is not None and isinstance(inputs, Mapping)
            graphed = self._graphed_step(model, inputs, *args, **kwargs) if graphable else None
            with fast_attention(inputs):
                loss: Tensor = super().training_step(model, inputs, *args, **kwargs) if graphed is None else graphed
        except _NonFiniteLoss as error:
            self._skip_this_step = True
            loss = error.loss.detach()
        finally:
            self._in_training_step = False
        self._watch.add_loss(loss, self._step_tokens)
        return FiniteLoss.of(loss) if self._is_known_finite and self._only_the_loop_sees_the_loss else loss

    def _graphed_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor | None:
        """The loss of a step that runs as a CUDA graph; None if the batch does not fit into one."""
        loss = self._graphed_forward(model, inputs, *args, **kwargs)
        if loss is None:
            return None
        assert self._graphed is not None
        if not self._all_finite(loss):
            self._graphed.leave_out()
            raise _NonFiniteLoss(loss)
        self._graphed.backward()
        return loss

    @property
    def _only_the_loop_sees_the_loss(self) -> bool:
        """Whether no subclass receives what `training_step` returns, or replaces the loss that was checked."""
        return not self._is_overridden("training_step") and not self._is_overridden("compute_loss")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in `LogitsFreeLoss`; ends a training step whose loss is not finite."""
        result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if self._in_training_step and not self._all_finite(loss):
            raise _NonFiniteLoss(loss)
        return result

    def _all_finite(self, loss: Tensor) -> bool:
        """Whether the loss is finite on all ranks, which have to take the same way."""
        finite = torch.isfinite(loss.detach()).all()
        if self.accelerator.num_processes > 1:
            finite = self.accelerator.gather(finite.reshape(1)).all()
        self._is_known_finite = bool(finite)
        return self._is_known_finite

    # The update

    def _before_update(self) -> None:
        if self._skip_this_step:
            self._watch.leave_step_out()
            self.model.zero_grad()  # gradients of earlier micro-batches of this step
            self.accelerator.gradient_state._set_sync_gradients(False)  # accelerate's wrapper then makes no step
            optimizer = self._token_optimizer
            if optimizer is not None:
                optimizer.skip_step()
        else:
            self._update_begins()
            self._agree_on_replicated()

    def _after_update(self) -> None:
        if not self._skip_this_step:
            self._update_ends()
            self._skipped_in_a_row = 0
            self.tokens_seen += self._step_tokens
            self.tokens_of_this_session += self._step_tokens
            return
        self.accelerator.gradient_state._set_sync_gradients(True)
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self.args.max_skipped_steps:
            raise TrainingError(
                f"The loss was not finite in {self._skipped_in_a_row} steps in a row, the last of them step "
                f"{self.state.global_step + 1}; none of them changed the weights. {self._labels.hint()}Lower learning_rate, "
                "look at the examples of these steps, or allow more such steps with max_skipped_steps."
            )

    def _after_step(self) -> None:
        self.step_seconds.append(time.perf_counter() - self._step_began)
        self.optimizer_seconds.append(self._optimizer_time)
        counters = {"tokens_seen": self.tokens_seen, "skipped_steps": self.skipped_steps}
        # Checkpoints hold the callbacks' states; `Trainer` restores them only if it is told to.
        _saved_states(self.state)[_COUNTERS] = {"args": {}, "attributes": counters}

    def _update_begins(self, parameter: Tensor | None = None) -> None:
        self._optimizer_time -= time.perf_counter()

    def _update_ends(self, parameter: Tensor | None = None) -> None:
        self._optimizer_time += time.perf_counter()

    @contextmanager
    def _timed_update(self) -> Iterator[None]:
        self._update_begins()
        try:
            yield
        finally:
            self._update_ends()

    # The log

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """A token optimizer adds up the norm while it updates; `log` reads it after the step."""
        if self._token_optimizer is not None:
            return grad_norm
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, with the gradient norm of the last step, the tokens seen, and the steps skipped if any."""
        if "loss" in logs:
            optimizer = self._token_optimizer
            if optimizer is not None and optimizer.grad_norm is not None:
                logs.setdefault("grad_norm", float(optimizer.grad_norm))
            logs["tokens_seen"] = self.tokens_seen
            if self.skipped_steps:
                logs["skipped_steps"] = self.skipped_steps
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in `Trainer`, which would count the model's parameters in every step."""
        if "input_ids" not in inputs or not hasattr(self.model, "num_parameters"):
            return int(super().floating_point_ops(inputs))
        if self._parameters_for_flos is None:
            self._parameters_for_flos = self.model.num_parameters(exclude_embeddings=True)
        return 6 * int(inputs["input_ids"].numel()) * int(self._parameters_for_flos)


class StepEvents(TrainerCallback):
    """Calls the trainer at the points of its loop for which `Trainer` has no method to override.

    Args:
        step: the trainer.
        attach: called when training begins.
    """

    def __init__(self, step: TrainingStep, attach: Callable[[], None]) -> None:
        self._step, self._attach = step, attach

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer exists and its state is loaded."""
        self._attach()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Backward is done."""
        self._step._before_update()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer has closed the step."""
        self._step._after_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step is counted; logging and saving come next."""
        self._step._after_step()


def _saved_states(state: TrainerState) -> dict[str, Any]:
    """The callbacks' states, which transformers declares as the list of callbacks that they come from."""
    states: Any = state.stateful_callbacks
    saved: dict[str, Any] = states
    return saved
