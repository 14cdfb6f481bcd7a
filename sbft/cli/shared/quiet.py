"""Keep the messages of libraries off the terminal, except errors."""

from __future__ import annotations

import logging
import warnings

_NOISY_IMPORTS = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers of packages that transformers and PEFT import if present, and that report what they lack."""


def quiet_imports() -> None:
    """Silence packages that are imported but not used. Call this before transformers is imported."""
    for name in _NOISY_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # PEFT still uses the name that transformers has deprecated.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # FSDP2 over tensor parallelism warns for each kind of module. Such models do train to the weights of one process.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


def quiet_libraries() -> None:
    """Turn off bars and notes of transformers, datasets and the hub's client: sbft says what happens."""
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
