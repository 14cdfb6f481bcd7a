"""Makes the training arguments and the trainable model of a resolved recipe."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sbft.errors import MissingPackageError, ModelError, RecipeError, how_to_install
from sbft.models.load import load_model
from sbft.models.quantized import check_bitsandbytes
from sbft.models.random_weights import training_device
from sbft.models.scratch import is_scratch, scratch_model
from sbft.native.memory_pool import use_pool
from sbft.native.onednn_products import keep_few_products
from sbft.recipe import Recipe
from sbft.recipe.methods import METHODS, Method
from sbft.recipe.settings import settings_in
from sbft.runs.ranks import DEFAULT_TIMEOUT_S, join_on_cpu
from sbft.training.arguments import SmallBatchTrainingArguments

__all__ = ["METHODS", "Method", "prepare_model", "training_arguments"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# Optimizers that transformers' Trainer makes, and its name for each.
_OPTIM = {
    # What transformers takes by default: for an adapter of many small tensors, three times as fast as its plain form.
    "torch_adamw": "adamw_torch_fused",
    # The Trainer keeps the moments of embeddings in 32 bits, as bitsandbytes advises.
    "bitsandbytes_adamw8bit": "adamw_bnb_8bit",
    "transformers_adafactor": "adafactor",
}


def training_arguments(recipe: Recipe, output_dir: Path) -> SmallBatchTrainingArguments:
    """The arguments of the trainer for a resolved recipe.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        output_dir: where checkpoints go.

    Raises:
        RecipeError: if transformers refuses the arguments.
    """
    optimizer = METHODS[recipe.method].optimizer
    if optimizer in _OPTIM:
        chosen: dict[str, Any] = {"token_optimizer": None, "optim": _OPTIM[optimizer]}
    else:
        chosen = {"token_optimizer": optimizer}
    for section in ("optimizer", "batch_schedule"):
        values = getattr(recipe, section)
        if values is not None:
            settings = settings_in(section)
            chosen.update(
                {
                    settings[key].argument_for(optimizer): value
                    for key, value in values.model_dump(exclude_none=True).items()
                }
            )
    # Set explicitly, because several processes on a CPU find one another only then.
    chosen["use_cpu"] = not torch.accelerator.is_available()
    # The model is loaded in the recipe's dtype, which may be float32.
    chosen["cast_weights"] = False
    chosen["weights"] = recipe.grids
    chosen["offload"] = recipe.model_dump()["offload"]
    # All weights take part in every step; searching for those that do not would cost time, and a warning.
    chosen["ddp_find_unused_parameters"] = False
    chosen.update({_current_name(name): value for name, value in recipe.training.items()})
    if chosen["use_cpu"] and chosen.get("ddp_backend") in (None, "gloo"):
        join_on_cpu(chosen.get("ddp_timeout", DEFAULT_TIMEOUT_S))
    try:
        # sbft has its own progress bar and closing lines.
        return SmallBatchTrainingArguments(output_dir=str(output_dir), disable_tqdm=True, **chosen)
    except RecipeError:
        raise
    except (ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        named = [name for name in recipe.training if re.search(rf"\b{name}\b", reason)]
        defaults = METHODS[recipe.method].defaults()["training"]
        own = [name for name, value in recipe.training.items() if defaults.get(name) != value]
        keys = ", ".join(f"training.{name}" for name in named or own or recipe.training)
        raise RecipeError(
            f"These settings of the recipe are wrong or contradict one another: {keys}. ({reason})"
        ) from error


def _current_name(name: str) -> str:
    """The name that this version of transformers has for an argument, whose older one it warns of."""
    renamed = name.replace("gradient_checkpointing", "activation_checkpointing")
    return renamed if renamed in {field.name for field in fields(SmallBatchTrainingArguments)} else name


def prepare_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """Load the model of a resolved recipe in the recipe's dtype, and make trainable what the recipe trains.

    On a CPU, this process then uses `sbft.native.memory_pool` for large tensors, and keeps few compiled matrix products.

    Args:
        recipe: as `sbft.recipe.resolve` returns it.
        tokenizer: the tokenizer of the data; a new model gets its vocabulary.

    Raises:
        ModelError: if it cannot be loaded, has none of the layers that the adapter names or of the weights that `freeze`
            names, or has nothing left to train.
        MissingPackageError: if the method's package is not installed, or does not work on this machine.
    """
    method = METHODS[recipe.method]
    _check_processes(recipe)
    if training_device().type == "cpu":
        use_pool()
        keep_few_products()
    if "bitsandbytes" in method.packages:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        check_bitsandbytes(f"Method {recipe.method}", device, optimizer=method.quantization is None)
    if is_scratch(recipe.model):
        assert tokenizer is not None
        seed, dtype = int(recipe.training.get("seed", 0)), DTYPES[str(recipe.dtype)]
        device = torch.device("cpu") if recipe.offload is not None else training_device()
        fresh = scratch_model(recipe.model, tokenizer, seed=seed, dtype=dtype, device=device)
        return make_trainable(fresh, recipe)
    model = load_model(
        recipe.model,
        dtype=DTYPES[str(recipe.dtype)],
        trust_remote_code=recipe.trust_remote_code,
        allow_pickle=recipe.allow_pickle,
        quantization=method.quantization,
        in_host_memory=recipe.offload is not None,
        distributed=None if recipe.distributed is None else recipe.distributed.model_dump(exclude_none=True),
    )
    return make_trainable(model, recipe)


def _check_processes(recipe: Recipe) -> None:
    """Refuse any other number of processes than the recipe shards the model over."""
    if recipe.distributed is None:
        return
    required = math.prod(size or 1 for size in recipe.distributed.model_dump().values())
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if required != processes:
        raise RecipeError(
            f"distributed shards the model over {required} processes, and there {'is' if processes == 1 else 'are'} "
            f"{processes}. Add --num-processes {required}, or start as many with: torchrun "
            f"--nproc-per-node {required} -m sbft train ..."
        )


def make_trainable(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Put a resolved recipe's adapter on a model, or freeze what its `freeze` names; the model is changed.

    Raises:
        ModelError: if it has none of the layers that the adapter names or of the weights that `freeze` names, or has nothing
            left to train.
        MissingPackageError: if there is an adapter, and peft is not installed.
    """
    if recipe.lora is not None:
        return _with_adapter(model, recipe, recipe.lora.model_dump())
    _freeze(model, recipe)
    return model


def _freeze(model: PreTrainedModel, recipe: Recipe) -> None:
    """Freeze the weights that the recipe's `freeze` names; a tied weight matches under any of its names."""
    # With duplicates, because a tied output head has a second name.
    named = dict(model.named_parameters(remove_duplicate=False))
    for pattern in recipe.freeze:
        frozen = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
        if pattern == "embeddings":
            frozen = _embeddings(model)
        if not frozen:
            raise ModelError(
                f"freeze names {pattern!r}, which matches no parameter of {recipe.model}. Write embeddings, or a pattern of "
                f"parameter names; the first is {next(iter(named))}, the last {list(named)[-1]}."
            )
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        raise ModelError(
            f"freeze is {recipe.freeze}, which leaves no weight of {recipe.model} to train. Remove something from it."
        )


def _embeddings(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [parameter for module in modules if module is not None for parameter in module.parameters()]


def _with_adapter(model: PreTrainedModel, recipe: Recipe, settings: dict[str, Any]) -> PreTrainedModel:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingPackageError(
            f"Method {recipe.method} requires the package peft. " + how_to_install("'sbft[lora]'")
        ) from error
    targets = settings["target_modules"]
    if isinstance(targets, str) and targets != "all-linear" and targets.isidentifier():
        targets = [targets]  # a name; PEFT reads a string as a pattern for the whole path
    config = LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        use_rslora=settings["rslora"],
        use_dora=settings["dora"],
        target_modules=targets,
        modules_to_save=settings["modules_to_save"],
        # An output head that is tied to a saved embedding is trained with it.
        ensure_weight_tying=bool(settings["modules_to_save"]) and model.config.get_text_config().tie_word_embeddings,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(int(recipe.training.get("seed", 0)))  # the adapter starts from random numbers
    try:
        # PEFT holds the adapter of a bfloat16 model in float32 (autocast_adapter_dtype).
        adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        layers = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
        raise ModelError(
            f"The adapter cannot be put on {recipe.model}: lora.target_modules is {settings['target_modules']!r}, and "
            f"the model's linear layers are called {', '.join(layers)}. Write some of them, or all-linear. ({error})"
        ) from error
    result: PreTrainedModel = adapted
    return result


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
