"""Writes and reads models with weights on a grid: exactly, as codes and scales, for checkpoints; or as plain bfloat16."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sbft.errors import ModelError
from sbft.grid.codes import Quantized
from sbft.grid.formats import Grid
from sbft.grid.scales import GRIDS_KEY, describe, opened, write_scales
from sbft.grid.weight import GridWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILES = "grid-*.safetensors"
"""Files of a checkpoint whose weights are on a grid."""
FILE_BYTES = 2**31
"""Most bytes of a file, unless a single tensor is larger. While a file is written, a copy of GPU tensors is in host memory."""


def has_grid_weights(model: nn.Module) -> bool:
    """Whether some weights of a model are on a grid."""
    return any(isinstance(parameter, GridWeight) for parameter in model.parameters())


def holds_grid_weights(folder: Path) -> bool:
    """Whether a folder holds a model as `write_exact` writes it."""
    return any(folder.glob(FILES))


def write_exact(model: nn.Module, folder: Path, *, file_bytes: int = FILE_BYTES) -> None:
    """Write all tensors of a model's state: codes and scales of weights on a grid, other tensors as they are.

    Args:
        model: the model.
        folder: to write into; files that were written into it before are removed.
        file_bytes: most bytes in one file, unless a single tensor is larger.
    """
    for old in folder.glob(FILES):
        old.unlink()
    tensors: dict[str, Tensor] = {}
    grids: dict[str, Any] = {}
    number = 1
    for names, tensor in _by_tensor(model):
        parts = _parts(names[0], tensor)
        if tensors and _bytes(tensors) + _bytes(parts) > file_bytes:
            _write(tensors, grids, folder / f"grid-{number:05}.safetensors")
            tensors, grids, number = {}, {}, number + 1
        tensors |= parts
        if isinstance(tensor, GridWeight):
            grids[names[0]] = describe(tensor.quantized)
    _write(tensors, grids, folder / f"grid-{number:05}.safetensors")


def save_checkpoint(model: PreTrainedModel, folder: Path) -> None:
    """Write a model's part of a checkpoint: its tensors by `write_exact`, and its configs."""
    folder.mkdir(parents=True, exist_ok=True)
    write_exact(model, folder)
    model.config.save_pretrained(folder)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def read_exact(model: nn.Module, folder: Path) -> None:
    """Fill a model in place from the files of `write_exact`; its weights must be on the same grids.

    Raises:
        ModelError: if a weight is missing, has another shape or is on another grid, or a file is damaged.
    """
    places: dict[str, Path] = {}
    grids: dict[str, Any] = {}
    for path in sorted(folder.glob(FILES)):
        with opened(path) as file:
            places |= dict.fromkeys(file.keys(), path)
            grids |= json.loads(file.metadata()[GRIDS_KEY])
    lacking = []
    for names, tensor in _by_tensor(model):
        stored = next((name for name in names if name in places or name in grids), None)
        if stored is not None:
            _fill(tensor, stored, grids.get(stored), places)
        elif isinstance(tensor, nn.Parameter):
            lacking.append(names[0])
    if lacking:
        raise ModelError(
            f"The checkpoint {folder} lacks {len(lacking)} of the model's weights, the first {min(lacking)}."
        )


def exact_files(folder: Path) -> Iterator[Callable[[], Iterator[tuple[str, Tensor | Quantized]]]]:
    """For each file that `write_exact` wrote, a function that reads its weights by name, one after another.

    Raises:
        ModelError: if a file is damaged.
    """

    def reader(path: Path) -> Callable[[], Iterator[tuple[str, Tensor | Quantized]]]:
        return lambda: _read_file(path)

    for path in sorted(folder.glob(FILES)):
        yield reader(path)


def _read_file(path: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
    with opened(path) as file:
        grids = json.loads(file.metadata()[GRIDS_KEY])
        stored = set(file.keys())
        for name, about in grids.items():
            names = {part: f"{name}.{part}" for part in ("codes", "low", "scales")}
            parts = {part: file.get_tensor(full) for part, full in names.items() if full in stored}
            stored -= set(names.values())
            yield name, Quantized(Grid(**about), parts["codes"], parts.get("low"), parts["scales"])
        for name in sorted(stored):
            yield name, file.get_tensor(name)


def save_dense(model: PreTrainedModel, folder: Path, *, file_bytes: int = FILE_BYTES) -> None:
    """Write a model as `save_pretrained` does, with weights on a grid as bfloat16; one file is in memory at a time.

    `write_scales` adds what is required to recover the codes.

    Args:
        model: the model.
        folder: to write into.
        file_bytes: approximate limit of a file's bytes, unless a single tensor is larger.
    """
    tied = set(model.all_tied_weights_keys)
    state: dict[str, Tensor] = {}
    on_grid: dict[str, Quantized] = {}
    smallest_share = 1.0
    for names, tensor in _by_tensor(model):
        name = next((name for name in names if name not in tied), names[0])
        state[name] = tensor.detach()
        if isinstance(tensor, GridWeight):
            state[name] = _WrittenDense(tensor.quantized)
            on_grid[name] = tensor.quantized
            smallest_share = min(smallest_share, tensor.nbytes / (tensor.numel() * tensor.element_size()))
    # The size of a tensor counts before it becomes bfloat16.
    model.save_pretrained(folder, state_dict=state, max_shard_size=int(file_bytes * smallest_share))
    write_scales(on_grid, folder)


def dense_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose weights on a grid are plain bfloat16 tensors, tied ones still one tensor."""
    on_grid = {tensor.codes.data_ptr(): tensor for tensor in state.values() if isinstance(tensor, GridWeight)}
    dense = {address: tensor.dequantize() for address, tensor in on_grid.items()}
    return {
        name: dense[tensor.codes.data_ptr()] if isinstance(tensor, GridWeight) else tensor
        for name, tensor in state.items()
    }


class _WrittenDense(GridWeight):
    """A weight that becomes a plain tensor only when `save_pretrained` writes it into a file."""

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        return self.dequantize().contiguous(memory_format=memory_format)

    def untyped_storage(self) -> torch.UntypedStorage:
        """`save_pretrained` distinguishes weights by their storages."""
        return self.codes.untyped_storage()


def _by_tensor(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """The tensors of a model's state, each with all its names: tied ones have several."""
    names: dict[int, list[str]] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    for shared in names.values():
        yield shared, state[shared[0]]


def _parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    if not isinstance(tensor, GridWeight):
        return {name: tensor.detach().contiguous()}
    return {f"{name}.{part}": stored for part, stored in tensor.quantized.tensors.items()}


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _write(tensors: dict[str, Tensor], grids: dict[str, Any], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt", GRIDS_KEY: json.dumps(grids)})


def _fill(tensor: Tensor, name: str, grid: dict[str, Any] | None, places: dict[str, Path]) -> None:
    on_grid = isinstance(tensor, GridWeight)
    own = describe(tensor.quantized) if isinstance(tensor, GridWeight) else None
    if own != grid:
        raise ModelError(
            f"The weight {name} is stored {_words(grid)} in the checkpoint {next(iter(places.values())).parent}, and in the "
            f"model {_words(own)}. Resume with the same `weights`."
        )
    for stored, target in (_parts(name, tensor) if on_grid else {name: tensor.detach()}).items():
        if stored not in places:
            raise ModelError(f"The checkpoint lacks {stored}. Resume from another one.")
        with opened(places[stored]) as file:
            source = file.get_tensor(stored)
        if source.shape != target.shape:
            raise ModelError(
                f"{stored} has the shape {tuple(source.shape)} in {places[stored]}, and {tuple(target.shape)} in the model. "
                "Resume with the model that was trained."
            )
        target.copy_(source)
    if isinstance(tensor, GridWeight):
        tensor.mark_changed()


def _words(grid: dict[str, Any] | None) -> str:
    return "in its own dtype" if grid is None else f"as {grid['name']} in blocks of {grid['block']}"
