"""Refuses arguments that conflict with the model, the processes or an optimizer that was passed in, and says what to set."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from sbft.training.arguments import ArgumentError
from sbft.training.peft_models import learns_keys

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ArgumentChecks(_Base):
    """Put before a `Trainer`: no argument is ignored silently."""

    args: Any
    model: Any
    _is_sharded: bool
    _trains_shards: bool
    _check_batch_schedule: Callable[[], None]

    def _check_arguments(self) -> None:
        """
        Raises:
            ArgumentError: if arguments contradict one another, or cannot be followed by this trainer.
        """
        self.args.check()
        if self.args.token_optimizer is not None:
            self._check_token_optimizer()
        self._check_processes()
        if self.args.checkpoints_activations and learns_keys(self.model):
            raise ArgumentError(
                "gradient_checkpointing=True with prefix tuning: it puts keys and values into a cache, and a model that "
                "checkpoints activations uses none. Set gradient_checkpointing=False, or learn a prompt (PromptTuningConfig)."
            )
        self._check_batch_schedule()
        if self._trains_shards and self.args.gradient_accumulation_steps > 1:
            raise ArgumentError(
                f"gradient_accumulation_steps is {self.args.gradient_accumulation_steps} with a sharded model, where a step "
                "with a loss that is not finite could not be skipped as a whole. Set it to 1: small batches need no "
                "accumulation."
            )

    def _check_token_optimizer(self) -> None:
        """Refuse what a token optimizer cannot do, and its settings if another optimizer was passed in."""
        name = self.args.token_optimizer
        if self.is_deepspeed_enabled:
            raise ArgumentError(
                "DeepSpeed keeps weights, gradients and optimizer in its own form, which token_optimizer="
                f"{name!r} cannot update. Leave DeepSpeed out (to shard a model, load it with "
                "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N))), or set token_optimizer=None."
            )
        if self.is_fsdp_enabled:
            raise ArgumentError(
                "accelerate's FSDP plugin (ACCELERATE_USE_FSDP, fsdp_config) shards the model when training begins, which is "
                f"too late for {name} and its checkpoints. Leave the plugin out, and load the model sharded: "
                "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N)); in a recipe "
                "distributed.fsdp_size."
            )
        settings = self.args.given_optimizer_settings()
        if settings and (self.optimizer is not None or self.optimizer_cls_and_kwargs is not None):
            setting, value = next(iter(settings.items()))
            raise ArgumentError(
                f"{setting}={value!r} has no effect, because an optimizer was passed to the trainer. Give it to that "
                "optimizer, or leave the optimizer out."
            )

    def _check_processes(self) -> None:
        gpus: int = vars(self.args).get("_n_gpu", 1)
        if gpus > 1:
            raise ArgumentError(
                f"One process sees {gpus} GPUs, and would train on {gpus} examples at once through DataParallel. "
                "Set CUDA_VISIBLE_DEVICES=0 to use one, or start a process for each (sbft train --num-processes)."
            )
        processes = self.accelerator.num_processes
        if processes > 1 and self.args.releases_gradients and not self._trains_shards:
            fix = (
                "The model is sharded, but the weights that are trained are whole on every process. Set "
                "gradient_release=False."
                if self._is_sharded
                else "Shard the model over them with FSDP2 (from_pretrained(..., "
                "distributed_config=DistributedConfig(fsdp_size=N)); in a recipe distributed.fsdp_size), run one process, "
                "or set gradient_release=False."
            )
            raise ArgumentError(
                f"gradient_release=True with {processes} processes would update each replica from its own gradient. {fix}"
            )

    def _hp_search_setup(self, trial: Any) -> None:
        """As in `Trainer`, once the model of this trial exists; the trial's settings are checked like any others."""
        super()._hp_search_setup(trial)
        self.args.check()
