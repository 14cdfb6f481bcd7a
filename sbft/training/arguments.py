"""What `SmallBatchTrainer` can be told beyond what transformers' own `TrainingArguments` hold."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from sbft.errors import RecipeError
from sbft.recipe.pretraining import PRETRAINING
from sbft.training.batches.batch_schedule import BatchSchedule

if TYPE_CHECKING:
    from typing_extensions import Self

OPTIMIZERS = ("adafactor", "adamw", "sgd", "muon", "sinkgd", "row_adafactor")
_OF_MATRICES = ("muon", "sinkgd")
_ADAFACTORS = ("adafactor", "row_adafactor")
_WITH_SECOND_MOMENT = ("adafactor", "adamw", "muon", "sinkgd", "row_adafactor")
# Settings that only some optimizers have: the optimizers, and the keyword of theirs.
_SETTINGS = {
    "second_moment_half_life": (_WITH_SECOND_MOMENT, "second_moment_half_life"),
    "beta2": (_WITH_SECOND_MOMENT, "beta2"),
    "first_moment_half_life": (("adamw", *_OF_MATRICES), "first_moment_half_life"),
    "beta1": (("adamw", *_OF_MATRICES), "beta1"),
    "momentum_half_life": (("sgd", "muon"), "momentum_half_life"),
    "momentum": (("sgd", "muon"), "momentum"),
    "schedule": (_ADAFACTORS, "schedule"),
    "relative_step": (_ADAFACTORS, "relative_step"),
    "clip_threshold": (_ADAFACTORS, "clip_threshold"),
    "min_dim_size_to_factor": (("adafactor",), "min_dim_size_to_factor"),
    "optimizer_eps": (_WITH_SECOND_MOMENT, "eps"),
    "nesterov": (("muon",), "nesterov"),
    "adjust_lr_fn": (("muon",), "adjust_lr_fn"),
    "newton_schulz_dtype": (("muon",), "newton_schulz_dtype"),
    "sinkhorn_iterations": (("sinkgd",), "sinkhorn_iterations"),
    "rest_optimizer": (_OF_MATRICES, "rest_optimizer"),
    "rest_lr_ratio": (_OF_MATRICES, "rest_lr_ratio"),
}
_PAIRS = (
    ("second_moment_half_life", "beta2"),
    ("first_moment_half_life", "beta1"),
    ("momentum_half_life", "momentum"),
)

# Fields that only transformers' own optimizers read, and what sbft has in their place.
_OF_THEIR_OPTIMIZERS = {
    "optim": "token_optimizer",
    "optim_args": "the optimizer's settings, such as second_moment_half_life or optimizer_eps,",
    "optim_target_modules": "an adapter, or frozen weights,",
    "adam_beta1": "beta1 or first_moment_half_life (of adamw, muon and sinkgd)",
    "adam_beta2": "beta2 or second_moment_half_life",
    "adam_epsilon": "optimizer_eps",
}


class ArgumentError(RecipeError, ValueError):
    """Training arguments are out of their domain, or contradict one another."""


@dataclass
class SmallBatchArguments:
    """The fields and defaults of small-batch training; to be put before a subclass of `TrainingArguments`.

    With TRL: `sbft.small_batch(trl.SFTConfig)`.

    Raises:
        ArgumentError: if the fields contradict one another.
    """

    token_optimizer: str | None = field(
        default="adafactor",
        metadata={
            "help": "adafactor, adamw, sgd, muon, sinkgd or row_adafactor of sbft; None for whatever `optim` says, as in a "
            "plain Trainer."
        },
    )
    second_moment_half_life: float | None = field(
        default=None, metadata={"help": "Tokens after which a squared gradient weighs one half."}
    )
    beta2: float | None = field(
        default=None, metadata={"help": "Decay factor of the second moment per step, in place of a half-life."}
    )
    first_moment_half_life: float | None = field(
        default=None, metadata={"help": "AdamW: tokens after which a gradient weighs one half."}
    )
    beta1: float | None = field(
        default=None, metadata={"help": "AdamW: decay factor of the first moment per step, in place of a half-life."}
    )
    momentum_half_life: float | None = field(
        default=None, metadata={"help": "SGD and Muon: tokens after which a gradient in the momentum weighs one half."}
    )
    momentum: float | None = field(
        default=None, metadata={"help": "SGD and Muon: decay factor of the momentum per step, in place of a half-life."}
    )
    schedule: str | None = field(
        default=None, metadata={"help": "Adafactor: half_life, or power for its own schedule 1 - step ** -beta2."}
    )
    relative_step: bool | None = field(
        default=None, metadata={"help": "Adafactor: multiply the step by the weight's RMS (its default)."}
    )
    clip_threshold: float | None = field(
        default=None, metadata={"help": "Adafactor: largest RMS of an update before scaling."}
    )
    min_dim_size_to_factor: int | None = field(
        default=None,
        metadata={"help": "Adafactor: the second moment of a matrix with a shorter side is kept whole; 128 when None."},
    )
    optimizer_eps: float | None = field(
        default=None, metadata={"help": "eps of the token optimizer; its own default when None."}
    )
    nesterov: bool | None = field(
        default=None, metadata={"help": "Muon: mix the momentum with the gradient as far as it will be (its default)."}
    )
    adjust_lr_fn: str | None = field(
        default=None,
        metadata={"help": "Muon: how a matrix's rate follows from its shape, match_rms_adamw or original."},
    )
    newton_schulz_dtype: str | None = field(
        default=None, metadata={"help": "Muon: what matrices are orthogonalized in, bfloat16 or float32."}
    )
    sinkhorn_iterations: int | None = field(
        default=None, metadata={"help": "SinkGD: how often a gradient's rows and columns are scaled."}
    )
    rest_optimizer: str | None = field(
        default=None,
        metadata={"help": "Muon and SinkGD: optimizer of embeddings, output head and vectors, adamw or adafactor."},
    )
    rest_lr_ratio: float | None = field(
        default=None, metadata={"help": "Muon and SinkGD: learning rate of these, as a multiple of the matrices'."}
    )
    stochastic_rounding: bool = field(
        default=True, metadata={"help": "Round bfloat16 weights stochastically, so that small updates are not lost."}
    )
    rounding_seed: int | None = field(default=None, metadata={"help": "Seed of the rounding noise; `seed` when None."})
    cast_weights: bool = field(
        default=True,
        metadata={"help": "With stochastic rounding, cast a float32 model to bfloat16 before training."},
    )
    gradient_release: bool = field(
        default=True,
        metadata={"help": "Update each parameter within backward and free its gradient. Only with a token optimizer."},
    )
    cuda_graphs: bool = field(
        default=False,
        metadata={
            "help": "On a GPU, launch whole steps at once (CUDA graphs): for models so small that launching their kernels is "
            "what takes the time. Batches of other than pretraining are padded on to one of few lengths, each captured when it "
            "comes again, and logits are made of all positions, not of those with a label alone. "
            "A resumed run ends in the same bits in float32 only."
        },
    )
    max_skipped_steps: int = field(
        default=20,
        metadata={"help": "Stop with an error after this many steps in a row whose loss was not finite."},
    )
    logits_free_loss: bool = field(
        default=True,
        metadata={
            "help": "Take the loss from hidden states at labels, without logits of all tokens, wherever that is the model's "
            "and the trainer's own loss, which is tried on a few tokens; elsewhere one warning says why it is not. False: "
            "always the loss of the trainer underneath. With use_liger_kernel=True the loss is Liger's fused one."
        },
    )

    per_device_train_batch_size: int = field(
        default=1, metadata={"help": "Examples in a step on each device. Small is as good: averages count tokens."}
    )
    batch_doubling_examples: int | None = field(
        default=None,
        metadata={
            "help": "Double the batch whenever so many more examples were seen, up to `largest_batch_size`. The learning rate "
            "then follows the examples, not the steps."
        },
    )
    largest_batch_size: int | None = field(
        default=None, metadata={"help": "Examples in a step at most, with batch_doubling_examples."}
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Backward passes per update. Needs `gradient_release=False`."}
    )
    learning_rate: float = field(
        default=1e-4, metadata={"help": "Peak learning rate; with relative steps a relative change per step."}
    )
    lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "Learning rate schedule: constant, cosine, linear, ..."}
    )
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Clip the global gradient norm to this. Needs `gradient_release=False`."}
    )
    bf16: bool = field(
        default=False,
        metadata={"help": "Autocast to bfloat16. Not needed where the weights are bfloat16, which is the default."},
    )

    def __post_init__(self) -> None:
        self._check_small_batch()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # there is nothing to pin for, and torch would warn
        super().__post_init__()  # type: ignore[misc]
        self._check_checkpointing()
        self._refuse_their_settings()

    def check(self) -> None:
        """Refuse what contradicts itself; for arguments that were changed since they were made.

        Raises:
            ArgumentError: if something does.
        """
        self._check_small_batch()
        self._check_checkpointing()
        self._refuse_their_settings()

    @classmethod
    def for_pretraining(cls, **settings: Any) -> Self:
        """Arguments with what pretraining wants where `settings` do not say: cosine decay after 5% warm-up, and a second
        moment whose half-life is 10 million tokens (arXiv 2507.07101, section 4).
        """
        defaults = dict(PRETRAINING["training"])
        given = settings.get("beta2") is not None or settings.get("schedule") == "power"
        if not given and settings.get("token_optimizer", "adafactor") in _WITH_SECOND_MOMENT:
            defaults.update(PRETRAINING["optimizer"])
        return cls(**{**defaults, **settings})

    @property
    def releases_gradients(self) -> bool:
        """Whether gradients are released in backward: asked for, and a token optimizer that can."""
        return self.gradient_release and self.token_optimizer is not None

    def given_optimizer_settings(self) -> dict[str, Any]:
        """Settings of the token optimizer that are not left to it, by the names of these arguments."""
        found = {name: getattr(self, name) for name in _SETTINGS}
        return {name: value for name, value in found.items() if value is not None}

    def token_optimizer_settings(self) -> dict[str, Any]:
        """Keyword arguments of the token optimizer, the parameters aside."""
        chosen = {keyword: getattr(self, name) for name, (_, keyword) in _SETTINGS.items()}
        settings = {keyword: value for keyword, value in chosen.items() if value is not None}
        seed = self.rounding_seed
        return {
            "lr": self.learning_rate,
            "stochastic_rounding": self.stochastic_rounding,
            "seed": self.seed if seed is None else seed,  # type: ignore[attr-defined]
            **settings,
        }

    def _check_small_batch(self) -> None:
        rate = float(self.learning_rate)
        if not (rate >= 0 and math.isfinite(rate)):
            raise ArgumentError(f"learning_rate is {self.learning_rate!r}; expected a finite number of at least 0.")
        if self.max_skipped_steps < 1:
            raise ArgumentError(f"max_skipped_steps is {self.max_skipped_steps}; expected at least 1.")
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
        for half_life, beta in _PAIRS:
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
        """How the batch grows; None where it does not."""
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
        if doubling < 1:
            raise ArgumentError(f"batch_doubling_examples is {doubling}; expected at least 1.")
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

    def _refuse_settings(self, why: str) -> None:
        for name, (optimizers, _) in _SETTINGS.items():
            if getattr(self, name) is not None and self.token_optimizer not in optimizers:
                raise ArgumentError(
                    f"{name}={getattr(self, name)!r} has no effect, because {why}. Remove it, or set token_optimizer "
                    f"to {' or '.join(optimizers)}."
                )

    def _refuse_their_settings(self) -> None:
        if self.token_optimizer is None:
            return
        defaults = {one.name: one.default for one in fields(self)}
        for name, ours in _OF_THEIR_OPTIMIZERS.items():
            value = getattr(self, name)
            if value != defaults[name]:
                optim = OptimizerNames(self.optim).value  # type: ignore[attr-defined]
                raise ArgumentError(
                    f"{name}={optim if name == 'optim' else repr(value)} is for transformers' own optimizers, and "
                    f"token_optimizer={self.token_optimizer!r} trains with one of sbft's. Set {ours} in its place; or "
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
        """Whether backward runs parts of forward again."""
        return any(vars(self).get(name) for name in ("activation_checkpointing", "gradient_checkpointing"))

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
