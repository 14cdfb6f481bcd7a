"""Trial saves, which show what would fail before training starts, and saves that keep the weights if another part fails."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.utils import logging as transformers_logging

from sbft.errors import TrainingError
from sbft.grid.grid_files import dense_state, has_grid_weights, save_dense
from sbft.native.memory import stored_tensors
from sbft.optim.sharding import is_sharded
from sbft.training.checkpointing.disk_errors import refusal
from sbft.training.generation_config import generator_of
from sbft.training.peft_models import is_peft_model

logger = logging.getLogger(__name__)

_GENERATION = "The generation config"
_Save = Callable[[], object]


class SavingError(TrainingError):
    """A part of a trained model cannot be saved."""


def try_saving(model: nn.Module, processor: Any = None, args: Any = None, folder: Path | None = None) -> None:
    """Save everything but the weights of a model to a temporary folder, in the way it will be saved after training.

    Args:
        model: its configs and custom code are saved, and tensors of one element instead of its weights.
        processor: the tokenizer, or another processor of the model; None: there is none.
        args: the trainer's; None: there are none.
        folder: in which the temporary folder is made, and which is made if needed; None: the system's temporary folder.

    Raises:
        SavingError: if a part of it cannot be saved.
    """
    with _temporary_folder(folder) as temporary:
        for what, save in {**_trial_saves(model, temporary), **_companions(processor, args, temporary)}.items():
            try:
                with _quiet():
                    save()
            except Exception as error:  # the code of a model or a tokenizer may raise anything
                raise SavingError(
                    f"{what} cannot be saved, and training would have failed at the first save: {_in_words(error)} Fix it "
                    "before you train; nothing has been trained."
                ) from error


def save_all_that_can_be(
    model: nn.Module, processor: Any, folder: Path, args: Any = None, *, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Exception]:
    """Save a model with its configs and its processor. If one part fails, the others are still saved, above all the weights.

    Args:
        model: the trained model.
        processor: the tokenizer, or another processor of the model; None: there is none.
        folder: exists.
        args: the trainer's; None: there are none.
        state_dict: the weights, if they are not those in the model.

    Returns:
        The parts that could not be saved, and why.

    Raises:
        OSError, SafetensorError: if the disk refuses to write.
    """
    unsaved: dict[str, Exception] = {}
    try:
        if _has_configs(model):
            if state_dict is None and isinstance(model, PreTrainedModel) and has_grid_weights(model):
                save_dense(model, folder)
            else:
                model.save_pretrained(folder, state_dict=state_dict)  # type: ignore[operator]
        else:
            save_weights_alone(model, folder, state_dict)
    except Exception as error:
        raise_if_nothing_can_be_saved(error)
        # `save_pretrained` writes the weights last, and has failed before.
        save_weights_alone(model, folder, state_dict)
        unsaved = save_configs(model, None, folder) or {"The model": error}
    # PEFT saves no generation config with an adapter, although its turns may end with other tokens than its base model's.
    generation = _generation(model, folder) if is_peft_model(model) and _GENERATION not in unsaved else {}
    return {**unsaved, **_save_each({**generation, **_companions(processor, args, folder)})}


def save_configs(model: nn.Module, processor: Any, folder: Path, args: Any = None) -> dict[str, Exception]:
    """As `save_all_that_can_be`, for a model whose weights are already written."""
    unsaved = _save_each({**_configs(model, folder), **_companions(processor, args, folder)})
    for path in folder.glob("*.json"):  # a save may open its file before it fails
        if path.stat().st_size == 0:
            path.unlink()
    return unsaved


def save_generation_of_adapter(model: nn.Module, folder: Path) -> None:
    """Write the generation config of an adapter, which PEFT does not save. Other models are left alone."""
    if is_peft_model(model):
        for save in _generation(model, folder).values():
            save()


def save_weights_alone(model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the weights of a model, or of an adapter without its base model, under the names that they have in memory."""
    state_dict, name = model.state_dict() if state_dict is None else state_dict, "model"
    if is_peft_model(model):
        from peft import get_peft_model_state_dict

        state_dict, name = get_peft_model_state_dict(model, state_dict, save_embedding_layers=False), "adapter_model"
    state_dict = dense_state(state_dict)
    # It writes shared weights once, whereas safetensors refuses them unless the model declares that they are shared.
    save_torch_state_dict(state_dict, folder, filename_pattern=f"{name}{{suffix}}.safetensors")


def describe_unsaved(unsaved: dict[str, Exception], folder: Path) -> SavingError:
    """An error that says what is missing in the folder next to the weights."""
    what, error = next(iter(unsaved.items()))
    more = "".join(f" Nor could {part[0].lower()}{part[1:]}." for part in list(unsaved)[1:])
    return SavingError(
        f"The trained weights are in {folder}, but {what[0].lower()}{what[1:]} could not be saved there: "
        f"{_in_words(error)}{more} Copy what is missing from the model that training started with."
    )


def _save_each(saves: dict[str, _Save]) -> dict[str, Exception]:
    """Try them all; returns those that failed."""
    unsaved = {}
    for what, save in saves.items():
        try:
            save()
        except Exception as error:
            raise_if_nothing_can_be_saved(error)
            unsaved[what] = error
    return unsaved


def raise_if_nothing_can_be_saved(error: Exception) -> None:
    """Raise the error if the disk refuses or memory is exhausted, since nothing else could be saved either."""
    if refusal(error) is not None or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        raise error


def _has_configs(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) or is_peft_model(model)


def _trial_saves(model: Any, folder: Path) -> dict[str, _Save]:
    """What saves a model's configs, and the model itself with placeholders for its weights."""
    saves = _configs(model, folder)
    if any(map(is_sharded, model.parameters())) or is_peft_model(model) or vars(model).get("hf_quantizer") is not None:
        return saves
    if isinstance(model, PreTrainedModel):
        saves["The model"] = lambda: model.save_pretrained(
            folder, state_dict=_placeholders(model.state_dict()), save_original_format=False
        )
    elif not hasattr(model, "save_pretrained"):  # another library's, which saves in its own way
        saves["The model"] = lambda: save_file(_placeholders(model.state_dict()), folder / "model.safetensors")
    return saves


def _configs(model: Any, folder: Path) -> dict[str, _Save]:
    """What saves each part of a model except its weights."""
    saves: dict[str, _Save] = {}
    if is_peft_model(model):
        saves["The adapter's config"] = lambda: [
            config.save_pretrained(folder) for config in model.peft_config.values()
        ]
        saves["The adapter's card"] = lambda: model.create_or_update_model_card(str(folder))
    elif isinstance(model, PreTrainedModel):
        saves["The model's config"] = lambda: model.config.save_pretrained(folder)
    return {**saves, **_generation(model, folder)}


def _generation(model: Any, folder: Path) -> dict[str, _Save]:
    generator = generator_of(model)
    return {} if generator is None else {_GENERATION: lambda: generator.generation_config.save_pretrained(folder)}


def _companions(processor: Any, args: Any, folder: Path) -> dict[str, _Save]:
    """What saves the processor and the arguments."""
    saves: dict[str, _Save] = {}
    if processor is not None:
        what = "The tokenizer" if isinstance(processor, PreTrainedTokenizerBase) else f"The {type(processor).__name__}"
        saves[what] = lambda: processor.save_pretrained(folder)
    if args is not None:
        saves["The training arguments"] = lambda: torch.save(args, folder / TRAINING_ARGS_NAME)
    return saves


def _placeholders(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tensor of one element for each weight, shared where the weights are: transformers refuses undeclared sharing."""
    shared: dict[tuple[Any, ...], Tensor] = {}
    return {
        name: shared.setdefault(
            (weight.device, stored_tensors(weight)[0].data_ptr() or name), torch.zeros(1, dtype=weight.dtype)
        )
        for name, weight in state.items()
        if isinstance(weight, Tensor)
    }


@contextlib.contextmanager
def _temporary_folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="trial-save-") as name:
        yield Path(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for a trial, and no warnings, which the real save will repeat."""
    bar, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(transformers_logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split())[:300] or "no reason given"
    return f"{type(error).__name__}: {text.rstrip('.')}."
