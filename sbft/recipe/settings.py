"""Every setting of the optimizers and of the trainer, declared once.

`SETTINGS` is what the recipe's schema, the trainer's arguments, the keys that a method allows, the pairs that exclude each
other, the help texts and the tables of the documentation are made of.

To add a setting, add a line to it and use the setting in an optimizer. `sbft.training.arguments` lists each with its type, for
editors and type checkers. Nothing heavy is imported here: shells ask for the names of methods at every press of a key.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

OPTIMIZERS = ("adafactor", "adamw", "sgd", "muon", "sinkgd", "row_adafactor")
"""The optimizers of `sbft.optim`, by the names that methods and the trainer's arguments have for them."""
TRANSFORMERS_OPTIMIZERS = ("torch_adamw", "bitsandbytes_adamw8bit", "transformers_adafactor")
"""Optimizers that transformers' Trainer makes. Its Adafactor gets a learning rate and the weight decay alone."""
MATRIX_OPTIMIZERS = ("muon", "sinkgd")
"""Those of `OPTIMIZERS` that work on whole matrices, so that a model cannot be sharded under them."""

_WITH_SECOND_MOMENT = ("adafactor", "adamw", "muon", "sinkgd", "row_adafactor")
_WITH_FIRST_MOMENT = ("adamw", *MATRIX_OPTIMIZERS)
_WITH_MOMENTUM = ("sgd", "muon")
_ADAFACTORS = ("adafactor", "row_adafactor")
_TRANSFORMERS_ADAMS = ("torch_adamw", "bitsandbytes_adamw8bit")
_ALL = (*OPTIMIZERS, *TRANSFORMERS_OPTIMIZERS)


@dataclass(frozen=True)
class Range:
    """Finite numbers from `lowest` to `highest`."""

    lowest: float
    highest: float = math.inf
    above: bool = False
    """Whether `lowest` itself is left out."""
    below: bool = False
    """Whether `highest` itself is left out."""
    off: float | None = None
    """A value outside of the range that means: not set."""

    def holds(self, value: float) -> bool:
        """Whether a number is in the domain."""
        if value == self.off:
            return True
        large_enough = value > self.lowest if self.above else value >= self.lowest
        small_enough = value < self.highest if self.below else value <= self.highest
        return math.isfinite(value) and large_enough and small_enough

    def expected(self, value: float) -> str:
        """What to say was expected, of a number that is not in the domain."""
        lowest = f"{'greater than' if self.above else 'of at least'} {self.lowest:g}"
        if self.below:
            return f"a number {lowest} and less than {self.highest:g}"
        if value > self.highest:
            return f"a number from {self.lowest:g} to {self.highest:.0f}"
        return f"a finite number {lowest}"


@dataclass(frozen=True)
class Setting:
    """One setting: where it is given, what it may be, and who reads it."""

    name: str
    """Its key in a recipe, and the keyword of the optimizers that understand it."""
    type: Any
    domain: Range | tuple[str, ...] | None
    """The numbers or the words that it may be; None if its type says all."""
    help: str
    """One sentence, true of a recipe's key and of the trainer's argument."""
    optimizers: tuple[str, ...] = ()
    """The optimizers that it has an effect with, in the order of `OPTIMIZERS` and `TRANSFORMERS_OPTIMIZERS`."""
    rival: str | None = None
    """The setting that sets the same thing in another way. Of a pair, the first names the second."""
    of_trainer: bool = False
    """Whether the trainer reads it, and no optimizer."""
    section: str | None = "optimizer"
    """The section of a recipe that it is in; None if a recipe has no key for it."""
    required: bool = False
    """Whether its section of a recipe cannot do without it."""
    argument: str = ""
    """Its name among the trainer's arguments, if that is another."""
    transformers_argument: str = ""
    """The argument to set in its place where transformers' Trainer makes the optimizer."""
    default: Any = None
    """Its default among the trainer's arguments. In a recipe the method decides."""

    @property
    def trainer_name(self) -> str:
        """Its name among the trainer's arguments."""
        return self.argument or self.name

    def argument_for(self, optimizer: str) -> str:
        """The trainer's argument that sets it for an optimizer."""
        if optimizer in TRANSFORMERS_OPTIMIZERS and self.transformers_argument:
            return self.transformers_argument
        return self.trainer_name

    @property
    def token_optimizers(self) -> tuple[str, ...]:
        """Those of `OPTIMIZERS` that it has an effect with."""
        return tuple(name for name in OPTIMIZERS if name in self.optimizers)

    @property
    def is_keyword(self) -> bool:
        """Whether optimizers of sbft take it as a keyword."""
        return self.section == "optimizer" and not self.of_trainer

    @property
    def is_transformers_own(self) -> bool:
        """Whether it is an argument of the trainer as transformers declares it."""
        return self.trainer_name == self.transformers_argument


_POSITIVE = Range(0, above=True)
_COUNT = Range(1)
_DECAY = Range(0, 1, below=True)
_LARGEST_BATCH = 2**31 - 1

SETTINGS = (
    Setting(
        "second_moment_half_life", float, _POSITIVE, "Half-life of the second moment, in tokens.",
        _WITH_SECOND_MOMENT, rival="beta2",
    ),
    Setting(
        "beta2", float, _DECAY,
        "Decay factor of the second moment per step, instead of a half-life; with schedule power, its exponent.",
        (*_WITH_SECOND_MOMENT, *_TRANSFORMERS_ADAMS), transformers_argument="adam_beta2",
    ),
    Setting(
        "first_moment_half_life", float, _POSITIVE,
        "Half-life of AdamW's first moment, in tokens; with Muon and SinkGD, that of their AdamW.",
        _WITH_FIRST_MOMENT, rival="beta1",
    ),
    Setting(
        "beta1", float, _DECAY, "Decay factor of AdamW's first moment per step, instead of a half-life.",
        (*_WITH_FIRST_MOMENT, *_TRANSFORMERS_ADAMS), transformers_argument="adam_beta1",
    ),
    Setting(
        "momentum_half_life", float, _POSITIVE, "Half-life of SGD's and Muon's momentum, in tokens.",
        _WITH_MOMENTUM, rival="momentum",
    ),
    Setting(
        "momentum", float, _DECAY,
        "Decay factor of SGD's and Muon's momentum per step, instead of a half-life; 0 means none (Muon: spectral descent).",
        _WITH_MOMENTUM,
    ),
    Setting("nesterov", bool, None, "Use Nesterov momentum in Muon.", ("muon",)),
    Setting(
        "adjust_lr_fn", str, ("original", "match_rms_adamw"),
        "How Muon adapts the learning rate to a matrix's shape, as in torch.optim.Muon: original or match_rms_adamw.",
        ("muon",),
    ),
    Setting(
        "newton_schulz_dtype", str, ("bfloat16", "float32"),
        "dtype in which Muon orthogonalizes a matrix: bfloat16 or float32.", ("muon",),
    ),
    Setting(
        "sinkhorn_iterations", int, _COUNT, "How many times SinkGD scales the rows and columns of a gradient.",
        ("sinkgd",),
    ),
    Setting(
        "rest_optimizer", str, ("adamw", "adafactor"),
        "Optimizer for what Muon and SinkGD do not handle (embeddings, output head and vectors): adamw or adafactor.",
        MATRIX_OPTIMIZERS,
    ),
    Setting(
        "rest_lr_ratio", float, _POSITIVE, "Learning rate of rest_optimizer, as a multiple of the rate for matrices.",
        MATRIX_OPTIMIZERS,
    ),
    Setting(
        "schedule", str, ("half_life", "power"),
        "How Adafactor's second moment decays: half_life, per token; or power, 1 - step ** -beta2, with 0.8 by default.",
        _ADAFACTORS,
    ),
    Setting("relative_step", bool, None, "Scale Adafactor's step by each parameter's RMS.", _ADAFACTORS),
    Setting(
        "clip_threshold", float, _POSITIVE, "Largest RMS of one Adafactor update before the learning rate.", _ADAFACTORS,
    ),
    Setting(
        "min_dim_size_to_factor", int, _COUNT,
        "Adafactor factors the second moment of matrices whose shorter side is at least this; default: 128.",
        ("adafactor",),
    ),
    Setting(
        "eps", float, _POSITIVE, "Keeps divisions by small second moments finite.",
        (*_WITH_SECOND_MOMENT, *_TRANSFORMERS_ADAMS), argument="optimizer_eps", transformers_argument="adam_epsilon",
    ),
    Setting("weight_decay", float, Range(0), "Decoupled weight decay.", _ALL, transformers_argument="weight_decay"),
    Setting(
        "stochastic_rounding", bool, None,
        "Round new bfloat16 weights stochastically; otherwise to nearest, which loses small updates.",
        OPTIMIZERS, default=True,
    ),
    Setting(
        "gradient_release", bool, None, "Update each parameter inside the backward pass and free its gradient.",
        OPTIMIZERS, of_trainer=True, default=True,
    ),
    Setting(
        "cuda_graphs", bool, None, "On a GPU, launch whole training steps at once (CUDA graphs); for small models.",
        OPTIMIZERS, of_trainer=True, default=False,
    ),
    Setting(
        "sliced_vocabulary", bool, None,
        "Update embeddings and output head without making their whole gradient; default: on a CPU, for steps with few labels.",
        ("adafactor", "sgd"), of_trainer=True,
    ),
    Setting(
        "max_skipped_steps", int, _COUNT, "Stop after this many steps in a row whose loss is not finite.",
        _ALL, of_trainer=True, default=20,
    ),
    Setting(
        "logits_free_loss", bool, None,
        "Compute the loss without holding the logits of all tokens in memory, where this leaves the model's loss as it is.",
        _ALL, of_trainer=True, default=True,
    ),
    Setting(
        "seed", int, Range(0), "Seed of stochastic rounding; default: that of the training.",
        OPTIMIZERS, argument="rounding_seed",
    ),
    Setting(
        "doubling_examples", int, _COUNT,
        "The batch doubles each time this many more examples (in pretraining: windows) were seen; the learning rate follows "
        "the examples.",
        of_trainer=True, section="batch_schedule", required=True, argument="batch_doubling_examples",
    ),
    Setting(
        "largest", int, _COUNT, "Upper limit of the batch that doubles, in examples per step.",
        of_trainer=True, section="batch_schedule", required=True, argument="largest_batch_size",
    ),
    Setting(
        "per_device_train_batch_size", int, Range(1, _LARGEST_BATCH),
        "Examples per step on each device; averages are measured in tokens, so that one is enough.",
        of_trainer=True, section="training", default=1,
    ),
    Setting(
        "gradient_accumulation_steps", int, Range(1, _LARGEST_BATCH),
        "Backward passes per update; more than one requires gradients that are not released.",
        of_trainer=True, section="training", default=1,
    ),
    Setting(
        "learning_rate", float, Range(0),
        "Peak learning rate; with Adafactor's relative step, a weight's relative change per step.",
        of_trainer=True, section="training", default=1e-4,
    ),
    Setting(
        "lr_scheduler_type", str, None, "Course of the learning rate, such as constant, linear or cosine.",
        of_trainer=True, section="training", default="constant",
    ),
    # transformers takes any number here. What a recipe takes is in `sbft.recipe.training_keys`.
    Setting(
        "max_grad_norm", float, None, "Clip the global gradient norm to this; requires gradients that are not released.",
        of_trainer=True, section="training", default=0.0,
    ),
    Setting(
        "bf16", bool, None, "Autocast to bfloat16; not needed where the weights are bfloat16, which is the default.",
        of_trainer=True, section=None, default=False,
    ),
    Setting(
        "token_optimizer", str, OPTIMIZERS,
        f"Optimizer of sbft: {', '.join(OPTIMIZERS[:-1])} or {OPTIMIZERS[-1]}; None for the one that `optim` names.",
        of_trainer=True, section=None, default="adafactor",
    ),
    Setting(
        "weights", str, None,
        "What weights are stored in: float32, bfloat16, int12, int8 or int4; or formats by patterns of their names, such as "
        "{default: int4, lm_head: int8}.",
        OPTIMIZERS, of_trainer=True, section=None,
    ),
    Setting(
        "offload", str, None,
        "Keep layers in the host's memory and stream them through the device: layers, for all of them; or "
        "{layers: N, activations: true} for N of them, and the saved inputs of layers too.",
        _ALL, of_trainer=True, section=None,
    ),
    Setting(
        "cast_weights", bool, None, "With stochastic rounding, cast a float32 model to bfloat16 before training.",
        of_trainer=True, section=None, default=True,
    ),
)  # fmt: skip
"""In the order in which a resolved recipe has them."""

ARGUMENTS = {setting.trainer_name: setting for setting in SETTINGS}
"""The settings by their names among the trainer's arguments."""

RIVALS = tuple((str(setting.section), setting.name, setting.rival) for setting in SETTINGS if setting.rival)
"""A section of a recipe, and two of its keys that set the same thing in two ways."""


def settings_in(section: str) -> dict[str, Setting]:
    """The settings in a section of a recipe, by their keys."""
    return {setting.name: setting for setting in SETTINGS if setting.section == section}


OPTIMIZER_KEYS = {
    optimizer: frozenset(name for name, setting in settings_in("optimizer").items() if optimizer in setting.optimizers)
    for optimizer in _ALL
}
"""The keys of a recipe's `optimizer` section that have an effect with each optimizer."""
