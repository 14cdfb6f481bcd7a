"""The trainer: all that small-batch training changes in a transformers `Trainer`, put together in one mixin."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import Trainer

from sbft.native.openmp import spinning_while_alone
from sbft.optim.base import TokenOptimizer
from sbft.training.adapters import ReplicatedAdapters
from sbft.training.argument_checks import ArgumentChecks
from sbft.training.arguments import ArgumentError, SmallBatchTrainingArguments
from sbft.training.batches.counted_batches import CountedBatches
from sbft.training.batches.doubling_batch import DoublingBatch
from sbft.training.checkpointing.fail_safe_saving import FailSafeSaving
from sbft.training.checkpointing.on_grid import GridCheckpoints
from sbft.training.checkpointing.saving import WholeCheckpoints
from sbft.training.checkpointing.sharded import ShardedCheckpoints, sharded_checkpoints_allowed
from sbft.training.foreign_optimizers import ForeignOptimizers
from sbft.training.graphs.graphed_training import GraphedTraining
from sbft.training.loss.logits_free import LogitsFreeLoss
from sbft.training.loss.sliced_vocabulary import SlicedVocabulary, most_rows, slices_on
from sbft.training.loss.tied_embeddings import TiedEmbedding
from sbft.training.model_state import shard_again
from sbft.training.model_weights import ModelWeights, tied_and_sharded
from sbft.training.offload.offloading import OffloadedLayers
from sbft.training.prediction_step import PredictionStep
from sbft.training.promotion import with_small_batch_arguments
from sbft.training.tensor_parallel import TensorParallel
from sbft.training.token_optimizers import TokenOptimizerCreation
from sbft.training.training_step import StepEvents, TrainingStep
from sbft.training.watch.labels import warn_of_masked_end

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SmallBatchMixin(
    OffloadedLayers,
    TrainingStep,
    PredictionStep,
    LogitsFreeLoss,
    GraphedTraining,
    ModelWeights,
    TokenOptimizerCreation,
    DoublingBatch,
    ArgumentChecks,
    ForeignOptimizers,
    FailSafeSaving,
    WholeCheckpoints,
    GridCheckpoints,
    ShardedCheckpoints,
    TensorParallel,
    ReplicatedAdapters,
    CountedBatches,
    _Base,
):
    """Put it before a `Trainer`, or a trainer built on one: `class Mine(SmallBatchMixin, trl.SFTTrainer): pass`.

    Its arguments are a `SmallBatchTrainingArguments`, or of the class that `sbft.small_batch(trl.SFTConfig)` makes. Plain
    arguments are converted, and one line says what that changed.

    It trains with an optimizer whose averages are in tokens, releases gradients, and computes the loss without logits. That
    loss replaces the next-token loss of `Trainer` and of TRL's `SFTTrainer`, including its metrics, if the model's own loss is
    the same. A trainer with another `compute_loss` keeps its own.

    Attributes:
        step_seconds: wall time of each finished step, including data loading.
        optimizer_seconds: wall time of the updates within each of these steps; on CUDA, of launching them, and where a graph
            launches them with everything else, of closing the step alone.
        tokens_seen: tokens (without padding, all ranks) of all finished steps, including those before a resumed checkpoint; of
            batches that hold no tokens, examples.
        skipped_steps: steps skipped because their loss was not finite, including those before a resumed checkpoint.
        unlabelled_steps: steps since `train` began without any label to learn from.
        tokens_of_this_session: those of `tokens_seen` that came after the resumed checkpoint.
    """

    args: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._logged_warnings: set[str] = set()
        self._attached = contextlib.ExitStack()
        args, kwargs = with_small_batch_arguments(type(self), args, kwargs)
        with sharded_checkpoints_allowed((*args, *kwargs.values())):
            super().__init__(*args, **kwargs)
        self._check_arguments()
        self._check_weights(self.model)
        self._optimizer_was_passed = self.optimizer is not None
        if self.args.device.type == "cuda" and self.args.dataloader_pin_memory:
            self.accelerator.dataloader_config.non_blocking = True  # the host does not wait until a batch is copied
        self.add_callback(StepEvents(self, self._attach))
        self.add_callback(self._watch)
        self.add_callback(self._labels)
        warn_of_masked_end(self.data_collator)

    @property
    def unlabelled_steps(self) -> int:
        """Steps since `train` began without any label to learn from."""
        return self._labels.unlabelled_steps

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; what is attached to the model for training is removed however it ends."""
        self._reset_counters()
        self._take_replaced_model()
        if self.model is not None:  # None between trials of hyperparameter_search
            shard_again(self.model)  # the optimizer is made from the parameters that the modules hold now
        try:
            with spinning_while_alone(self.args.device):
                return super().train(*args, **kwargs)
        finally:
            self._attached.close()
            self._tied = self._sliced = self._graphed = None
            optimizer = self._token_optimizer
            if optimizer is not None:
                optimizer.discard_step()  # an error or an interrupt may have left it half done

    def _attach(self) -> None:
        """Register the hooks for this training, which run in this order; the optimizer's state is loaded by now."""
        self._try_saving_before_training()  # again for a model that was made only now
        self._attached.close()
        self._reset_counters()  # auto_find_batch_size starts over after an error in backward
        optimizer = self._token_optimizer
        head = self._find_head()
        if head is not None and not self._is_sharded:
            slicing = optimizer if self._hands_over_slices(optimizer) else None
            self._tied = self._attached.enter_context(TiedEmbedding(self.model, head, slicing))
            if slicing is not None:
                update = functools.partial(self._update_in_backward, slicing)
                limit = most_rows(self.args.sliced_vocabulary, head.linear.weight.shape[1], self.args.device.type)
                sliced = SlicedVocabulary(self.model, head, slicing, self._tied, update, limit)
                self._sliced = self._attached.enter_context(sliced)
        self._resume_counters()
        self._check_optimizer()
        if optimizer is None:
            return
        optimizer.discard_step()
        if optimizer.releases_gradients and self.args.cuda_graphs:
            raise ArgumentError(
                "cuda_graphs=True, but the optimizer that was passed in already releases its gradients through hooks that a "
                "graph does not know. Call remove() on its handle, and the trainer attaches its own; or set cuda_graphs=False."
            )
        if self.args.gradient_release and not optimizer.releases_gradients:
            if self.streamed is not None:
                self.streamed.place_state(optimizer)
                self.streamed.schedule.launch_updates = optimizer.launch_waiting
                self._hook_streamed(self.streamed.before_update)
            self._hook_parameters(optimizer, self._update_begins)
            held = [*tied_and_sharded(self.model), *self._replicated()]
            release = self._attached.enter_context(optimizer.release_gradients(held))
            release.around_last_launch = self._timed_update
            self._hook_parameters(optimizer, self._update_ends)
            if self.streamed is not None:
                self._hook_streamed(self.streamed.after_update)
            if self.args.cuda_graphs and self.args.device.type == "cuda":
                self._start_graphs(optimizer, head)

    def _hands_over_slices(self, optimizer: TokenOptimizer | None) -> bool:
        """Whether gradients of embeddings may reach the optimizer in slices: where this trainer releases its own ones."""
        released = optimizer is not None and self.args.gradient_release and not optimizer.releases_gradients
        alone = self.accelerator.num_processes == 1 and not self.args.cuda_graphs
        return released and alone and slices_on(self.args.sliced_vocabulary, self.args.device.type)

    def _update_in_backward(self, optimizer: TokenOptimizer, parameter: Tensor) -> None:
        with self._timed_update():
            optimizer.update_parameter(parameter)

    def _hook_parameters(self, optimizer: TokenOptimizer, hook: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)
                self._attached.callback(handle.remove)

    def _is_overridden(self, name: str) -> bool:
        """Whether a subclass or an instance has replaced a method of this mixin."""
        return name in vars(self) or getattr(type(self), name) is not getattr(SmallBatchMixin, name)


class SmallBatchTrainer(SmallBatchMixin, Trainer):
    """A `transformers.Trainer` that fine-tunes all weights at batch size 1 in little memory.

    Examples:
        >>> args = SmallBatchTrainingArguments(output_dir="out", max_steps=300)
        >>> trainer = SmallBatchTrainer(model, args, collator, train_dataset=dataset)
        >>> trainer.train()
    """

    args: SmallBatchTrainingArguments
