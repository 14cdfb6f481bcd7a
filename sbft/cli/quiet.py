"""Keeps what the libraries below say of themselves off the terminal, up to their errors."""

from __future__ import annotations


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
