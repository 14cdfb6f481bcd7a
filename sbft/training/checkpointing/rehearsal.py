"""What can make a save fail is found before the first step, and weights are saved whatever happens to the rest."""

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
from sbft.optim.sharding import is_sharded
from sbft.training.checkpointing.disk_errors import refusal
from sbft.training.generation_config import generator_of
from sbft.training.peft_models import is_peft_model

logger = logging.getLogger(__name__)

_GENERATION = "The generation config"
_Act = Callable[[], object]


class SavingError(TrainingError):
    """Something that belongs to a trained model cannot be saved."""


def rehearse_saving(model: nn.Module, processor: Any = None, args: Any = None, folder: Path | None = None) -> None:
    """Save all but the weights of a model to a scratch folder, as it will be saved when it is trained.

    Args:
        model: whose configs and custom code are saved, with stand-ins of one element for its weights.
        processor: the tokenizer, or whatever goes with the model; None: nothing.
        args: the trainer's; None: none.
        folder: where the scratch folder is made, which may not exist; None: where the system keeps temporary files.

    Raises:
        SavingError: if something of it cannot be saved.
    """
    with _scratch(folder) as scratch:
        for what, save in {**_rehearsed(model, scratch), **_with_it(processor, args, scratch)}.items():
            try:
                with _quiet():
                    save()
            except Exception as error:  # whatever a model's or a tokenizer's own code raises
                raise SavingError(
                    f"{what} cannot be saved, which would only have shown after training: {_in_words(error)} Correct it "
                    "before you train; nothing has been trained."
                ) from error


def save_all_that_can_be(
    model: nn.Module, processor: Any, folder: Path, args: Any = None, *, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Exception]:
    """Save a model and what goes with it; where one thing fails, the others are saved nevertheless, the weights first of all.

    Args:
        model: the trained model.
        processor: the tokenizer, or whatever goes with it; None: nothing.
        folder: exists.
        args: the trainer's; None: none.
        state_dict: the weights, where they are not to be taken from the model.

    Returns:
        What could not be saved, and why.

    Raises:
        OSError, SafetensorError: if the disk refuses.
    """
    unsaved: dict[str, Exception] = {}
    try:
        if _has_configs(model):
            model.save_pretrained(folder, state_dict=state_dict)  # type: ignore[operator]
        else:
            save_weights_alone(model, folder, state_dict)
    except Exception as error:
        raise_if_nothing_can_be_saved(error)
        # Its weights come last, after all else that may fail.
        save_weights_alone(model, folder, state_dict)
        unsaved = save_configs(model, None, folder) or {"The model": error}
    # PEFT saves none beside an adapter, whose turns may end otherwise than its base model's.
    beside = _generation(model, folder) if is_peft_model(model) and _GENERATION not in unsaved else {}
    return {**unsaved, **_save_each({**beside, **_with_it(processor, args, folder)})}


def save_configs(model: nn.Module, processor: Any, folder: Path, args: Any = None) -> dict[str, Exception]:
    """As `save_all_that_can_be`, of a model whose weights have been written otherwise."""
    unsaved = _save_each({**_configs(model, folder), **_with_it(processor, args, folder)})
    for path in folder.glob("*.json"):  # which was opened before what it should hold was made
        if path.stat().st_size == 0:
            path.unlink()
    return unsaved


def save_generation_of_adapter(model: nn.Module, folder: Path) -> None:
    """Write the generation config of an adapter's model, if it is one: PEFT saves none."""
    if is_peft_model(model):
        for save in _generation(model, folder).values():
            save()


def save_weights_alone(model: nn.Module, folder: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """Write the weights of a model, of an adapter its own alone, under the names that they have in memory."""
    state_dict, name = model.state_dict() if state_dict is None else state_dict, "model"
    if is_peft_model(model):
        from peft import get_peft_model_state_dict

        state_dict, name = get_peft_model_state_dict(model, state_dict, save_embedding_layers=False), "adapter_model"
    # Of weights that are one, it keeps one, where safetensors refuses those whose sharing is not declared.
    save_torch_state_dict(state_dict, folder, filename_pattern=f"{name}{{suffix}}.safetensors")


def describe_unsaved(unsaved: dict[str, Exception], folder: Path) -> SavingError:
    """A sentence on what is not in the folder, beside the weights that are."""
    what, error = next(iter(unsaved.items()))
    others = "".join(f" Nor could {other[0].lower()}{other[1:]}." for other in list(unsaved)[1:])
    return SavingError(
        f"The trained weights are in {folder}, but {what[0].lower()}{what[1:]} could not be saved there: "
        f"{_in_words(error)}{others} Copy what is missing from the model that training began with."
    )


def _save_each(acts: dict[str, _Act]) -> dict[str, Exception]:
    unsaved = {}
    for what, save in acts.items():
        try:
            save()
        except Exception as error:
            raise_if_nothing_can_be_saved(error)
            unsaved[what] = error
    return unsaved


def raise_if_nothing_can_be_saved(error: Exception) -> None:
    """Raise the error where the disk refuses or memory is out: nothing else can be saved either."""
    if refusal(error) is not None or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        raise error


def _has_configs(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) or is_peft_model(model)


def _rehearsed(model: Any, folder: Path) -> dict[str, _Act]:
    """What a model is saved with, and itself with stand-ins for its weights."""
    acts = _configs(model, folder)
    if any(map(is_sharded, model.parameters())) or is_peft_model(model) or vars(model).get("hf_quantizer") is not None:
        return acts
    if isinstance(model, PreTrainedModel):
        acts["The model"] = lambda: model.save_pretrained(
            folder, state_dict=_stand_ins(model.state_dict()), save_original_format=False
        )
    elif not hasattr(model, "save_pretrained"):  # of a library that saves it its own way
        acts["The model"] = lambda: save_file(_stand_ins(model.state_dict()), folder / "model.safetensors")
    return acts


def _configs(model: Any, folder: Path) -> dict[str, _Act]:
    """What saves each part of a model but its weights."""
    acts: dict[str, _Act] = {}
    if is_peft_model(model):
        acts["The adapter's config"] = lambda: [one.save_pretrained(folder) for one in model.peft_config.values()]
        acts["The adapter's card"] = lambda: model.create_or_update_model_card(str(folder))
    elif isinstance(model, PreTrainedModel):
        acts["The model's config"] = lambda: model.config.save_pretrained(folder)
    return {**acts, **_generation(model, folder)}


def _generation(model: Any, folder: Path) -> dict[str, _Act]:
    generator = generator_of(model)
    return {} if generator is None else {_GENERATION: lambda: generator.generation_config.save_pretrained(folder)}


def _with_it(processor: Any, args: Any, folder: Path) -> dict[str, _Act]:
    acts: dict[str, _Act] = {}
    if processor is not None:
        what = "The tokenizer" if isinstance(processor, PreTrainedTokenizerBase) else f"The {type(processor).__name__}"
        acts[what] = lambda: processor.save_pretrained(folder)
    if args is not None:
        acts["The training arguments"] = lambda: torch.save(args, folder / TRAINING_ARGS_NAME)
    return acts


def _stand_ins(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One element for each weight. Names of one weight share one here too: transformers refuses what it does not know of."""
    shared: dict[tuple[Any, ...], Tensor] = {}
    return {
        name: shared.setdefault((one.device, one.data_ptr() or name), torch.zeros(1, dtype=one.dtype))
        for name, one in state.items()
        if isinstance(one, Tensor)
    }


@contextlib.contextmanager
def _scratch(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="rehearsal-") as name:
        yield Path(name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for what nobody keeps, and no warning that the save itself will bring."""
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
    said = " ".join(str(error).split())[:300] or "no reason given"
    return f"{type(error).__name__}: {said.rstrip('.')}."
