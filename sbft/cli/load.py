"""A model on the best device there is, to be asked rather than trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_for_use(
    name: str, dtype: str = "bfloat16", *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name: folder of a run (LoRA adapters too), any checkpoint, hub id, or builtin:NAME.
        dtype: `bfloat16` or `float32`.
        trust_remote_code: run model code that comes with a hub id.

    Raises:
        ModelError: if it cannot be loaded.
    """
    import torch

    from sbft.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    model = load_model(name, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code).eval()
    if torch.accelerator.is_available():
        # transformers types `to` by its wrapper, which takes no device.
        torch.nn.Module.to(model, torch.accelerator.current_accelerator())
    return model, tokenizer
