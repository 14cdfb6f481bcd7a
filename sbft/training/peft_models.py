"""Questions about PEFT models; peft need not be installed."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils import is_peft_available


def is_peft_model(model: Any) -> bool:
    """Whether a model is an adapter of PEFT on another model."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def unwrap(model: Any) -> nn.Module:
    """The model inside a PEFT model; any other model as it is."""
    inner: nn.Module = model.get_base_model() if is_peft_model(model) else model
    return inner


def learns_a_prompt(model: Any) -> bool:
    """Whether the PEFT method puts learned positions in front of the inputs."""
    return is_peft_model(model) and bool(model.active_peft_config.is_prompt_learning)


def learns_keys(model: Any) -> bool:
    """Whether the PEFT method puts learned keys and values into the cache, as prefix tuning does."""
    return is_peft_model(model) and bool(model.active_peft_config.peft_type == "PREFIX_TUNING")
