"""The arguments of `SmallBatchTrainer`: transformers' `TrainingArguments`, and the settings of small-batch training."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from sbft.errors import ModelError, RecipeError
from sbft.grid.convert import check_formats
from sbft.grid.formats import DTYPES, on_grids
from sbft.recipe.pretraining import PRETRAINING
from sbft.recipe.settings import ARGUMENTS, OPTIMIZERS, RIVALS, Range, Setting
from sbft.training.batches.batch_schedule import BatchSchedule
from sbft.training.offload.refusals import why_arguments_refuse

if TYPE_CHECKING:
    from typing_extensions import Self

# The weight decay, an argument of transformers' own, is a setting of the groups of parameters.
_KEYWORDS = {
    name: setting for name, setting in ARGUMENTS.items() if setting.is_keyword and not setting.is_transformers_own
}
"""Arguments that are keywords of optimizers."""
_SPECIAL = {name: setting for name, setting in _KEYWORDS.items() if setting.token_optimizers != OPTIMIZERS}
"""Those that some of sbft's optimizers have and others do not."""
_OF_TRAINER = {name: setting for name, setting in ARGUMENTS.items() if setting.of_trainer}


def _replacement(setting: Setting) -> str:
    """What to set in the place of an argument of transformers that has the same meaning, and for which optimizers."""
    names = [setting.trainer_name, *(first for _, first, second in RIVALS if second == setting.name)]
    *optimizers, last = setting.token_optimizers
    return f"{' or '.join(names)} (of {', '.join(optimizers)} and {last})"


_TRANSFORMERS_ONLY = {
    "optim": "token_optimizer",
    "optim_args": "the optimizer's settings, such as second_moment_half_life or optimizer_eps,",
    "optim_target_modules": "an adapter, or frozen weights,",
    **{
        setting.transformers_argument: _replacement(setting)
        for setting in _SPECIAL.values()
        if setting.transformers_argument
    },
}
"""Arguments that only transformers' own optimizers read, and what to set in their place."""


class ArgumentError(RecipeError, ValueError):
    """Training arguments are out of their domain, or contradict each other."""


def _as_number(value: Any) -> float:
    """A value as a number, which text may stand for; NaN if it does not."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _setting(name: str) -> Any:
    """A field with the default and the help that `sbft.recipe.settings` has for it."""
    return field(default=ARGUMENTS[name].default, metadata={"help": ARGUMENTS[name].help})


@dataclass
class SmallBatchArguments:
    """The fields and defaults of small-batch training; put it before a subclass of `TrainingArguments`.

    With TRL: `sbft.small_batch(trl.SFTConfig)`.

    Raises:
        ArgumentError: if the fields contradict one another.
    """

    token_optimizer: str | None = _setting("token_optimizer")
    second_moment_half_life: float | None = _setting("second_moment_half_life")
    beta2: float | None = _setting("beta2")
    first_moment_half_life: float | None = _setting("first_moment_half_life")
    beta1: float | None = _setting("beta1")
    momentum_half_life: float | None = _setting("momentum_half_life")
    momentum: float | None = _setting("momentum")
    schedule: str | None = _setting("schedule")
    relative_step: bool | None = _setting("relative_step")
    clip_threshold: float | None = _setting("clip_threshold")
    min_dim_size_to_factor: int | None = _setting("min_dim_size_to_factor")
    optimizer_eps: float | None = _setting("optimizer_eps")
    nesterov: bool | None = _setting("nesterov")
    adjust_lr_fn: str | None = _setting("adjust_lr_fn")
    newton_schulz_dtype: str | None = _setting("newton_schulz_dtype")
    sinkhorn_iterations: int | None = _setting("sinkhorn_iterations")
    rest_optimizer: str | None = _setting("rest_optimizer")
    rest_lr_ratio: float | None = _setting("rest_lr_ratio")
    stochastic_rounding: bool = _setting("stochastic_rounding")
    rounding_seed: int | None = _setting("rounding_seed")
    weights: dict[str, str] | str | None = _setting("weights")
    offload: dict[str, Any] | str | None = _setting("offload")
    cast_weights: bool = _setting("cast_weights")
    gradient_release: bool = _setting("gradient_release")
    cuda_graphs: bool = _setting("cuda_graphs")
    sliced_vocabulary: bool | None = _setting("sliced_vocabulary")
    max_skipped_steps: int = _setting("max_skipped_steps")
    logits_free_loss: bool = _setting("logits_free_loss")

    per_device_train_batch_size: int = _setting("per_device_train_batch_size")
    batch_doubling_examples: int | None = _setting("batch_doubling_examples")
    largest_batch_size: int | None = _setting("largest_batch_size")
    gradient_accumulation_steps: int = _setting("gradient_accumulation_steps")
    learning_rate: float = _setting("learning_rate")
    lr_scheduler_type: SchedulerType | str = _setting("lr_scheduler_type")
    max_grad_norm: float = _setting("max_grad_norm")
    bf16: bool = _setting("bf16")

    def __post_init__(self) -> None:
        self._check_small_batch()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # nothing to pin memory for, and torch would warn
        super().__post_init__()  # type: ignore[misc]
        self._check_checkpointing()
        self._check_offload()
        self._refuse_settings_of_transformers()

    def check(self) -> None:
        """Check the arguments again, after changes.

        Raises:
            ArgumentError: if the fields contradict one another.
        """
        self._check_small_batch()
        self._check_checkpointing()
        self._check_offload()
        self._refuse_settings_of_transformers()

    @classmethod
    def for_pretraining(cls, **settings: Any) -> Self:
        """Arguments with the defaults of pretraining: cosine decay after 5% warm-up, and a second moment whose half-life is
        10 million tokens (arXiv 2507.07101, section 4).

        Args:
            **settings: replace these defaults.
        """
        defaults = dict(PRETRAINING["training"])
        has_own_decay = settings.get("beta2") is not None or settings.get("schedule") == "power"
        with_second_moment = ARGUMENTS["second_moment_half_life"].token_optimizers
        if not has_own_decay and settings.get("token_optimizer", "adafactor") in with_second_moment:
            defaults.update(PRETRAINING["optimizer"])
        return cls(**{**defaults, **settings})

    @property
    def releases_gradients(self) -> bool:
        """Whether gradients are released in backward, which requires a token optimizer."""
        return self.gradient_release and self.token_optimizer is not None

    @property
    def grids(self) -> str | dict[str, str] | None:
        """The formats of weights on a grid, as `sbft.grid.convert.put_on_grids` takes them; None if no weight is on one."""
        return on_grids(self.weights)

    def given_optimizer_settings(self) -> dict[str, Any]:
        """Settings that were given for the token optimizer, by the names of these arguments."""
        values = {name: getattr(self, name) for name in _SPECIAL}
        return {name: value for name, value in values.items() if value is not None}

    def token_optimizer_settings(self) -> dict[str, Any]:
        """Keyword arguments of the token optimizer, except for the parameters."""
        values = {setting.name: getattr(self, name) for name, setting in _KEYWORDS.items()}
        given = {keyword: value for keyword, value in values.items() if value is not None}
        return {"lr": self.learning_rate, "seed": self.seed, **given}  # type: ignore[attr-defined]

    def _check_weights(self) -> None:
        """Refuse formats that do not exist, and those that cannot be trained as the other fields say."""
        if isinstance(self.weights, str) and self.weights.startswith("{"):
            self.weights = json.loads(self.weights)  # from a command line, as transformers reads its dicts
        if self.weights in (None, *DTYPES):
            return
        try:
            formats = check_formats(self.weights)
        except ModelError as error:
            raise ArgumentError(f"weights={self.weights!r}: {error}") from error
        if self.grids is None:
            return
        if self.token_optimizer is None:
            raise ArgumentError(
                f"weights={self.weights!r} stores weights on grids that only sbft's optimizers update, and token_optimizer is "
                "None. Set one, or leave weights out."
            )
        unsupported = {"torch_compile": vars(self).get("torch_compile"), "fsdp": vars(self).get("fsdp")}
        for name, value in unsupported.items():
            if value:
                names = ", ".join(sorted(set(formats.values())))
                raise ArgumentError(f"{name}={value!r} does not support weights in {names}. Leave out one of them.")

    def _check_small_batch(self) -> None:
        self._check_domains()
        self._check_weights()
        if self.fp16:  # type: ignore[attr-defined]
            raise ArgumentError(
                "fp16=True is not supported: float16 needs a loss scaler, whose skipped and rescaled steps break both "
                "released gradients and averages in tokens. Leave it out (weights are bfloat16), or set bf16=True."
            )
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if launched not in ("no", "bf16"):
            raise ArgumentError(
                f"accelerate's launch config has mixed_precision: {launched}, which sbft does not train in: weights are "
                "bfloat16 without it. Write mixed_precision: 'no' there (accelerate launch --mixed_precision no), or bf16."
            )
        self._check_batch_schedule()
        if self.token_optimizer is None:
            self._refuse_settings("token_optimizer is None")
            if self.cuda_graphs:
                raise ArgumentError(
                    "cuda_graphs=True needs one of sbft's optimizers, and token_optimizer is None. Name one there, or set "
                    "cuda_graphs=False."
                )
            return
        if self.token_optimizer not in OPTIMIZERS:
            raise ArgumentError(
                f"token_optimizer is {self.token_optimizer!r}; expected one of {', '.join(OPTIMIZERS)}, or None for "
                "the optimizer that `optim` names."
            )
        self._refuse_settings(f"token_optimizer is {self.token_optimizer}")
        for _, half_life, beta in RIVALS:
            values = getattr(self, half_life), getattr(self, beta)
            if None not in values:
                raise ArgumentError(
                    f"{half_life}={values[0]!r} (in tokens) and {beta}={values[1]!r} (per step) set the same average. "
                    f"Remove one of them: keep {half_life} for an average that does not depend on the batch size."
                )
        if self.gradient_release:
            self._check_release()
        if self.cuda_graphs:
            self._check_graphs()

    @property
    def batch_schedule(self) -> BatchSchedule | None:
        """How the batch grows; None if it does not."""
        if self.batch_doubling_examples is None or self.largest_batch_size is None:
            return None
        return BatchSchedule(self.per_device_train_batch_size, self.batch_doubling_examples, self.largest_batch_size)

    def _check_batch_schedule(self) -> None:
        doubling, largest = self.batch_doubling_examples, self.largest_batch_size
        if doubling is None and largest is None:
            return
        if doubling is None or largest is None:
            given, missing = "batch_doubling_examples", "largest_batch_size"
            if doubling is None:
                given, missing = missing, given
            raise ArgumentError(
                f"{given} is given without {missing}, and a batch that doubles needs both. Set both, or none."
            )
        if largest < self.per_device_train_batch_size:
            raise ArgumentError(
                f"largest_batch_size is {largest}, less than the first batch, per_device_train_batch_size "
                f"{self.per_device_train_batch_size}. Raise the one, or lower the other."
            )
        if self.train_sampling_strategy != "random":  # type: ignore[attr-defined]
            raise ArgumentError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} has no effect with "  # type: ignore[attr-defined]
                "batch_doubling_examples, which draws examples at random. Leave one of them out."
            )
        if self.auto_find_batch_size:  # type: ignore[attr-defined]
            raise ArgumentError(
                "auto_find_batch_size=True has no effect with batch_doubling_examples, which sets the batch. Lower "
                "largest_batch_size where memory ends."
            )
        if self.gradient_accumulation_steps != 1:
            raise ArgumentError(
                f"batch_doubling_examples makes the batch larger itself, and gradient_accumulation_steps is "
                f"{self.gradient_accumulation_steps}. Set it to 1."
            )

    def _check_domains(self) -> None:
        """Refuse numbers that the trainer cannot train with. The optimizer checks its own settings when it is made."""
        for name, setting in _OF_TRAINER.items():
            value = getattr(self, name)
            if not isinstance(setting.domain, Range) or (value is None and setting.default is None):
                continue
            number = _as_number(value)
            if not setting.domain.holds(number):
                raise ArgumentError(f"{name} is {value!r}; expected {setting.domain.expected(number)}.")

    def _refuse_settings(self, why: str) -> None:
        for name, value in self.given_optimizer_settings().items():
            optimizers = _SPECIAL[name].token_optimizers
            if self.token_optimizer not in optimizers:
                raise ArgumentError(
                    f"{name}={value!r} has no effect, because {why}. Remove it, or set token_optimizer "
                    f"to {' or '.join(optimizers)}."
                )

    def _refuse_settings_of_transformers(self) -> None:
        if self.token_optimizer is None:
            return
        defaults = {argument.name: argument.default for argument in fields(self)}
        for name, replacement in _TRANSFORMERS_ONLY.items():
            value = getattr(self, name)
            if value != defaults[name]:
                optim = OptimizerNames(self.optim).value  # type: ignore[attr-defined]
                raise ArgumentError(
                    f"{name}={optim if name == 'optim' else repr(value)} is for transformers' own optimizers, and "
                    f"token_optimizer={self.token_optimizer!r} trains with one of sbft's. Set {replacement} in its place; or "
                    f"token_optimizer=None to train with optim={optim}, as in a plain Trainer."
                )

    def _check_release(self) -> None:
        if self.gradient_accumulation_steps != 1:
            raise ArgumentError(
                f"gradient_accumulation_steps={self.gradient_accumulation_steps} needs gradients that outlive their "
                "backward, and gradient_release=True frees them in it. Set gradient_accumulation_steps=1 (at batch "
                "size 1, with averages in tokens, accumulation gains nothing), or gradient_release=False."
            )
        if self.max_grad_norm:
            raise ArgumentError(
                f"max_grad_norm={self.max_grad_norm} needs the norm of all gradients before the first update, and "
                "gradient_release=True updates in backward. Set max_grad_norm=0 (Adafactor clips every update "
                "itself), or gradient_release=False."
            )

    def _check_graphs(self) -> None:
        problems = {
            "gradient_release=False": not self.gradient_release,
            "schedule='power'": self.schedule == "power",
            "logits_free_loss=False": not self.logits_free_loss,
            "bf16=True": self.bf16,
            "torch_compile=True": bool(vars(self).get("torch_compile")),
            "gradient_checkpointing=True": self.checkpoints_activations,
            "activation_offloading=True": bool(vars(self).get("activation_offloading")),  # of TRL
        }
        found = [name for name, is_so in problems.items() if is_so]
        if found:
            raise ArgumentError(
                f"cuda_graphs=True holds forward, backward and released updates as they are, and does not go with "
                f"{', '.join(found)}. Change that, or set cuda_graphs=False."
            )

    @property
    def checkpoints_activations(self) -> bool:
        """Whether backward repeats parts of forward."""
        return any(vars(self).get(name) for name in ("activation_checkpointing", "gradient_checkpointing"))

    def _check_offload(self) -> None:
        if isinstance(self.offload, str) and self.offload.startswith("{"):
            self.offload = json.loads(self.offload)  # from a command line, as transformers reads its dicts
        if (reason := why_arguments_refuse(self)) is not None:
            raise ArgumentError(reason)

    def _check_checkpointing(self) -> None:
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            settings = vars(self).get(name)  # transformers 5 has the second, later versions both
            if settings and settings.get("use_reentrant") and self.releases_gradients:
                raise ArgumentError(
                    f"{name} asks for use_reentrant=True, which runs a backward within backward, and released "
                    "gradients allow only one. Remove use_reentrant (it is False by default), or set "
                    "gradient_release=False."
                )


@dataclass
class SmallBatchTrainingArguments(SmallBatchArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the defaults and the additional fields of small-batch training.

    Defaults that differ: batch size 1, no accumulation, a constant learning rate of 1e-4, no clipping of the global
    norm.

    Raises:
        ArgumentError: a ValueError, if the fields contradict one another; the message gives both ways out.
    """
