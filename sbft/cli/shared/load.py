"""A model on the best available device, for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_for_use(
    name: str, dtype: str = "bfloat16", *, trust_remote_code: bool = False, allow_pickle: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer. On a CPU, memory pool and matrix products are set up as in training.

    Args:
        name: folder of a run (LoRA adapters too), any checkpoint, hub id, or builtin:NAME.
        dtype: `bfloat16` or `float32`.
        trust_remote_code: run model code that comes with a hub id.
        allow_pickle: read weights that are stored as a pickle.

    Raises:
        ModelError: if it cannot be loaded.
    """
    import torch

    from sbft.models.load import load_model, load_tokenizer
    from sbft.native.memory_pool import use_pool
    from sbft.native.onednn_products import keep_few_products

    if not torch.accelerator.is_available():
        use_pool()
        keep_few_products()  # prompts have many lengths
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    model = load_model(
        name, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, allow_pickle=allow_pickle
    ).eval()
    if torch.accelerator.is_available():
        # In transformers, the type of `to` is that of a wrapper that takes no device.
        torch.nn.Module.to(model, torch.accelerator.current_accelerator())
    return model, tokenizer


def asked_for(trust_remote_code: bool, allow_pickle: bool) -> list[str]:
    """Overrides of a recipe that came with a model: only the user, not the recipe, may allow a stranger's code."""
    return [f"trust_remote_code={str(trust_remote_code).lower()}", f"allow_pickle={str(allow_pickle).lower()}"]
