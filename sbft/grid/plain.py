"""Converts a checkpoint of codes and scales to a plain bfloat16 model, for programs that read the usual files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sbft.grid import values
from sbft.grid.codes import Quantized
from sbft.grid.grid_files import exact_files, holds_grid_weights
from sbft.grid.scales import write_scales

_NOT_OF_THE_MODEL = (".safetensors", ".pt", ".pth", ".bin")


@contextmanager
def plain_folder(folder: Path) -> Iterator[Path]:
    """A folder with the usual files of a model: `folder` itself, or a temporary one for a checkpoint on a grid.

    The temporary folder takes two bytes per weight. One file's worth of weights is in memory at a time.

    Args:
        folder: any folder of a model.

    Raises:
        ModelError: if a file of the checkpoint is damaged.
    """
    if not holds_grid_weights(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="sbft-plain-") as name:
        made = Path(name) / folder.resolve().name
        made.mkdir()
        for entry in folder.iterdir():
            if entry.is_file() and entry.suffix not in _NOT_OF_THE_MODEL:
                shutil.copyfile(entry, made / entry.name)
            elif entry.is_dir() and entry.name == "additional_chat_templates":
                shutil.copytree(entry, made / entry.name)
        _write(folder, made)
        yield made


def _write(checkpoint: Path, folder: Path) -> None:
    files = list(exact_files(checkpoint))
    places: dict[str, str] = {}
    on_grid: dict[str, Quantized] = {}
    total_bytes = 0
    for i, read in enumerate(files, 1):
        file = f"model-{i:05}-of-{len(files):05}.safetensors"
        dense: dict[str, Tensor] = {}
        for weight_name, tensor in read():
            if isinstance(tensor, Quantized):
                dense[weight_name] = values.dequantize(tensor)
                # Without its codes, which the values give again.
                on_grid[weight_name] = tensor.with_tensors(tensor.codes.to("meta"), tensor.low, tensor.scales)
            else:
                dense[weight_name] = tensor
        save_file(dense, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(dense, file)
        total_bytes += sum(tensor.nbytes for tensor in dense.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    write_scales(on_grid, folder)
