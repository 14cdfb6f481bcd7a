"""The trainer: all that small-batch training changes in a transformers `Trainer`, in one mixin."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import weakref
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from sbft.errors import ModelError, TrainingError
from sbft.models.limits import fitting_batches
from sbft.native.openmp import spinning_while_alone
from sbft.optim import SGD, Adafactor, AdamW, Muon, RowAdafactor, SinkGD
from sbft.optim.base import TokenOptimizer
from sbft.optim.sharding import cut_by, is_sharded, parts_of_rows
from sbft.training.adapters import ReplicatedAdapters
from sbft.training.arguments import ArgumentError, SmallBatchArguments, SmallBatchTrainingArguments
from sbft.training.batch_counts import CountingCollator, FiniteLoss, labels_of, targets_of
from sbft.training.batch_schedule import ScheduledBatches, rates_by_examples
from sbft.training.batches import CountedBatches, beside_statistics, cast_inputs
from sbft.training.checkpointing.rehearsing_trainer import RehearsedSaving
from sbft.training.checkpointing.saving import WholeCheckpoints
from sbft.training.checkpointing.sharded import ShardedCheckpoints, trains_shards
from sbft.training.generation_config import generator_of
from sbft.training.graphs.graphed_trainer import GraphedTraining
from sbft.training.loss.logits_free import LogitsFreeLoss
from sbft.training.loss.tied_embeddings import TiedEmbedding
from sbft.training.model_state import shard_again
from sbft.training.packing_probe import PackedBatches, warn_of_dropped_positions
from sbft.training.parameter_groups import parameter_groups, with_weight_decay
from sbft.training.peft_models import learns_keys, unwrap
from sbft.training.promotion import with_small_batch_arguments
from sbft.training.tensor_parallel import TensorParallel
from sbft.training.unsupported import AskedFor
from sbft.training.watch.callback import TrainingWatch
from sbft.training.watch.labels import LabelWatch, warn_of_masked_end

logger = logging.getLogger(__name__)

TOKEN_OPTIMIZERS: dict[str, type[TokenOptimizer]] = {
    "adafactor": Adafactor,
    "adamw": AdamW,
    "sgd": SGD,
    "muon": Muon,
    "sinkgd": SinkGD,
    "row_adafactor": RowAdafactor,
}
# Up to this length, torch's plain attention is faster than its flash kernel on a CPU in bfloat16 (forward and backward,
# 9 heads of 64, 2 cores: 1.2 against 15.9 ms at 40 tokens, 20 against 52 at 256, but 183 against 66 at 512).
PLAIN_ATTENTION_TOKENS = 256
_COUNTED = "SmallBatchMixin"


class _NonFiniteLoss(Exception):
    """Leaves a training step before its backward; carries the loss."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SmallBatchMixin(
    LogitsFreeLoss,
    GraphedTraining,
    AskedFor,
    RehearsedSaving,
    WholeCheckpoints,
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
            launches them with all else, of closing the step alone.
        tokens_seen: tokens (padding aside, all ranks) of all finished steps, also those before a resumed checkpoint; of batches
            that hold no tokens, examples.
        skipped_steps: steps left out because their loss was not finite, also those before a resumed checkpoint.
        unlabelled_steps: steps since `train` began without any label to learn from.
        tokens_of_this_session: those of `tokens_seen` that came after the resumed checkpoint.
    """

    args: Any
    model: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.step_seconds: list[float] = []
        self.optimizer_seconds: list[float] = []
        self.tokens_seen = 0
        self.skipped_steps = 0
        self.tokens_of_this_session = 0
        self._skipped_in_a_row = 0
        self._skip_this_step = False
        self._in_training_step = False
        self._found_finite = False
        self._step_tokens = 0
        self._step_began = 0.0
        self._optimizer_time = 0.0
        self._said: set[str] = set()
        self._checked_model: weakref.ref[nn.Module] | None = None
        self._attached = contextlib.ExitStack()
        self._parameters_for_flos: int | None = None
        self._watch = TrainingWatch()
        self._labels = LabelWatch()
        self._packed = PackedBatches()
        args, kwargs = with_small_batch_arguments(type(self), args, kwargs)
        with _optimizer_checkpoints_allowed((*args, *kwargs.values())):
            super().__init__(*args, **kwargs)
        self._check_arguments()
        self._check_weights(self.model)
        self._optimizer_was_given = self.optimizer is not None
        if self.args.device.type == "cuda" and self.args.dataloader_pin_memory:
            self.accelerator.dataloader_config.non_blocking = True  # the host does not wait until a batch is copied
        self.add_callback(_StepEvents(self))
        self.add_callback(self._watch)
        self.add_callback(self._labels)
        warn_of_masked_end(self.data_collator)

    @property
    def unlabelled_steps(self) -> int:
        """Steps since `train` began without any label to learn from."""
        return self._labels.unlabelled_steps

    # Set-up

    def _check_arguments(self) -> None:
        self._refuse_what_is_asked()
        gpus: int = vars(self.args).get("_n_gpu", 1)
        if gpus > 1:
            raise ArgumentError(
                f"One process sees {gpus} GPUs, and would train on {gpus} examples at once through DataParallel. "
                "Set CUDA_VISIBLE_DEVICES=0 to use one, or start a process for each (sbft train --num-processes)."
            )
        if self.is_fsdp_enabled and self.args.token_optimizer is not None:
            raise ArgumentError(
                "accelerate's FSDP plugin (ACCELERATE_USE_FSDP, fsdp_config) shards the model when training begins, too late "
                f"for {self.args.token_optimizer} and its checkpoints. Leave it out, and load the model sharded: "
                "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N)); in a recipe "
                "distributed.fsdp_size."
            )
        if self.accelerator.num_processes > 1 and self.args.releases_gradients and not self._trains_shards:
            way_out = (
                "The model is sharded, but what is trained lies on every process whole. Set gradient_release=False."
                if self._is_sharded
                else "Shard the model over them with FSDP2 (from_pretrained(..., "
                "distributed_config=DistributedConfig(fsdp_size=N)); in a recipe distributed.fsdp_size), run one process, "
                "or set gradient_release=False."
            )
            raise ArgumentError(
                f"gradient_release=True with {self.accelerator.num_processes} processes would update each replica "
                f"from its own gradient. {way_out}"
            )

        if self.args.checkpoints_activations and learns_keys(self.model):
            raise ArgumentError(
                "gradient_checkpointing=True with prefix tuning, whose keys and values are a cache, of which a model that "
                "checkpoints has none. Set gradient_checkpointing=False, or learn a prompt (PromptTuningConfig)."
            )
        if self.args.batch_schedule is not None:
            self._check_batch_schedule()
        if self._trains_shards and self.args.gradient_accumulation_steps > 1:
            raise ArgumentError(
                f"gradient_accumulation_steps is {self.args.gradient_accumulation_steps} with a sharded model, of which a "
                "step whose loss is not finite could not be left out whole. Set it to 1: small batches need no accumulation."
            )

    def _check_batch_schedule(self) -> None:
        if self.accelerator.num_processes > 1:
            raise ArgumentError(
                f"batch_doubling_examples is {self.args.batch_doubling_examples} with {self.accelerator.num_processes} "
                "processes, whose batches would part ways. Run one process, or leave it out."
            )
        if self.train_dataset is not None and not has_length(self.train_dataset):
            raise ArgumentError(
                f"batch_doubling_examples is {self.args.batch_doubling_examples}, and the training set has no length, as one "
                "that is streamed. Leave it out, or take a training set that has."
            )

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in `Trainer`, for each training and each trial; its weights are those that a model passed in would have."""
        self._head = self._head_made_from = None  # it holds on to weights of the model before
        model: nn.Module = super().call_model_init(*args, **kwargs)
        if self._checked_model is not None:  # the first is checked with the arguments
            self._check_weights(model)
        return model

    def _check_weights(self, model: Any) -> None:
        """Refuse float16, and take a float32 model to bfloat16 where its updates will be rounded stochastically."""
        self._checked_model = weakref.ref(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if any(parameter.dtype == torch.float16 for parameter in trainable):
            raise ModelError(
                "The model's weights are float16, whose narrow range loses small gradients without a loss scaler. "
                "Load it with dtype=torch.bfloat16 (or torch.float32)."
            )
        for weight in self._tied_and_sharded(model):
            parts = parts_of_rows(weight)
            # Tensor parallelism alone cuts it unevenly without harm.
            if weight.shape[0] % parts and cut_by(weight) != {"tp"}:
                raise ModelError(
                    f"The model's input embedding is also its output head, and its {weight.shape[0]} rows do not divide by "
                    f"the {parts} processes it is sharded over. FSDP2 then keeps two copies of it, of which one is not "
                    "trained. Take a number of processes by which they divide."
                )
        rounds = self.args.token_optimizer is not None and self.args.stochastic_rounding and self.args.cast_weights
        if not rounds or self._may_be_others_optimizer() or not isinstance(model, PreTrainedModel):
            return
        wide = [parameter for parameter in trainable if parameter.dtype == torch.float32]
        if len(wide) == len(trainable) and wide:
            if any(map(is_sharded, wide)):
                raise ModelError(
                    "The model's weights are float32 and sharded already, too late to cast them to bfloat16. Load it with "
                    "dtype=torch.bfloat16, or set cast_weights=False to train in float32."
                )
            self.warn_once(
                "The model's float32 weights are cast to bfloat16, which halves them; updates are rounded "
                "stochastically. To train in float32, set cast_weights=False."
            )
            # Parameters alone: buffers, such as rotary frequencies, lose precision that nothing gives back.
            kept = beside_statistics(model)
            for parameter in model.parameters():
                if parameter.dtype == torch.float32 and parameter not in kept:
                    parameter.data = parameter.data.to(torch.bfloat16)
            model.config.dtype = torch.bfloat16
            cast_inputs(model, torch.bfloat16, self.label_names)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The token optimizer that the arguments name, unless one was passed in or they name none."""
        passed = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        if passed or self.args.token_optimizer is None:
            return super().create_optimizer(*args, **kwargs)
        model = self.model if not args or args[0] is None else args[0]
        optimizer_class, decay = TOKEN_OPTIMIZERS[self.args.token_optimizer], self.args.weight_decay
        groups = parameter_groups(model, optimizer_class)
        if decay:
            decayed = set(self.get_decay_parameter_names(model))
            groups = with_weight_decay(groups, decay, {p for name, p in model.named_parameters() if name in decayed})
        try:
            self.optimizer = optimizer_class(groups, **self.args.token_optimizer_settings())
        except ValueError as error:
            raise ArgumentError(f"The optimizer {self.args.token_optimizer} cannot be made: {error}.") from error
        return self.optimizer

    def get_train_dataloader(self) -> Any:
        """As in `Trainer`, its batches counted; with a batch that doubles, all of the run is one pass over them."""
        loader: Any = super().get_train_dataloader()
        plain = getattr(loader, "base_dataloader", loader)  # inside accelerate's
        if isinstance(plain, DataLoader):
            plain.collate_fn = CountingCollator(fitting_batches(plain.collate_fn, self.model))
            warn_of_dropped_positions(self.model, self.train_dataset)
        schedule = self.args.batch_schedule
        if schedule is None:
            return loader
        count = len(loader.dataset)
        if self.args.max_steps <= 0:
            self.args.max_steps = schedule.steps(math.ceil(self.args.num_train_epochs * count))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return DataLoader(
            loader.dataset,
            batch_sampler=ScheduledBatches(count, schedule, self.args.max_steps, seed),
            collate_fn=loader.collate_fn,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            persistent_workers=loader.persistent_workers,
            prefetch_factor=loader.prefetch_factor,
        )

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """As in `Trainer`; with a batch that doubles, the learning rate goes by examples."""
        schedule = self.args.batch_schedule
        if schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        chosen: Any = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = rates_by_examples(chosen, self.args, schedule, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # The loop

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; what is attached to the model for training is taken off however it ends."""
        self._count_anew()
        self._take_up_another_model()
        if self.model is not None:  # None between trials of hyperparameter_search
            shard_again(self.model)  # the optimizer is made of the parameters that the modules bear now
        try:
            with spinning_while_alone(self.args.device):
                return super().train(*args, **kwargs)
        finally:
            self._attached.close()
            self._tied = self._graphed = None
            optimizer = self._token_optimizer
            if optimizer is not None:
                optimizer.discard_step()  # what an error or an interrupt left half done

    def _take_up_another_model(self) -> None:
        """`model` may have been replaced: what was made for the former one would be trained in its place."""
        former = None if self._checked_model is None else self._checked_model()
        if self.model is None or self.model is former:
            return
        self._check_weights(self.model)
        self._parameters_for_flos = None
        if self.accelerator.unwrap_model(self.model_wrapped) is not self.model:
            self.model_wrapped = self.model
        trained = {id(parameter) for parameter in self.model.parameters()}
        groups = [] if self.optimizer is None else self.optimizer.param_groups
        if any(id(parameter) not in trained for group in groups for parameter in group["params"]):
            if self._optimizer_was_given:
                raise TrainingError(
                    "The trainer's model was replaced, and the optimizer that was passed in updates weights of the former one. "
                    "Make a new trainer for the new model, or set trainer.optimizer to an optimizer of its weights."
                )
            self.optimizer = None

    def _count_anew(self) -> None:
        self.step_seconds.clear()
        self.optimizer_seconds.clear()
        self.tokens_seen = self.skipped_steps = self._skipped_in_a_row = self.tokens_of_this_session = 0

    def _attach(self) -> None:
        """Hooks for the duration of training, run in this order; the optimizer's state is loaded by now."""
        self._rehearse_for_training()  # of a model that was made only now
        self._attached.close()
        self._count_anew()  # auto_find_batch_size begins anew after an error within backward
        optimizer = self._token_optimizer
        head = self._find_head()
        if head is not None and not self._is_sharded:
            self._tied = self._attached.enter_context(TiedEmbedding(self.model, head))
        counted = self.counted_in(self.state)
        if counted is not None:
            self.tokens_seen, self.skipped_steps = counted
        elif optimizer is not None:
            self.tokens_seen, self.skipped_steps = optimizer.tokens_seen, optimizer.skipped_steps
        self._look_at_optimizer()
        if optimizer is None:
            return
        optimizer.discard_step()
        if optimizer.releases_gradients and self.args.cuda_graphs:
            raise ArgumentError(
                "cuda_graphs=True, and the optimizer that was passed in releases its gradients already, to hooks that a graph "
                "does not know. Call remove() on its handle, and the trainer attaches its own; or set cuda_graphs=False."
            )
        if self.args.gradient_release and not optimizer.releases_gradients:
            self._hook_parameters(optimizer, self._update_begins)
            held = [*self._tied_and_sharded(self.model), *self._replicated()]
            self._attached.enter_context(optimizer.release_gradients(held))
            self._hook_parameters(optimizer, self._update_ends)
            if self.args.cuda_graphs and self.args.device.type == "cuda":
                self._start_graphs(optimizer, head)

    def _tied_and_sharded(self, model: nn.Module) -> list[Tensor]:
        """The embedding that is also the output head, where FSDP2 reduces the gradients of its two uses one after the other."""
        base: Any = unwrap(model)
        head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
        if head is None or not any(map(is_sharded, head.parameters())) or head.weight is not base.get_input_embeddings().weight:
            return []
        return [head.weight]

    def _hook_parameters(self, optimizer: TokenOptimizer, hook: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)
                self._attached.callback(handle.remove)

    def _update_begins(self, parameter: Tensor | None = None) -> None:
        self._optimizer_time -= time.perf_counter()

    def _update_ends(self, parameter: Tensor | None = None) -> None:
        self._optimizer_time += time.perf_counter()

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; counts the tokens of the coming step, which the optimizer is told before backward."""
        self._step_began = time.perf_counter()
        self._optimizer_time = 0.0
        self._skip_this_step = False
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        if batches:
            self._count_step(batches)
            self._count_labels(batches)
        return batches, num_items

    def _count_labels(self, batches: list[Any]) -> None:
        """Note how many labels the coming step has to learn from, all ranks together."""
        labels = labels_of(batches, of_next=generator_of(self.model) is not None)
        if self.accelerator.num_processes > 1:
            counted = torch.tensor(1 if labels is None else labels, device=self.args.device)
            labels = int(self.accelerator.gather(counted).sum())
        self._labels.add_step(labels)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """As in `Trainer`, but a loss that is not finite never reaches backward, and its whole step is left out."""
        self._in_training_step, self._found_finite = True, False
        self._packed.look(self.model, inputs)
        try:
            graphable = self._graphed is not None and isinstance(inputs, Mapping)
            graphed = self._graphed_step(model, inputs, *args, **kwargs) if graphable else None
            with _fast_attention(inputs):
                loss: Tensor = super().training_step(model, inputs, *args, **kwargs) if graphed is None else graphed
        except _NonFiniteLoss as error:
            self._skip_this_step = True
            loss = error.loss.detach()
        finally:
            self._in_training_step = False
        self._watch.add_loss(loss, self._step_tokens)
        return FiniteLoss.of(loss) if self._found_finite and self._loss_goes_to_the_loop else loss

    def _graphed_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor | None:
        """The loss of a step that was launched as a graph, or prepares one; None for a batch that cannot be."""
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
    def _loss_goes_to_the_loop(self) -> bool:
        """Whether what `training_step` returns is what was found finite, and nobody's code is given it."""
        return not self._is_overridden("training_step") and not self._is_overridden("compute_loss")

    def _is_overridden(self, name: str) -> bool:
        return name in vars(self) or getattr(type(self), name) is not getattr(SmallBatchMixin, name)

    def _before_update(self) -> None:
        if self._skip_this_step:
            self._watch.leave_step_out()
            self.model.zero_grad()  # what earlier micro-batches of this step have left
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
        counted = {"tokens_seen": self.tokens_seen, "skipped_steps": self.skipped_steps}
        # Where the trainer keeps callbacks' states in a checkpoint; it brings them back only where asked to.
        _kept_states(self.state)[_COUNTED] = {"args": {}, "attributes": counted}

    @staticmethod
    def counted_in(state: TrainerState) -> tuple[int, int] | None:
        """Tokens seen and steps skipped until a state was saved; None if it was not this trainer that saved it."""
        kept = _kept_states(state).get(_COUNTED)
        return None if kept is None else (kept["attributes"]["tokens_seen"], kept["attributes"]["skipped_steps"])

    # The loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As `LogitsFreeLoss` has it; in training, only if it is finite."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if self._in_training_step and not self._all_finite(loss):
            raise _NonFiniteLoss(loss)
        return result

    def _all_finite(self, loss: Tensor) -> bool:
        finite = torch.isfinite(loss.detach()).all()
        if self.accelerator.num_processes > 1:  # or the ranks would part ways
            finite = self.accelerator.gather(finite.reshape(1)).all()
        self._found_finite = bool(finite)
        return self._found_finite

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> Any:
        """As in `Trainer`; where only the loss is wanted, no logits are made."""
        if prediction_loss_only and targets_of(inputs, of_next=generator_of(self.model) is not None) == 0:
            if self.accelerator.num_processes == 1:
                self._labels.leave_out_of_evaluation()
                return None, None, None  # a loss of zero would go into the mean, and NaN would be all of it
            self.warn_once(
                "Some batches of the evaluation have no label. Several processes count each of them as a loss of zero in "
                "eval_loss, which is then too low: leave such examples out of the evaluation data."
            )
        if not prediction_loss_only or not self._takes_logits_free_loss(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), _fast_attention(inputs):
            return self.compute_loss(model, inputs).detach(), None, None

    # What is logged

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """A token optimizer sums the norm up as it updates; `log` adds it once the step is closed."""
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
        """As in `Trainer`, which counts the model's parameters anew in every step."""
        if "input_ids" not in inputs or not hasattr(self.model, "num_parameters"):
            return int(super().floating_point_ops(inputs))
        if self._parameters_for_flos is None:
            self._parameters_for_flos = self.model.num_parameters(exclude_embeddings=True)
        return 6 * int(inputs["input_ids"].numel()) * int(self._parameters_for_flos)


class SmallBatchTrainer(SmallBatchMixin, Trainer):
    """A `transformers.Trainer` that fine-tunes all weights at batch size 1 in little memory.

    Examples:
        >>> args = SmallBatchTrainingArguments(output_dir="out", max_steps=300)
        >>> trainer = SmallBatchTrainer(model, args, collator, train_dataset=dataset)
        >>> trainer.train()
    """

    args: SmallBatchTrainingArguments


class _StepEvents(TrainerCallback):
    """Tells the mixin where in a step the loop is: the only places that `Trainer` offers no method for."""

    def __init__(self, trainer: SmallBatchMixin) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer exists and its state is loaded."""
        self._trainer._attach()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Backward is over."""
        self._trainer._before_update()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer has closed the step."""
        self._trainer._after_update()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The step is counted; logging and saving come after."""
        self._trainer._after_step()


@contextlib.contextmanager
def _optimizer_checkpoints_allowed(given: tuple[Any, ...]) -> Iterator[None]:
    """`Trainer` refuses checkpoints of a model that was sharded as it was loaded, since it cannot save such an optimizer's
    state. The mixin can, that of a token optimizer; and any can be saved that has none of the sharded weights."""
    arguments = next((one for one in given if isinstance(one, SmallBatchArguments)), None)
    model = next((one for one in given if isinstance(one, nn.Module)), None)
    adapts = model is not None and any(map(is_sharded, model.parameters())) and not trains_shards(model)
    if arguments is None or (arguments.token_optimizer is None and not adapts):
        yield
        return
    wanted: Any = arguments
    former, wanted.save_only_model = wanted.save_only_model, True
    try:
        yield
    finally:
        wanted.save_only_model = former


def _kept_states(state: TrainerState) -> dict[str, Any]:
    """Declared as the list of callbacks that it is made from."""
    states: Any = state.stateful_callbacks
    kept: dict[str, Any] = states
    return kept


@contextlib.contextmanager
def _fast_attention(inputs: dict[str, Any]) -> Iterator[None]:
    """Torch's plain attention for short examples on a CPU; around backward too, which may recompute the forward."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if isinstance(ids, Tensor) and ids.device.type == "cpu" and ids.shape[-1] <= PLAIN_ATTENTION_TOKENS:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    else:
        yield
