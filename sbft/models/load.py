"""Loads models, tokenizers and configs by name, with clear errors where they cannot be used."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from sbft.errors import MissingPackageError, ModelError, SbftError, how_to_install
from sbft.models.names import (
    PREFIX,
    adapter_config,
    base_of_adapter,
    check_folder,
    check_name,
    converted_folder,
    is_builtin,
    local_only,
    not_loaded,
    pickled,
    refuse_pickle,
    resolve,
)
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

_SHARDING = {"transformers": "5.23", "accelerate": "1.15"}
"""The first versions that can train a model which was sharded while it was loaded."""


def check_model(model: str) -> None:
    """Refuse a name that cannot be a model's. Cheap: no weights, tokenizer or data are read.

    Args:
        model: as for `load_model`, or `scratch:NAME`.

    Raises:
        ModelError: if there can be no model of this name.
    """
    if is_scratch(model):
        scratch_config(model)
    elif is_random(model):
        random_config(model)
    else:
        check_name(model)


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer that can pad.

    A tokenizer without a pad token gets one of its reserved tokens, or else its end token. That is harmless: padding is
    marked by masks and by labels of -100, never by the token itself.

    Args:
        model: as for `load_model`.
        trust_remote_code: run the Python code that comes with the tokenizer.

    Raises:
        ModelError: if there is no tokenizer of this name, or none that can pad.
    """
    if is_scratch(model):
        scratch_config(model)  # refuses an unknown size
        raise ModelError(f"The model {model} is new: its tokenizer comes with the data that it is pretrained on.")
    if is_random(model):
        random_config(model)  # refuses an unknown name
        return byte_tokenizer()
    from transformers import AutoTokenizer

    folder = resolve(model)
    if not (Path(folder) / "tokenizer_config.json").is_file():
        check_folder(model, folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=local_only(folder)
        )
    except Exception as error:  # the tokenizers package raises Exception itself
        raise not_loaded(model, folder, error, "tokenizer") from error
    if tokenizer.pad_token_id is None:
        _choose_pad_token(tokenizer)
    return tokenizer


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    reserved = ["<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|endoftext|>"]
    present = [token for token in reserved if token in vocabulary]
    pad_token = present[0] if present else tokenizer.eos_token or tokenizer.unk_token
    if pad_token is None:
        raise ModelError(
            "The tokenizer has neither a pad token nor an end token, so sequences cannot be padded or ended. "
            "Set both in its tokenizer_config.json (eos_token, pad_token)."
        )
    tokenizer.pad_token = pad_token


def load_model(
    model: str,
    *,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
    allow_pickle: bool = False,
    distributed: dict[str, Any] | None = None,
    in_host_memory: bool = False,
) -> PreTrainedModel:
    """Load a causal language model in one dtype. A folder with a LoRA adapter loads as its base with the adapter on it.

    Args:
        model: hub id, folder, `builtin:NAME`, or `random:NAME` for random weights. Of a checkpoint on a grid, the values
            are loaded.
        dtype: dtype of all weights, whatever the checkpoint holds; float16 is refused.
        trust_remote_code: run the Python code that comes with the checkpoint.
        attn_implementation: "sdpa", "eager", ...; transformers' choice when None.
        quantization: "nf4" to hold the linear layers in 4 bits, as the base of an adapter; needs bitsandbytes. An adapter
            that was trained on such a base loads it this way without being told.
        allow_pickle: read weights from a pickle if there are no safetensors. A pickle is a program; torch's reader (always
            with `weights_only=True`) runs only the parts of it that make tensors.
        distributed: sizes of transformers' DistributedConfig (`fsdp_size`, `tp_size`, ...): each process reads only its
            own shards of the weights.
        in_host_memory: leave the weights where they are read, in memory that is mapped from their files, for a trainer that
            copies them from there layer by layer; random weights are made on the CPU.

    Returns:
        The model on the CPU, in evaluation mode. Random weights are made on the device that they are trained on.

    Raises:
        ModelError: if there is no such model, the hub cannot be reached, it is not a causal language model, the checkpoint
            lacks weights or has them in a pickle, or `dtype` is float16.
        MissingPackageError: if an adapter or its 4-bit base needs a package that is not installed.
    """
    how = _How(dtype, trust_remote_code, attn_implementation, quantization, allow_pickle, distributed, in_host_memory)
    _refuse(model, how)
    if is_random(model):
        import torch

        device = torch.device("cpu") if in_host_memory else training_device()
        return random_model(model, dtype=dtype, device=device, attn_implementation=attn_implementation)
    folder = resolve(model)
    check_folder(model, folder)
    if not allow_pickle:
        refuse_pickle(model, Path(folder))
    adapter = adapter_config(folder)
    if adapter is None:
        from sbft.grid.plain import plain_folder

        with plain_folder(Path(folder)) as plain:
            return _load_checkpoint(model, folder if plain == Path(folder) else str(plain), how)
    if distributed is not None:
        raise ModelError(f"{model} holds an adapter, which is not sharded. Merge it first: sbft export {model} --to DIR")
    return _load_adapter(folder, adapter, how)


@dataclass(frozen=True)
class _How:
    """The arguments of `load_model`."""

    dtype: torch.dtype
    trust_remote_code: bool
    attn_implementation: str | None
    quantization: Quantization | None
    allow_pickle: bool
    distributed: dict[str, Any] | None
    in_host_memory: bool


def _refuse(model: str, how: _How) -> None:
    """Refuse what can be refused without reading the checkpoint."""
    import torch

    if how.dtype == torch.float16:
        raise ModelError(
            "The weights were asked for in float16, which sbft does not train: its largest value is 65,504, and small "
            "gradients vanish in it unless the loss is scaled, which one update per gradient does not allow. "
            "Use dtype: bfloat16 (or float32)."
        )
    if is_scratch(model):
        raise ModelError(
            f"The model {model} is new, and has to be pretrained first. Type sbft pretrain RECIPE, and give the folder of "
            "that run."
        )
    if is_random(model) and how.quantization is not None:
        raise ModelError(f"The model {model} has random weights, which are not held in 4 bits. Choose another method.")
    if is_random(model) and how.distributed is not None:
        raise ModelError(f"The model {model} has random weights, which are not sharded. Give a checkpoint.")


def _load_checkpoint(model: str, folder: str, how: _How) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if how.distributed is not None and (too_old := missing_for_sharding()):
        raise ModelError(too_old)
    config = _causal_config(model, folder, how.trust_remote_code)
    if not how.allow_pickle and str(config.to_dict().get("transformers_weights", "")).endswith(".bin"):
        raise pickled(model, "its config.json names a .bin file")
    if _is_compressed(config) and importlib.util.find_spec("compressed_tensors") is None:
        raise MissingPackageError(
            f"The weights in {model} are in the format of compressed-tensors, which requires that package. "
            + how_to_install("'sbft[compressed-tensors]'")
        )
    quantized: dict[str, Any] = {}  # None would hide what the checkpoint says of itself
    if how.quantization is not None:
        quantized["quantization_config"] = quantization_config(how.quantization, how.dtype)
    # Otherwise transformers asks a public service, with the user's token, to convert a hub model's pickle to safetensors.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    try:
        with_report: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=how.dtype,
            trust_remote_code=how.trust_remote_code,
            attn_implementation=how.attn_implementation,
            local_files_only=local_only(folder),
            **quantized,
            distributed_config=None if how.distributed is None else DistributedConfig(**how.distributed),
            # True refuses all else; None prefers safetensors.
            use_safetensors=None if how.allow_pickle else True,
            weights_only=True,
            output_loading_info=True,
        )
    except (MemoryError, SbftError):
        raise
    except Exception as error:  # from transformers, safetensors, torch or the model's own class
        raise not_loaded(model, folder, error, "model") from error
    loaded, report = with_report
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"The checkpoint {model} lacks {len(missing)} of the weights that {type(loaded).__name__} needs, the first "
            f"{missing[0]}; they would start at random. Give a checkpoint of a complete causal language model."
        )
    if how.quantization is not None:
        keep_trainable(loaded)
    if not torch.accelerator.is_available() and how.distributed is None and not how.in_host_memory:
        _own_weights(loaded)
    result: PreTrainedModel = loaded.eval()
    return result


def _is_compressed(config: PreTrainedConfig) -> bool:
    about = config.to_dict().get("quantization_config") or {}
    return bool(about.get("quant_method") == "compressed-tensors")


def _own_weights(model: PreTrainedModel) -> None:
    """Copy weights that are mapped from their file into memory, one by one.

    A mapped weight becomes resident at its first use, so its memory would count for the training loop. It would also change
    when another run overwrites the file.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def _load_adapter(folder: str, config: Path, how: _How) -> PreTrainedModel:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingPackageError(
            f"{folder} has a LoRA adapter, which requires the package peft. " + how_to_install("'sbft[lora]'")
        ) from error
    how = replace(how, quantization=how.quantization or read_note(Path(folder)))
    adapted: Any = PeftModel.from_pretrained(load_model(base_of_adapter(folder, config), **vars(how)), folder)
    result: PreTrainedModel = adapted.eval()
    return result


def load_config(model: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a causal language model, or of an adapter's base. No weights are read or downloaded.

    Args:
        model: as for `load_model`.
        trust_remote_code: run the Python code that comes with the checkpoint.

    Raises:
        ModelError: if there is no such model, the hub cannot be reached, or it is not a causal language model.
    """
    if is_random(model):
        return random_config(model)
    if is_scratch(model):
        return scratch_config(model)
    name = model.removeprefix(PREFIX)
    if is_builtin(model) and name in ARCHITECTURES and not (converted_folder(name) / "config.json").exists():
        return random_config(RANDOM_PREFIX + name)
    folder = resolve(model)
    check_folder(model, folder)
    adapter = adapter_config(folder)
    if adapter is not None:
        return load_config(base_of_adapter(folder, adapter), trust_remote_code=trust_remote_code)
    return _causal_config(model, folder, trust_remote_code)


def missing_for_sharding() -> str | None:
    """A sentence on why the installed packages cannot train a sharded model; None if they can."""
    for package, needed in _SHARDING.items():
        installed = metadata.version(package)
        if Version(installed) < Version(needed):
            return (
                f"Sharding a model over processes requires {package} {needed} or newer, and {installed} is installed. Type: "
                f"pip install --upgrade {package}. Or train in one process."
            )
    return None


def _causal_config(model: str, folder: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config in a folder or of a hub id, refused if the model is not a causal one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoConfig

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=local_only(folder)
        )
    except Exception as error:  # from transformers, the hub's client or the config's own class
        raise not_loaded(model, folder, error, "model") from error
    kind, settings = type(config), config.to_dict()
    own_code = "AutoModelForCausalLM" in (settings.get("auto_map") or {})
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING and not own_code:
        raise _not_causal(model, config)
    written = set(config.architectures or [])
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not settings.get("is_decoder"):
        # Loaded as a causal model it would attend both ways, unless the config names an architecture that does not.
        if not written & (_names(MODEL_FOR_CAUSAL_LM_MAPPING, kind) - _names(MODEL_FOR_MASKED_LM_MAPPING, kind)):
            raise _not_causal(model, config)
    elif settings.get("is_encoder_decoder") and not own_code and not written & _names(MODEL_FOR_CAUSAL_LM_MAPPING, kind):
        raise _not_causal(model, config)  # only its decoder would be loaded
    return config


def _names(mapping: Any, kind: type) -> set[str]:
    classes = mapping.get(kind, ())
    return {each.__name__ for each in (classes if isinstance(classes, tuple) else (classes,)) if each}


def _not_causal(model: str, config: Any) -> ModelError:
    architecture = ", ".join(config.architectures or []) or f"of type {config.model_type}"
    return ModelError(
        f"The model {model} is not a causal language model (it is {architecture}), and sbft trains models that write "
        "text from left to right. Give one whose architecture ends in ForCausalLM, or train this one in Python with "
        "sbft.SmallBatchTrainer."
    )
