"""Scales beside a saved bfloat16 model, from which the trained codes can be recovered.

bfloat16 rounds code * scale by at most 2^-8 of the value. For codes up to 127 that is less than half a step, so the code is
the nearest integer to value / scale, and scales alone are written. A code of 12 bits can be off by almost 8 steps, so its
lower four bits are written too: codes that share them are 16 apart.

The file is in a separate folder, because vLLM and others read every safetensors file beside a model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sbft.errors import ModelError
from sbft.grid.codes import Quantized, chunks, dequantize, empty, load_codes, store_codes
from sbft.grid.formats import Grid

SCALES_FILE = Path("grid", "scales.safetensors")
"""In the folder of a model."""
GRIDS_KEY = "sbft_grids"
"""The key in a file's header under which each weight's grid is described."""


def write_scales(weights: dict[str, Quantized], folder: Path) -> None:
    """Write scales, and the lower four bits of codes of 12, for a model that is saved in bfloat16; no file for no weights.

    Args:
        weights: by their names in the model's files.
        folder: of the model.
    """
    if not weights:
        return
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        tensors[f"{name}.scales"] = weight.scales.contiguous()
        if weight.low is not None:
            tensors[f"{name}.low"] = weight.low.contiguous()
    grids = {name: describe(weight) for name, weight in weights.items()}
    path = folder / SCALES_FILE
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", GRIDS_KEY: json.dumps(grids)})


def describe(weight: Quantized) -> dict[str, Any]:
    """The grid of a weight and its actual block, for a header in JSON."""
    return {"name": weight.grid.name, "largest": weight.grid.largest, "block": weight.block}


class TrainedCodes:
    """The codes of a saved bfloat16 model whose weights were trained on grids."""

    def __init__(self, folder: Path) -> None:
        """Read the header of the file that `write_scales` wrote; without one, no weight is on a grid.

        Raises:
            ModelError: if the file is damaged.
        """
        self._path = folder / SCALES_FILE
        self.grids: dict[str, Grid] = {}
        """The grid of each weight that is on one; its block is that of the weight's rows."""
        if self._path.is_file():
            with opened(self._path) as file:
                described = json.loads(file.metadata()[GRIDS_KEY])
            self.grids = {name: Grid(**grid) for name, grid in described.items()}

    def scales(self, name: str) -> Tensor:
        """The scales of a weight; float16 of shape (..., C / block)."""
        with opened(self._path) as file:
            scales: Tensor = file.get_tensor(f"{name}.scales")
        return scales

    def recover(self, name: str, values: Tensor) -> Quantized:
        """The codes and scales of a weight.

        Args:
            name: one of `grids`.
            values: of the saved model; bfloat16 of shape (..., C).

        Raises:
            ModelError: if the values are not those of codes on the grid, because they were changed after the run.
        """
        grid = self.grids[name]
        scales = self.scales(name)
        with opened(self._path) as file:
            low = file.get_tensor(f"{name}.low") if grid.bits == 12 else None
        weight = None
        if values.dtype == torch.bfloat16 and scales.shape == (*values.shape[:-1], values.shape[-1] // grid.block):
            weight = recover(values, grid, scales, low)
        if weight is None:
            raise ModelError(
                f"The weight {name} was changed after training, so its codes in {grid.name} cannot be recovered. If this was "
                f"intended, remove the folder {self._path.parent}: the model is then exported as bfloat16."
            )
        return weight


def recover(values: Tensor, grid: Grid, scales: Tensor, low: Tensor | None) -> Quantized | None:
    """The weight on a grid whose bfloat16 values these are; None where there is none.

    Args:
        values: bfloat16 of shape (..., C).
        grid: the grid, with the block size of these rows.
        scales: float16 of shape (..., C / block).
        low: lower four bits of codes of 12, as in `Quantized`; else None.
    """
    made = empty(grid, values.shape)
    made.scales.copy_(scales)
    if made.low is not None and low is not None:
        made.low.copy_(low)
    flat, source = made.flat(), values.reshape(-1, values.shape[-1])
    for start, stop in chunks(flat):
        rows, stored = flat.rows(start, stop), source[start:stop]
        steps = stored.float().unflatten(-1, (-1, grid.block)) / rows.scales.float()[..., None]
        steps = torch.nan_to_num(steps, 0.0, 0.0, 0.0).flatten(-2)  # a scale of NaN has codes of 0
        if rows.low is not None:
            rows.codes.zero_()
            remainder = load_codes(rows)
            codes = remainder + 16 * ((steps - remainder) / 16).round()
        else:
            codes = steps.round()
        store_codes(rows, codes.clamp(-grid.largest, grid.largest).to(torch.int32))
        read = dequantize(rows)
        if not torch.equal(torch.nan_to_num(read, 1e38), torch.nan_to_num(stored, 1e38)):
            return None
    return made


def opened(path: Path) -> Any:
    """An open safetensors file.

    Raises:
        ModelError: if it is damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"The file {path} is damaged: {error}. Copy or save it once more.") from error
