"""The methods: plain data, used by recipes, runs, and code that lists them.

This is beside the recipe and not in `training/`: checking a recipe requires its method, and must require neither torch nor
anything above the recipe.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sbft.recipe.settings import OPTIMIZER_KEYS
from sbft.tokens import FINE_TUNING_HALF_LIFE

_TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "seed": 0,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
}


@dataclass(frozen=True)
class Method:
    """One way to fine-tune: an optimizer, and the defaults of recipes that name the method."""

    summary: str
    optimizer: str
    """One of `sbft.recipe.settings.OPTIMIZERS`, or of the `TRANSFORMERS_OPTIMIZERS` there."""
    learning_rate: float
    dtype: str
    optimizer_defaults: dict[str, Any]
    training_defaults: dict[str, Any] = field(default_factory=dict)
    lora_defaults: dict[str, Any] | None = None
    """Settings of the adapter; None: all weights are trained."""
    quantization: Literal["nf4"] | None = None
    """How the weights under the adapter are stored; None: in the recipe's dtype."""
    weights: str | None = None
    """What the weights are stored in, if that is not the recipe's dtype."""
    packages: dict[str, str] = field(default_factory=dict)
    """The modules that the method requires beyond sbft's own dependencies, and the extra of sbft that installs each."""

    @property
    def missing_packages(self) -> list[str]:
        """Packages of the method that are not installed here."""
        return [package for package in self.packages if importlib.util.find_spec(package) is None]

    @property
    def settings(self) -> frozenset[str]:
        """The keys of the recipe's `optimizer` section that this method uses."""
        return OPTIMIZER_KEYS[self.optimizer]

    def defaults(self) -> dict[str, dict[str, Any]]:
        """The sections of a recipe with this method's defaults."""
        recipe = {
            "optimizer": dict(self.optimizer_defaults),
            "training": {**_TRAINING, "learning_rate": self.learning_rate, **self.training_defaults},
        }
        if self.lora_defaults is not None:
            recipe["lora"] = dict(self.lora_defaults)
        return recipe


_LOW_MEMORY = {"stochastic_rounding": True, "gradient_release": True, "max_skipped_steps": 20}
_HALF_LIFE = {"second_moment_half_life": round(FINE_TUNING_HALF_LIFE)}
_RELATIVE_ADAFACTOR = {
    **_HALF_LIFE,
    "schedule": "half_life",
    "relative_step": True,
    "clip_threshold": 1.0,
    "eps": 1e-30,
    "weight_decay": 0.0,
    **_LOW_MEMORY,
}
_ADAM = {"beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0}
_FULL_ADAM = {**_ADAM, "stochastic_rounding": False, "gradient_release": False, "max_skipped_steps": 20}
# What the paper (arXiv 2507.07101) compares with at batch 16: the usual beta2 per step, whatever its number of tokens.
_ADAM_OF_BATCH_16 = {**_FULL_ADAM, "beta2": 0.95}
# torch's, bitsandbytes' and transformers' own default.
_USUAL_ADAM = {**_ADAM, "beta2": 0.999}
_LORA = {
    "rank": 16,
    "alpha": 32,
    "dropout": 0.0,
    "rslora": False,
    "dora": False,
    "target_modules": "all-linear",
}
# adam8bit and hf-adafactor are what people run with transformers' unchanged Trainer: it clips the gradient's norm, and
# computes the loss from the logits of all tokens.
_PLAIN_TRAINER = {"max_grad_norm": 1.0}
# The default of transformers' TrainingArguments, which most people leave as it is.
_USUAL_LEARNING_RATE = 5e-5

_SBFT = Method(
    summary="All weights, Adafactor at batch size 1, bfloat16 with stochastic rounding, gradients released.",
    optimizer="adafactor",
    # Relative to each parameter's RMS.
    learning_rate=1e-4,
    dtype="bfloat16",
    optimizer_defaults=_RELATIVE_ADAFACTOR,
)

METHODS: dict[str, Method] = {
    "sbft": _SBFT,
    **{
        f"sbft-{name}": replace(
            _SBFT,
            summary=f"As sbft, the weights in {bits} bits, stochastically rounded: {memory} of the memory of bfloat16.",
            weights=name,
        )
        for name, bits, memory in (("int12", 12, "three quarters"), ("int8", 8, "half"), ("int4", 4, "0.28"))
    },
    "sgd": Method(
        summary="All weights, SGD without momentum, otherwise as sbft: no optimizer state at all.",
        optimizer="sgd",
        learning_rate=1e-2,
        dtype="bfloat16",
        optimizer_defaults={"momentum": 0.0, "weight_decay": 0.0, **_LOW_MEMORY},
    ),
    "adam": Method(
        summary="All weights, AdamW at batch size 1, weights, gradients and both moments in float32.",
        optimizer="adamw",
        learning_rate=1e-5,
        dtype="float32",
        optimizer_defaults={**_HALF_LIFE, **_FULL_ADAM},
    ),
    "adam-accum": Method(
        summary="AdamW in float32, gradients accumulated over 16 examples, beta2 0.95: the usual, to compare with.",
        optimizer="adamw",
        learning_rate=1e-5,
        dtype="float32",
        optimizer_defaults=_ADAM_OF_BATCH_16,
        training_defaults={"gradient_accumulation_steps": 16},
    ),
    "adam-batch": Method(
        summary="As adam-accum, the 16 examples of a step as one batch.",
        optimizer="adamw",
        learning_rate=1e-5,
        dtype="float32",
        optimizer_defaults=_ADAM_OF_BATCH_16,
        training_defaults={"per_device_train_batch_size": 16},
    ),
    "muon": Method(
        summary="All weights, Muon for matrices and AdamW for the rest, bfloat16 with stochastic rounding.",
        optimizer="muon",
        # With match_rms_adamw a rate means to Muon what it means to AdamW (arXiv 2502.16982, section 2.2): that of adam.
        learning_rate=1e-5,
        dtype="bfloat16",
        optimizer_defaults={
            **_HALF_LIFE,
            # Of torch.optim.Muon and of its author; the rest as in arXiv 2502.16982.
            "momentum": 0.95,
            "nesterov": True,
            "adjust_lr_fn": "match_rms_adamw",
            "newton_schulz_dtype": "bfloat16",
            "rest_optimizer": "adamw",
            "rest_lr_ratio": 1.0,
            "weight_decay": 0.0,
            **_LOW_MEMORY,
        },
    ),
    "sinkgd": Method(
        summary="All weights, SinkGD without state for matrices and Adafactor for the rest, otherwise as sbft.",
        optimizer="sinkgd",
        # Its authors pretrain at 1e-3, the rest at 20 times that, where Adam's rate is of the same size (arXiv 2502.06742,
        # section 5): here too it is adam's.
        learning_rate=1e-5,
        dtype="bfloat16",
        optimizer_defaults={
            **_HALF_LIFE,
            "sinkhorn_iterations": 5,
            "rest_optimizer": "adafactor",
            "rest_lr_ratio": 20.0,
            "weight_decay": 0.0,
            **_LOW_MEMORY,
        },
    ),
    "row-adafactor": Method(
        summary="As sbft, with a second moment of one number for each row of a matrix: half the optimizer state.",
        optimizer="row_adafactor",
        learning_rate=1e-4,
        dtype="bfloat16",
        optimizer_defaults=_RELATIVE_ADAFACTOR,
    ),
    "adam8bit": Method(
        summary="All weights in bfloat16, AdamW8bit of bitsandbytes, gradients accumulated over 16 examples.",
        optimizer="bitsandbytes_adamw8bit",
        learning_rate=_USUAL_LEARNING_RATE,
        dtype="bfloat16",
        optimizer_defaults={**_USUAL_ADAM, "logits_free_loss": False},
        training_defaults={"gradient_accumulation_steps": 16, **_PLAIN_TRAINER},
        packages={"bitsandbytes": "bitsandbytes"},
    ),
    "hf-adafactor": Method(
        summary="All weights in bfloat16 rounded to the nearest, Adafactor of transformers as its Trainer makes it.",
        optimizer="transformers_adafactor",
        learning_rate=_USUAL_LEARNING_RATE,
        dtype="bfloat16",
        optimizer_defaults={"weight_decay": 0.0, "logits_free_loss": False},
        training_defaults=_PLAIN_TRAINER,
    ),
    "lora": Method(
        summary="PEFT LoRA of rank 16 on every linear layer: bfloat16 base, float32 adapters, torch's AdamW.",
        optimizer="torch_adamw",
        learning_rate=2e-4,
        dtype="bfloat16",
        optimizer_defaults=_USUAL_ADAM,
        lora_defaults=_LORA,
        packages={"peft": "lora"},
    ),
    "qlora": Method(
        summary="As lora, over a base in 4 bits: NF4 with double quantization, computing in bfloat16.",
        optimizer="torch_adamw",
        # That of the QLoRA paper for its models of 7 and 13 billion weights (arXiv 2305.14314).
        learning_rate=2e-4,
        dtype="bfloat16",
        optimizer_defaults=_USUAL_ADAM,
        lora_defaults=_LORA,
        quantization="nf4",
        packages={"peft": "lora", "bitsandbytes": "bitsandbytes"},
    ),
}
