"""Exports a trained model as one GGUF file, which llama.cpp, Ollama and LM Studio run."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from sbft.errors import ExportError, ModelError
from sbft.export.checkpoint import (
    GENERATION_FILE,
    Export,
    check_destination,
    check_source,
    export_model,
    is_adapter,
    new_folder,
)
from sbft.export.codes import gguf_blocks, reordered
from sbft.export.gguf_architectures import (
    Architecture,
    NamedTensor,
    architecture_of,
    import_gguf,
    named_tensors,
    rope_factors,
    write_hyperparameters,
)
from sbft.export.gguf_tokenizer import write_tokenizer
from sbft.grid.formats import Grid
from sbft.grid.plain import plain_folder
from sbft.grid.scales import TrainedCodes
from sbft.models.load import load_config, load_tokenizer
from sbft.models.tensor_files import TensorFiles
from sbft.recipe.wording import nearest

TYPES = ("bfloat16", "float32", "float16", "q8_0")
"""The types that matrices can be written in. Norms and biases are always float32."""
_Q8_0_BLOCK = 32
_CHUNK_ROWS = 4_096
_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "Q8_0": "q8_0", "Q4_0": "q4_0"}
_BITS = {"Q8_0": 8, "Q4_0": 4}
_FILE_TYPES = {
    "float32": "ALL_F32",
    "float16": "MOSTLY_F16",
    "bfloat16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}


def export_gguf(
    source: Path,
    destination: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write a trained model as a GGUF file, including its tokenizer and chat template.

    Tensors are read, converted and written one at a time; an adapter is merged into its base first. Weights that were trained
    in 8 or 4 bits are written as their codes, in Q8_0 and Q4_0.

    Args:
        source: folder of a run, one of its checkpoints, or any folder of a checkpoint; LoRA adapters too.
        destination: the folder to make, for `model-TYPE.gguf`, named after the type of most elements. It appears when the
            file is written.
        base: the model under an adapter, as in `export_model`.
        dtype: one of `TYPES`; None: the model's, and codes for weights that were trained on a grid. `q8_0` also keeps codes
            of 8 and 4 bits.
        overwrite: replace a model that is at the destination.

    Raises:
        SbftError: if there is no model, or sbft does not know how llama.cpp would run it.
    """
    import_gguf()
    check_source(source)
    if dtype is not None and dtype not in TYPES:
        raise ExportError(f"--dtype is {dtype!r}, expected one of {', '.join(TYPES)}{nearest(dtype, TYPES)}.")
    check_destination(destination, overwrite=overwrite, needed=[source])
    if not is_adapter(source) and base is not None:
        raise ExportError(f"{source} has a whole model, which requires no base. Leave --base out.")
    with _whole_model(source, base, dtype) as (folder, merged):
        config = load_config(str(folder))
        plan = _plan(folder, config, dtype)
        with new_folder(destination) as made:
            size_bytes = _write(plan, config, made / f"model-{plan.kind}.gguf")
    about = (merged.merged_into, merged.dequantized) if merged else (None, False)
    return Export(destination, size_bytes, 1, *about, coded=len(plan.coded), uncoded=plan.uncoded)


@contextmanager
def _whole_model(source: Path, base: str | None, dtype: str | None) -> Iterator[tuple[Path, Export | None]]:
    """A folder with all weights of a model: the source, or a temporary one with its adapter merged."""
    if not is_adapter(source):
        with plain_folder(source) as plain:
            yield plain, None
        return
    with tempfile.TemporaryDirectory(prefix="sbft-merged-") as folder:
        merged = export_model(source, Path(folder) / "model", base=base, dtype=None if dtype == "q8_0" else dtype)
        yield merged.folder, merged


@dataclass(frozen=True)
class _Plan:
    """The content of a file."""

    folder: Path
    architecture: Architecture
    tensors: TensorFiles
    codes: TrainedCodes
    named: list[NamedTensor]
    types: dict[str, Any]
    """GGUF type of each tensor, by its name in the file."""
    coded: set[str]
    """The weights whose codes are written, by their names in the model."""
    uncoded: tuple[str, ...]
    """The weights on grids that GGUF does not support, if codes were to be kept."""

    @property
    def kind(self) -> str:
        """The type of most elements."""
        elements: Counter[str] = Counter()
        for entry in self.named:
            elements[self.types[entry.name].name] += math.prod(self.tensors.shape(entry.source))
        return _KINDS[elements.most_common(1)[0][0]]

    def encoded(self, entry: NamedTensor) -> NDArray[np.uint8]:
        """The bytes of a tensor in the file."""
        values, kind = self.tensors.read(entry.source), self.types[entry.name]
        if entry.source not in self.coded:
            return _encode(entry.transform(values), kind)
        weight = self.codes.recover(entry.source, values)
        return gguf_blocks(reordered(weight, entry.transform), _BITS[kind.name])


def _plan(folder: Path, config: PreTrainedConfig, dtype: str | None) -> _Plan:
    """How the tensors of a model are stored.

    Raises:
        ExportError: if sbft does not know how llama.cpp would run it.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise ExportError(f"The weights in {folder} are quantized. Export the model that they were made from.")
    tensors, codes = TensorFiles(folder), TrainedCodes(folder)
    architecture = architecture_of(config)
    named = named_tensors(list(tensors), config, architecture)
    kind = dtype or str(config.dtype or "float32").removeprefix("torch.")
    types, coded = {}, set()
    for entry in named:
        grid = codes.grids.get(entry.source) if dtype in (None, "q8_0") else None
        stored = None if grid is None else _type_of_codes(grid, dtype)
        if stored is not None:
            coded.add(entry.source)
        types[entry.name] = stored or _type_of(tensors.shape(entry.source), kind)
    uncoded = tuple(name for name in codes.grids if name not in coded) if dtype is None else ()
    return _Plan(folder, architecture, tensors, codes, named, types, coded, uncoded)


def _write(plan: _Plan, config: PreTrainedConfig, file: Path) -> int:
    """Write the file, and return the bytes of all tensors in it."""
    gguf = import_gguf()
    folder, tensors, named, types = plan.folder, plan.tensors, plan.named, plan.types
    tokenizer = load_tokenizer(str(folder))
    embedding = next((entry.source for entry in named if entry.name == "token_embd.weight"), None)
    if embedding is None:
        raise ModelError(f"The model in {folder} has no input embedding.")
    generation = GenerationConfig.from_pretrained(folder) if (folder / GENERATION_FILE).is_file() else None

    writer = gguf.GGUFWriter(file, plan.architecture.name)
    writer.add_type("model")
    writer.add_name(folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[plan.kind]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_hyperparameters(writer, config)
    write_tokenizer(writer, tokenizer, generation, tensors.shape(embedding)[0])

    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
    total = 0
    for entry in named:
        shape = tensors.shape(entry.source)
        bytes_shape = gguf.quant_shape_to_byte_shape(shape, types[entry.name])
        size = int(np.prod(bytes_shape))
        writer.add_tensor_info(entry.name, bytes_shape, np.dtype(np.uint8), size, types[entry.name])
        total += size
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for entry in named:
            writer.write_tensor_data(plan.encoded(entry))
    finally:
        writer.close()
    return total


def _type_of_codes(grid: Grid, dtype: str | None) -> Any:
    """The type that stores the codes of a grid unchanged; None where there is none."""
    types = import_gguf().GGMLQuantizationType
    if grid.bits == 4 and dtype is None:
        return types.Q4_0
    return types.Q8_0 if grid.bits <= 8 else None


def _type_of(shape: tuple[int, ...], kind: str) -> Any:
    """The type of a tensor: for matrices the requested one, unless its blocks do not divide their rows."""
    types = import_gguf().GGMLQuantizationType
    if len(shape) < 2:
        return types.F32
    if kind == "q8_0":
        return types.Q8_0 if shape[-1] % _Q8_0_BLOCK == 0 else types.BF16
    return {"float32": types.F32, "float16": types.F16, "bfloat16": types.BF16}[kind]


def _encode(tensor: Tensor, kind: Any) -> NDArray[np.uint8]:
    """The bytes of a tensor in a GGUF type, of shape (..., bytes of a row)."""
    gguf = import_gguf()
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind.name in dtypes:
        cast = tensor.to(dtypes[kind.name]).contiguous()
        encoded: NDArray[np.uint8] = cast.view(torch.uint8).numpy()
        return encoded
    rows = [gguf.quantize(part.float().numpy(), kind) for part in tensor.split(_CHUNK_ROWS)]
    encoded = np.concatenate(rows)
    return encoded
