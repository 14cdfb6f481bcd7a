"""The tensors of a checkpoint in safetensors files, read and written with few of them in memory at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sbft.errors import ExportError, ModelError
from sbft.models.hub import hub_reachable
from sbft.models.load import load_config
from sbft.models.names import resolve
from sbft.models.random_weights import is_random

if TYPE_CHECKING:
    import torch

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
PARTS = "shard-*.safetensors"
"""Files of a sharded model's checkpoint: each has one rank's shards of the weights."""
_CUTS = "DCP_SHARDING_INFO"  # where torch.distributed.checkpoint notes which part of a tensor is in the file
_FLOATING = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def checkpoint_folder(model: str) -> Path:
    """The folder with a model's weights: a local one, that of `builtin:NAME`, or the hub's cache.

    Raises:
        ModelError: if there is no such model, or it cannot be downloaded.
    """
    if is_random(model):
        raise ModelError(f"The model {model} has random weights, which are in no file.")
    folder = Path(resolve(model))
    if folder.is_dir():
        return folder
    load_config(model)  # raises if the name is wrong
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(
            model, allow_patterns=["model*.safetensors", INDEX_FILE], local_files_only=not hub_reachable()
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"The weights of {model} could not be downloaded: {reason[:400]}") from error
    return Path(snapshot)


@dataclass(frozen=True)
class _Part:
    """The part of a tensor that one file holds: all of it, or one rank's shard."""

    file: Path
    shape: tuple[int, ...]
    begin: tuple[int, ...]
    """Index of its first element in the whole tensor."""


@dataclass
class _Entry:
    dtype: str
    """As safetensors names it, such as BF16."""
    parts: list[_Part]
    size_bytes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        ends = [[begin + size for begin, size in zip(part.begin, part.shape, strict=True)] for part in self.parts]
        return tuple(max(along) for along in zip(*ends, strict=True))


class TensorFiles:
    """The tensors of a checkpoint by name. Each is read on demand and not kept."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of the folder's safetensors files.

        Raises:
            ModelError: if there are none, or one is missing or cut off.
        """
        self.folder = folder
        self._entries: dict[str, _Entry] = {}
        for file in _files(folder):
            for name, part in _header(file).items():
                entry = self._entries.setdefault(name, _Entry(part.dtype, [], 0))
                entry.parts += part.parts
                entry.size_bytes += part.size_bytes

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entries[name].shape

    def size_bytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a tensor, without reading it; in `dtype`, if given, for a floating-point tensor."""
        entry = self._entries[name]
        if dtype is None or entry.dtype not in _FLOATING:
            return entry.size_bytes
        return entry.size_bytes // _FLOATING[entry.dtype] * dtype.itemsize

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor on the CPU; in `dtype`, if given, for a floating-point tensor.

        Raises:
            ModelError: if its file is damaged.
            ExportError: if a value is too large for `dtype`.
        """
        entry = self._entries[name]
        tensor = _read(name, entry.parts[0])
        if len(entry.parts) > 1:
            whole = tensor.new_empty(entry.shape)
            for part in entry.parts:
                place = tuple(slice(begin, begin + size) for begin, size in zip(part.begin, part.shape, strict=True))
                whole[place] = _read(name, part)
            tensor = whole
        return tensor if dtype is None or entry.dtype not in _FLOATING else cast(name, tensor, dtype)


def _read(name: str, part: _Part) -> torch.Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        # Opened anew for each tensor, so that the file does not stay mapped into memory.
        with safe_open(part.file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"The file {part.file} is damaged: {error}. Copy or save it again.") from error
    return tensor


def cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor in another dtype.

    Raises:
        ExportError: if a finite value would overflow.
    """
    result = tensor.to(dtype)
    # bfloat16 has the range of float32; only float16 has less.
    if result.dtype != tensor.dtype and (result.isfinite() != tensor.isfinite()).any():
        raise ExportError(
            f"The weight {name} holds {tensor.abs().max().item():.4g}, which {str(dtype).removeprefix('torch.')} cannot "
            "(float16 ends at 65,504). Type --dtype bfloat16."
        )
    return result


class TensorSource(Protocol):
    """Tensors by name, each read on demand, as `TensorFiles` has them."""

    def __iter__(self) -> Iterator[str]:
        """Their names."""

    def size_bytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a tensor."""

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor on the CPU."""


def write_shards(source: TensorSource, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int) -> None:
    """Write all tensors of a checkpoint into a folder, under the same names, with one file in memory at a time.

    Args:
        source: the tensors.
        folder: where `model.safetensors`, or several files and their index, are written.
        dtype: dtype of the floating-point tensors; None keeps it.
        max_shard_bytes: largest size of a file; a larger tensor gets its own.

    Raises:
        ExportError: if a value is too large for `dtype`.
    """
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    split = split_state_dict_into_shards_factory(
        {name: source.size_bytes(name, dtype) for name in source},
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        # transformers refuses files without this metadata.
        save_file({name: source.read(name, dtype) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (folder / WEIGHTS_FILE).is_file():
        names = [WEIGHTS_FILE]
    elif parts := sorted(path.name for path in folder.glob(PARTS)):
        names = parts
    else:
        present = ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"The folder {folder} holds no {WEIGHTS_FILE} and no {INDEX_FILE}; there is {present}. To convert another "
            "format to safetensors, use from_pretrained and save_pretrained of transformers."
        )
    files = [folder / name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ModelError(f"{index} names {missing[0]}, which is missing: the checkpoint {folder} is not complete.")
    return files


def _header(file: Path) -> dict[str, _Entry]:
    """The tensors that a safetensors file lists: 8 bytes with the header's length, then the header as JSON."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        try:
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", None) or {}
            cuts = json.loads(metadata.get(_CUTS, "{}"))
            ends = {name: about["data_offsets"][1] for name, about in header.items()}
            expected = 8 + length + max(ends.values(), default=0)
            if file.stat().st_size < expected:
                raise ValueError(f"it is {file.stat().st_size} bytes long, and should be {expected}")
        except (ValueError, OverflowError, MemoryError) as error:
            raise ModelError(f"{file} is no complete safetensors file: {error}. Copy or save it again.") from error
    return {
        name: _Entry(
            about["dtype"],
            [
                _Part(
                    file,
                    tuple(about["shape"]),
                    tuple(cuts[name]["saved_offsets"] if name in cuts else [0] * len(about["shape"])),
                )
            ],
            ends[name] - about["data_offsets"][0],
        )
        for name, about in header.items()
    }
