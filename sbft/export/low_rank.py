"""Extracts a LoRA adapter from a fully fine-tuned model: the difference to its base, truncated to a rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from sbft.errors import ExportError, MissingPackageError, how_to_install
from sbft.export.checkpoint import (
    GENERATION_FILE,
    TOKENIZER_FILES,
    check_destination,
    check_dtype,
    check_source,
    copy_files,
    is_adapter,
    new_folder,
    recipe_of,
    torch_dtype,
)
from sbft.export.lora_files import ADAPTER_FILE, Factors, save_lora
from sbft.grid.plain import plain_folder
from sbft.models.load import load_config
from sbft.models.tensor_files import TensorFiles, cast, checkpoint_folder

_EXACT_UP_TO = 1024
_POWER_ITERATIONS = 8
_ROWS = 4096


@dataclass
class Kind:
    """The tensors of one kind that training has changed, over all layers."""

    name: str
    adapted: bool
    """Whether the adapter has matrices for them; if not, their difference is lost."""
    tensors: int = 0
    difference: float = 0.0
    """Squared Frobenius norm of their difference to the base model."""
    kept: float = 0.0
    """The part of it that the adapter keeps."""


@dataclass(frozen=True)
class Extraction:
    """An adapter that was written, and how much of the difference it keeps."""

    folder: Path
    base: str
    rank: int
    """The highest rank of its matrices: the requested one, or less if all matrices are smaller."""
    kinds: list[Kind]
    adapter_bytes: int
    model_bytes: int
    extract_s: float

    @property
    def difference(self) -> float:
        """Squared Frobenius norm of the whole difference."""
        return sum(kind.difference for kind in self.kinds)

    @property
    def share_kept(self) -> float:
        """Share of the whole difference that the adapter keeps; the part of tensors without matrices is lost."""
        return sum(kind.kept for kind in self.kinds) / self.difference


def extract_lora(
    source: Path,
    destination: Path,
    rank: int,
    *,
    base: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Callable[[str], None] = lambda name: None,
) -> Extraction:
    """Write the PEFT adapter of a given rank that brings the base model nearest to a fully fine-tuned one.

    The difference D of every linear layer to the base is decomposed, D = U S V^T, and cut off after the `rank` largest
    singular values: B = U sqrt(S), A = sqrt(S) V^T, lora_alpha = rank. One pair of tensors is in memory at a time, and
    the adapter.

    Embeddings, output head, norms and biases get no matrices: PEFT would merge an adapter of tied embeddings twice, and only
    PEFT reads whole tensors beside an adapter. Their part of the difference is lost, and counts as lost.

    Args:
        source: folder of a run that trained all weights, one of its checkpoints, or any such checkpoint.
        destination: the folder to make. It appears when everything in it is written.
        rank: of the adapter, at least 1; matrices with fewer rows or columns are kept whole.
        base: the model it was trained from: hub id, folder or builtin:NAME; None: the one that its recipe names.
        dtype: of the adapter: bfloat16, float32 or float16; None: that of the weights.
        overwrite: replace a model at the destination.
        trust_remote_code: run the Python code that comes with the model.
        progress: called with the name of each tensor before it is read.

    Raises:
        SbftError: if there is no such model, the base does not match it, or the two do not differ.
    """
    begun = time.perf_counter()
    if rank < 1:
        raise ExportError(f"The rank is {rank}, expected at least 1.")
    _check_peft()
    check_dtype(dtype)
    base = _base_of(source, base)
    folder_of_base = checkpoint_folder(base)
    check_destination(destination, overwrite=overwrite, needed=[source, folder_of_base])
    model = _without_weights(source, trust_remote_code)
    kinds: dict[str, Kind] = {}
    factors: dict[str, Factors] = {}
    with plain_folder(source) as plain:
        tuned, start = TensorFiles(plain), TensorFiles(folder_of_base)
        for name in tuned:
            progress(name)
            pair = _pair(name, tuned, start, model.base_model_prefix)
            if torch.equal(*pair):
                continue
            path, module = _module_of(name, pair[0], model, source)
            kind = kinds.setdefault(_kind(name), Kind(_kind(name), _takes_adapter(name, module, model)))
            found = _measure(name, pair, kind, module, rank, None if dtype is None else torch_dtype(dtype))
            if found is not None:
                factors[path] = found
    _check_there_is_something(kinds, factors, source, base)
    with new_folder(destination) as folder:
        save_lora(folder, model, factors, base)
        copy_files(source, folder, (*TOKENIZER_FILES, GENERATION_FILE))
    return Extraction(
        folder=destination,
        base=base,
        rank=max(one.rank for one in factors.values()),
        kinds=list(kinds.values()),
        adapter_bytes=(destination / ADAPTER_FILE).stat().st_size,
        model_bytes=sum(tuned.size_bytes(name) for name in tuned),
        extract_s=time.perf_counter() - begun,
    )


def decompose(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors of a matrix's best approximation of a given rank.

    All singular values are computed if a large part of them is needed, and for matrices of up to 1024 rows or columns, where
    this takes one core a second. At 2048 it takes six seconds. A randomized decomposition (Halko et al., arXiv 0909.4061)
    finds the first few in an eighth (rank 64) to a twenty-fifth (rank 16) of the time. The singular values of a fine-tuning
    fall slowly, because rounding of weights adds to all of them. So it computes more directions than needed, with eight
    iterations. It then loses a thousandth of what the best approximation keeps, or 2 % if the matrix is mostly noise.

    Args:
        matrix: [m, n], float32.
        rank: of the approximation, at most the smaller of m and n.

    Returns:
        B [m, rank] and A [rank, n]; B @ A is the approximation, and a column of B has the same norm as its row of A.
    """
    smaller, directions = min(matrix.shape), 2 * rank + 16
    if smaller > _EXACT_UP_TO and 4 * directions <= smaller:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)  # the same adapter every time
            left, values, right = torch.svd_lowrank(matrix, q=directions, niter=_POWER_ITERATIONS)
        right = right.T
    else:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("--as-lora requires the package peft. " + how_to_install("'sbft[lora]'")) from error


def _base_of(source: Path, base: str | None) -> str:
    """The model that a fully fine-tuned one was trained from."""
    check_source(source)
    if is_adapter(source):
        raise ExportError(
            f"{source} already has a LoRA adapter. Copy the folder as it is, or leave --as-lora out to merge it into its "
            "base model."
        )
    if base is not None:
        return base
    recipe = recipe_of(source)
    if recipe is None:
        raise ExportError(f"{source} has no recipe.yaml to say which model it was trained from. Type --base MODEL.")
    return recipe.model


def _without_weights(source: Path, trust_remote_code: bool) -> PreTrainedModel:
    config = load_config(str(source), trust_remote_code=trust_remote_code)
    with torch.device("meta"), no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model


def _pair(name: str, tuned: TensorFiles, start: TensorFiles, prefix: str) -> tuple[Tensor, Tensor]:
    """A tensor after training, and before it in the same dtype."""
    there = next((spelling for spelling in _spellings(name, prefix) if spelling in start), None)
    if there is None:
        raise ExportError(
            f"The base model in {start.folder} does not match: it has no weight {name}. Type another --base."
        )
    if start.shape(there) != tuned.shape(name):
        raise ExportError(
            f"The base model in {start.folder} does not match: its {name} has the shape {list(start.shape(there))}, and that "
            f"in {tuned.folder} has {list(tuned.shape(name))}. Type another --base."
        )
    after = tuned.read(name)
    return after, start.read(there).to(after.dtype)


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """A name as it is, and with and without the decoder's prefix, which some checkpoints leave out."""
    yield name
    yield f"{prefix}.{name}"
    yield name.removeprefix(f"{prefix}.")


def _module_of(name: str, tensor: Tensor, model: PreTrainedModel, source: Path) -> tuple[str, nn.Module]:
    """The module that a tensor of the checkpoint belongs to, with its name."""
    path, _, leaf = name.rpartition(".")
    modules = dict(model.named_modules())
    for spelling in _spellings(path, model.base_model_prefix):
        module = modules.get(spelling)
        if module is None or leaf not in {**module._parameters, **module._buffers}:
            continue
        if tensor.ndim <= 2 or isinstance(module, nn.Conv1d):
            return spelling, module
    raise ExportError(
        f"No adapter can be extracted from {source}: training has changed {name}, which {type(model).__name__} stores in one "
        "tensor with other matrices, such as the experts of a mixture. Leave --as-lora out to export the whole model."
    )


def _kind(name: str) -> str:
    """A tensor's name without its layer: q_proj, input_layernorm, q_proj.bias."""
    module, leaf = name.split(".")[-2:]
    return module if leaf == "weight" else f"{module}.{leaf}"


def _takes_adapter(name: str, module: nn.Module, model: PreTrainedModel) -> bool:
    linear = isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    return linear and name.endswith(".weight")


def _measure(
    name: str, pair: tuple[Tensor, Tensor], kind: Kind, module: nn.Module, rank: int, dtype: torch.dtype | None
) -> Factors | None:
    """Add the difference of one pair to that of its kind, and decompose it if the module gets an adapter."""
    after, before = pair
    # Embeddings are large: where the whole difference is not needed, it is computed in parts.
    parts = [pair] if kind.adapted else _in_parts(after, before)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    norm = 0.0
    for one, other in parts:
        difference = one.to(device, torch.float32) - other.to(device, torch.float32)
        norm += _squared_norm(difference)
    if not math.isfinite(norm):
        raise ExportError(f"The weight {name} has values that are not finite, in the model or in its base.")
    kind.tensors += 1
    kind.difference += norm
    if not kind.adapted:
        return None
    if isinstance(module, Conv1D):
        difference = difference.T  # GPT-2 stores its weights as [in, out]
    up, down = (cast(name, part, dtype or after.dtype) for part in decompose(difference, min(rank, *difference.shape)))
    # Measured on the written factors, which are rounded to their dtype.
    kind.kept += norm - _squared_norm(difference.addmm(up.float(), down.float(), alpha=-1))
    return Factors(down.cpu().contiguous(), up.cpu().contiguous())


def _in_parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.atleast_1d(tensor).split(_ROWS) for tensor in tensors), strict=True))


def _squared_norm(tensor: Tensor) -> float:
    """Squared Frobenius norm, summed in float64 row by row, without a float64 copy of the tensor."""
    return float(torch.linalg.vector_norm(tensor, dim=-1).double().square().sum())


def _check_there_is_something(kinds: dict[str, Kind], factors: Collection[str], source: Path, base: str) -> None:
    if not kinds:
        raise ExportError(
            f"The weights in {source} equal those of {base}: there is no difference to extract. If it was trained from "
            "another model, type --base MODEL."
        )
    if not factors:
        raise ExportError(
            f"{source} and {base} differ only in {', '.join(kinds)}, for which an adapter has no matrices. Leave --as-lora "
            "out to export the whole model."
        )
