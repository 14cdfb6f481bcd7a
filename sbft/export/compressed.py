"""Exports a model trained in 8 or 4 bits in the format of `compressed-tensors`, which vLLM and transformers read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sbft.errors import ExportError
from sbft.export.checkpoint import (
    MAX_SHARD_BYTES,
    OF_THE_MODEL,
    Export,
    check_destination,
    check_source,
    copy_files,
    is_adapter,
    new_folder,
    written,
)
from sbft.export.codes import packed, spread
from sbft.grid.formats import Grid
from sbft.grid.plain import plain_folder
from sbft.grid.scales import TrainedCodes
from sbft.models.load import load_config
from sbft.models.tensor_files import TensorFiles, write_shards

_CONFIG = "config.json"
_PARTS = ("weight_packed", "weight_scale", "weight_shape")
_SHAPE_BYTES = 16  # two int64


def export_compressed(
    source: Path, destination: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES, overwrite: bool = False
) -> Export:
    """Write a model that was trained in 8 or 4 bits with exactly the codes that were trained.

    Linear layers are in `pack-quantized`. Embedding, output head, weights in 12 bits, and all others are in bfloat16, the
    values that the trained model computes with. Scales are in float32, in which they are exact.

    Args:
        source: folder of a run, or one of its checkpoints.
        destination: the folder to make. It appears when everything in it is written.
        max_shard_bytes: largest size of a file.
        overwrite: replace a model that is at the destination.

    Raises:
        SbftError: if there is no model, or none of its linear layers was trained in 8 or 4 bits.
    """
    check_source(source)
    check_destination(destination, overwrite=overwrite, needed=[source])
    if is_adapter(source):
        raise _not_on_a_grid(source)
    with plain_folder(source) as plain:
        model = _Compressed(plain)
        if not model.layers:
            raise _not_on_a_grid(source)
        takes_bytes = sum(model.size_bytes(name) for name in model)
        with new_folder(destination, takes_bytes=takes_bytes) as folder:
            copy_files(plain, folder, OF_THE_MODEL)
            write_shards(model, folder, None, max_shard_bytes)
            config = json.loads((plain / _CONFIG).read_text(encoding="utf-8"))
            config |= model.settings()
            (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        return written(destination, coded=len(model.layers), uncoded=model.uncoded)


def _not_on_a_grid(source: Path) -> ExportError:
    return ExportError(
        f"No linear layer of the model in {source} was trained in 8 or 4 bits, so there are no codes to write. Leave --format "
        "out; or train with weights: int8 or weights: int4."
    )


class _Compressed:
    """The tensors of a model in `compressed-tensors`, each made from those of the plain model when it is read."""

    def __init__(self, folder: Path) -> None:
        self._tensors, self._codes = TensorFiles(folder), TrainedCodes(folder)
        linear, head = _linear_layers(load_config(str(folder)))
        self.layers: dict[str, Grid] = {}
        """The grid of each layer whose codes are written."""
        for name in linear:
            grid = self._codes.grids.get(f"{name}.weight")
            if name != head and grid is not None and grid.bits <= 8 and f"{name}.weight" in self._tensors:
                self.layers[name] = grid
        self._others = [name for name in linear if name not in self.layers]
        # One group size for all layers of one width: a larger block becomes several with the same scale.
        self._block = {bits: math.gcd(*blocks) for bits, blocks in _by_bits(self.layers).items()}

    @property
    def uncoded(self) -> tuple[str, ...]:
        """The weights on grids that are written in bfloat16."""
        return tuple(name for name in self._codes.grids if name.removesuffix(".weight") not in self.layers)

    def __iter__(self) -> Iterator[str]:
        for name in self._tensors:
            layer = name.removesuffix(".weight")
            if layer in self.layers:
                yield from (f"{layer}.{part}" for part in _PARTS)
            else:
                yield name

    def size_bytes(self, name: str, dtype: torch.dtype | None = None) -> int:
        """Bytes of a tensor."""
        layer, _, part = name.rpartition(".")
        if layer not in self.layers or part not in _PARTS:
            return self._tensors.size_bytes(name)
        bits = self.layers[layer].bits
        count = math.prod(self._tensors.shape(f"{layer}.weight"))
        sizes = {"weight_packed": count * bits // 8, "weight_scale": 4 * count // self._block[bits]}
        return sizes.get(part, _SHAPE_BYTES)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor."""
        layer, _, part = name.rpartition(".")
        if layer not in self.layers or part not in _PARTS:
            return self._tensors.read(name)
        stored = f"{layer}.weight"
        if part == "weight_shape":
            return torch.tensor(self._tensors.shape(stored))
        if part == "weight_packed":
            return packed(self._codes.recover(stored, self._tensors.read(stored)))
        grid = self.layers[layer]
        return spread(self._codes.scales(stored), grid.block // self._block[grid.bits]).float()

    def settings(self) -> dict[str, Any]:
        """The entry of config.json about the weights.

        transformers multiplies codes by scales in the dtype that the scales are loaded in: bfloat16 would round them. With
        `dequantize` it multiplies in float32 and rounds the products, as in training, but by the first group's scheme only.
        """
        groups = {}
        for i, (bits, block) in enumerate(sorted(self._block.items())):
            alone = len(self._block) == 1
            weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": block}
            groups[f"group_{i}"] = {
                "targets": ["Linear"] if alone else [name for name, grid in self.layers.items() if grid.bits == bits],
                "weights": {**weights, "symmetric": True, "dynamic": False},
                "input_activations": None,
                "output_activations": None,
                "format": "pack-quantized",
            }
        about = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": self._others,
        }
        if len(groups) == 1:
            return {"quantization_config": {**about, "dequantize": True}}
        return {"quantization_config": about, "dtype": "float32"}


def _by_bits(layers: dict[str, Grid]) -> dict[int, set[int]]:
    blocks: dict[int, set[int]] = {}
    for grid in layers.values():
        blocks.setdefault(grid.bits, set()).add(grid.block)
    return blocks


def _linear_layers(config: PreTrainedConfig) -> tuple[list[str], str | None]:
    """The names of a model's linear layers, and which is the output head: vLLM does not support codes there."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    output = model.get_output_embeddings()
    return list(linear), next((name for name, module in linear.items() if module is output), None)
