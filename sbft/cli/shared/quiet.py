"""Keeps what the libraries below say of themselves off the terminal, up to their errors."""

from __future__ import annotations

import logging
import warnings

_NOISY_IMPORTS = ("bitsandbytes", "torchao", "torch.utils._pytree")
"""Loggers of packages that transformers and PEFT import where they find them, and that tell what they lack."""


def quiet_imports() -> None:
    """No notes from packages that are imported along and not used; to be called before transformers is imported."""
    for name in _NOISY_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    # PEFT asks the model by the name that transformers has given up.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    # FSDP2 over tensor parallelism, for each kind of module; models that are trained so end in the weights of one process.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)


def quiet_libraries() -> None:
    """No bars and no notes from transformers, datasets and the hub's client: sbft says what happens."""
    import datasets
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
