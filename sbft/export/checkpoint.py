"""Exports a trained model as a folder of plain safetensors, with an adapter merged into its base."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from sbft.errors import ExportError, MissingPackageError, ModelError, how_to_install
from sbft.export.lora_files import ADAPTER_FILE
from sbft.grid.plain import plain_folder
from sbft.models.load import load_config, load_model, load_tokenizer
from sbft.models.quantized import read_note
from sbft.models.tensor_files import TensorFiles, cast, write_shards
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.recipe.wording import nearest
from sbft.training.checkpointing.checkpoints import newest_first
from sbft.training.checkpointing.disk_errors import writing
from sbft.training.generation_config import settle_generation

DTYPES = ("bfloat16", "float32", "float16")
# A whole file is in memory while it is written, and hubs recommend files of at most this size.
MAX_SHARD_BYTES = 5 * 10**9
_CONFIG, _ADAPTER_CONFIG, _RECORD = "config.json", "adapter_config.json", "run.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILES = (
    *("tokenizer*", "*.model", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "additional_chat_templates"),
)
# Only what belongs to the model is copied: a run's recipe, record and predictions may contain private data.
OF_THE_MODEL = (_CONFIG, GENERATION_FILE, *TOKENIZER_FILES, "*.py", "README.md", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    size_bytes: int
    """Bytes of all weights."""
    files: int
    """Number of weight files."""
    merged_into: str | None = None
    """The base model, where an adapter was merged."""
    dequantized: bool = False
    """Whether that base was in 4 bits when the adapter was trained; its dequantized values are written."""
    coded: int = 0
    """How many weights are written as the codes that were trained."""
    uncoded: tuple[str, ...] = ()
    """Weights that were trained on a grid that the format does not support; they are written in bfloat16."""


def export_model(
    source: Path,
    destination: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Export:
    """Write a trained model as a folder of safetensors, config and tokenizer, which `from_pretrained` and others load.

    The weights of a full fine-tuning are read and written one file at a time. An adapter requires its base model in memory.
    Weights on a grid are written as bfloat16 values.

    Args:
        source: folder of a run, one of its checkpoints, or any folder of a checkpoint; LoRA adapters too.
        destination: the folder to make. It appears when everything in it is written.
        base: the model under an adapter: hub id, folder or builtin:NAME; None: the one that the run's recipe or the
            adapter itself names.
        dtype: one of `DTYPES`; None: the checkpoint's, or the run's for an adapter.
        max_shard_bytes: largest size of a file.
        overwrite: replace a model at the destination.
        trust_remote_code: run the Python code that comes with the base model of an adapter; a whole model requires none.

    Raises:
        SbftError: if there is no model, or it cannot be exported this way.
    """
    check_source(source)
    check_dtype(dtype)
    check_destination(destination, overwrite=overwrite, needed=[source])
    if is_adapter(source):
        return _merge(source, destination, base, dtype, max_shard_bytes, trust_remote_code)
    if base is not None:
        raise ExportError(
            f"{source} has a whole model, which requires no base. Leave --base out, or add --as-lora RANK."
        )
    with plain_folder(source) as plain:
        _copy(plain, destination, dtype, max_shard_bytes)
    return written(destination)


def _copy(source: Path, destination: Path, dtype: str | None, max_shard_bytes: int) -> None:
    tensors = TensorFiles(source)
    config = json.loads((source / _CONFIG).read_text(encoding="utf-8"))
    if dtype is not None and "quantization_config" in config:
        raise ExportError(
            f"The weights in {source} are quantized, so --dtype {dtype} cannot be written from them. Leave --dtype out."
        )
    written_dtype = None if dtype is None else torch_dtype(dtype)
    with new_folder(
        destination, takes_bytes=sum(tensors.size_bytes(name, written_dtype) for name in tensors)
    ) as folder:
        copy_files(source, folder, OF_THE_MODEL)
        write_shards(tensors, folder, written_dtype, max_shard_bytes)
        if dtype is not None:
            _set_dtype(config, dtype)
            (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_source(source: Path) -> None:
    """Refuse anything that is not the folder of a model.

    Raises:
        ModelError: if it is not.
    """
    if not source.is_dir():
        raise ModelError(
            f"There is no folder {source}. Give the output folder of sbft train, or a checkpoint inside it."
        )
    if (source / _CONFIG).is_file() or (source / _ADAPTER_CONFIG).is_file():
        return
    if checkpoints := newest_first(source):
        newest = checkpoints[0]
        raise ModelError(
            f"The folder {source} has no trained model, because its run has not ended. It has checkpoints, which can be "
            f"exported too: sbft export {newest} --to DIR"
        )
    raise ModelError(
        f"The folder {source} has no model: {_CONFIG} or {_ADAPTER_CONFIG} was expected in it. Give the output folder "
        "of sbft train (with save_model: true), or a checkpoint inside it."
    )


def is_adapter(folder: Path) -> bool:
    """Whether a folder has a LoRA adapter and no whole model."""
    return (folder / _ADAPTER_CONFIG).is_file() and not (folder / _CONFIG).is_file()


def recipe_of(source: Path) -> Recipe | None:
    """The resolved recipe of the run that wrote a model, or one of its checkpoints; None where there is none."""
    for folder in (source, source.absolute().parent):
        if (folder / "recipe.yaml").is_file() and (folder is source or source.name.startswith("checkpoint-")):
            return resolve(load_recipe(folder / "recipe.yaml"))
    return None


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that is not in `DTYPES`.

    Raises:
        ExportError: if it is not.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"--dtype is {dtype!r}, expected one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}.")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name in `DTYPES`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def check_destination(destination: Path, *, overwrite: bool, needed: list[Path]) -> None:
    """Refuse to overwrite what must not be overwritten. Changes nothing.

    Args:
        destination: the folder to write.
        overwrite: whether a model in it may be replaced.
        needed: folders that are read, so they must not be replaced.

    Raises:
        ExportError: if it cannot be written.
    """
    whole = destination.resolve()
    for folder in needed:
        read = folder.resolve()
        if whole == read or whole in read.parents:
            raise ExportError(f"--to {destination} would replace {folder}, which is read. Type another folder.")
    if destination.is_file():
        raise ExportError(f"--to {destination} is a file. Type a folder that does not exist yet.")
    above = next(parent for parent in whole.parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ExportError(f"--to {destination} cannot be written: no permission in {above}. Type another folder.")
    entries = {entry.name for entry in destination.iterdir()} if destination.is_dir() else set()
    if entries and not overwrite:
        raise ExportError(f"--to {destination} exists and is not empty. Add --overwrite, or type another folder.")
    if entries and (not entries & {_CONFIG, _ADAPTER_CONFIG} or _RECORD in entries):
        what = "is the folder of a run" if _RECORD in entries else "has no model"
        raise ExportError(
            f"--overwrite would remove everything in {destination}, which {what}. Empty it yourself, or type another "
            "folder."
        )


@contextmanager
def new_folder(destination: Path, *, takes_bytes: int | None = None) -> Iterator[Path]:
    """A temporary folder beside the destination, which replaces it at the end; removed if an error occurs.

    Args:
        destination: the folder to make.
        takes_bytes: bytes that it will take on the disk, if known.

    Raises:
        DiskError: if writing fails; the destination then stays unchanged.
    """
    destination = destination.resolve()
    former: Path | None = None
    temporary: Path | None = None
    with writing("The exported model", destination, takes_bytes=takes_bytes):
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
            former = temporary.with_name(f"{temporary.name}-former")
            yield temporary
            # mkdtemp and safetensors make folders and files that only their owner can read.
            os.chmod(temporary, 0o755)  # nosec B103  # as mkdir would have made it
            for file in temporary.glob("*.safetensors"):
                os.chmod(file, 0o644)
            if destination.exists():
                os.rename(destination, former)
            os.rename(temporary, destination)
            shutil.rmtree(former, ignore_errors=True)
        finally:
            if former is not None and former.exists() and not destination.exists():
                os.rename(former, destination)
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)


def copy_files(source: Path, folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    """Copy files and folders that match any of the patterns; returns their paths."""
    paths = sorted({path for pattern in patterns for path in source.glob(pattern)})
    for path in paths:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    return paths


def _merge(
    source: Path,
    destination: Path,
    base: str | None,
    dtype: str | None,
    max_shard_bytes: int,
    trust_remote_code: bool,
) -> Export:
    """Merge an adapter into its base and write the result."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise MissingPackageError(
            f"{source} has a LoRA adapter, which requires the package peft. " + how_to_install("'sbft[lora]'")
        ) from error

    if not (source / ADAPTER_FILE).is_file():
        raise ModelError(f"The adapter in {source} has no weights: {ADAPTER_FILE} was expected beside its config.")
    recipe = recipe_of(source)
    if base is None:
        # The recipe has the name that the user gave. PEFT has the folder that builtin:NAME was converted to on that machine.
        base = recipe.model if recipe else PeftConfig.from_pretrained(str(source)).base_model_name_or_path
    if not base:
        raise ModelError(f"The adapter in {source} does not say which model it was trained on. Type --base MODEL.")
    if Path(base).is_dir():
        check_destination(destination, overwrite=True, needed=[Path(base)])
    config = load_config(base, trust_remote_code=trust_remote_code)
    name = dtype or (recipe.dtype if recipe else None) or str(config.dtype or "float32").removeprefix("torch.")
    # float16 is only used for the written result.
    computed = torch_dtype("float32" if name == "float16" else name)
    quantization = read_note(source)
    model = load_model(base, dtype=computed, trust_remote_code=trust_remote_code, quantization=quantization)
    if quantization is not None:
        # Dequantized: the adapter was trained with these values, not with the original ones.
        model = model.dequantize(dtype=computed)
    # PEFT keeps the adapter in float32, adds its product to each weight in float32, and rounds once.
    merged: PreTrainedModel = PeftModel.from_pretrained(model, str(source)).merge_and_unload()
    if name == "float16":
        for parameter_name, parameter in merged.named_parameters():
            parameter.data = cast(parameter_name, parameter.data, torch.float16)
        merged.config.dtype = torch.float16
    own_tokenizer = (source / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(str(source) if own_tokenizer else base, trust_remote_code=trust_remote_code)
    if (source / GENERATION_FILE).is_file():
        merged.generation_config = GenerationConfig.from_pretrained(source)
    settle_generation(merged, tokenizer)
    with new_folder(destination) as folder:
        merged.save_pretrained(folder, max_shard_size=max_shard_bytes)
        if not copy_files(source, folder, TOKENIZER_FILES):
            tokenizer.save_pretrained(folder)
    return written(destination, merged_into=base, dequantized=quantization is not None)


def written(folder: Path, **more: Any) -> Export:
    """Describe an exported folder of safetensors."""
    files = list(folder.glob("*.safetensors"))
    return Export(folder, sum(file.stat().st_size for file in files), len(files), **more)


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Write a dtype into a config and its sub-configs, wherever they name one; `torch_dtype` is the older key."""
    if "torch_dtype" not in config:
        config.setdefault("dtype", dtype)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):
            config[key] = dtype
        elif isinstance(value, dict) and {"dtype", "torch_dtype"} & value.keys():
            _set_dtype(value, dtype)
