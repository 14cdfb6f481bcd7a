"""What each compared method is: plain data, read by the recipe, the run, and whoever only wants to list them.

This lies beside the recipe and not in `training/`, because a recipe cannot be checked without knowing its method, and
checking one must need neither torch nor anything above it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sbft.tokens import FINE_TUNING_HALF_LIFE

_SECOND_MOMENT = frozenset({"second_moment_half_life", "beta2", "eps", "weight_decay"})
_FIRST_MOMENT = frozenset({"first_moment_half_life", "beta1"})
_OURS = frozenset({"stochastic_rounding", "gradient_release", "max_skipped_steps", "logits_free_loss", "seed"})

OPTIMIZER_SETTINGS: dict[str, frozenset[str]] = {
    "adafactor": _SECOND_MOMENT | _OURS | {"schedule", "relative_step", "clip_threshold"},
    "adamw": _SECOND_MOMENT | _FIRST_MOMENT | _OURS,
    "sgd": frozenset({"momentum", "momentum_half_life", "weight_decay"}) | _OURS,
    "torch_adamw": frozenset({"beta1", "beta2", "eps", "weight_decay", "max_skipped_steps", "logits_free_loss"}),
}
"""The keys of a recipe's `optimizer` section that each optimizer understands."""

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
    """One way to fine-tune: an optimizer, and what a recipe that names the method starts from."""

    summary: str
    optimizer: str
    """`adafactor`, `adamw` or `sgd` of sbft, or `torch_adamw`."""
    learning_rate: float
    dtype: str
    optimizer_defaults: dict[str, Any]
    training_defaults: dict[str, Any] = field(default_factory=dict)
    lora_defaults: dict[str, Any] | None = None
    """Settings of the adapter; None: all weights are trained."""
    package: str | None = None
    """The module that the method needs beyond sbft's own dependencies."""
    extra: str | None = None
    """The extra that installs it."""

    @property
    def settings(self) -> frozenset[str]:
        """The keys of the recipe's `optimizer` section that mean something to this method."""
        return OPTIMIZER_SETTINGS[self.optimizer]

    def defaults(self) -> dict[str, dict[str, Any]]:
        """The sections of a recipe that naming this method stands for."""
        recipe = {
            "optimizer": dict(self.optimizer_defaults),
            "training": {**_TRAINING, "learning_rate": self.learning_rate, **self.training_defaults},
        }
        if self.lora_defaults is not None:
            recipe["lora"] = dict(self.lora_defaults)
        return recipe


_LOW_MEMORY = {"stochastic_rounding": True, "gradient_release": True, "max_skipped_steps": 20}
_HALF_LIFE = {"second_moment_half_life": round(FINE_TUNING_HALF_LIFE)}
_FULL_ADAM = {
    **_HALF_LIFE,
    "beta1": 0.9,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "stochastic_rounding": False,
    "gradient_release": False,
    "max_skipped_steps": 20,
}

METHODS: dict[str, Method] = {
    "sbft": Method(
        summary="All weights, Adafactor at batch size 1, bfloat16 with stochastic rounding, gradients released.",
        optimizer="adafactor",
        # Relative to each parameter's RMS.
        learning_rate=1e-4,
        dtype="bfloat16",
        optimizer_defaults={
            **_HALF_LIFE,
            "schedule": "half_life",
            "relative_step": True,
            "clip_threshold": 1.0,
            "eps": 1e-30,
            "weight_decay": 0.0,
            **_LOW_MEMORY,
        },
    ),
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
        optimizer_defaults=_FULL_ADAM,
    ),
    "adam-accum": Method(
        summary="As adam, with gradients accumulated over 16 batches: what is usually done, to compare with.",
        optimizer="adamw",
        learning_rate=1e-5,
        dtype="float32",
        optimizer_defaults=_FULL_ADAM,
        training_defaults={"gradient_accumulation_steps": 16},
    ),
    "lora": Method(
        summary="PEFT LoRA of rank 16 on every linear layer: bfloat16 base, float32 adapters, torch's AdamW.",
        optimizer="torch_adamw",
        learning_rate=2e-4,
        dtype="bfloat16",
        optimizer_defaults={"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0},
        lora_defaults={"rank": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"},
        package="peft",
        extra="lora",
    ),
}
