"""A fully fine-tuned model as a LoRA adapter of its base: the difference of their weights, cut off at a rank."""

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
    """The tensors of one kind that training has changed, those of all layers together."""

    name: str
    adapted: bool
    """Whether the adapter has matrices for them; if not, their difference is lost."""
    tensors: int = 0
    difference: float = 0.0
    """Squared Frobenius norm of their difference to the base model."""
    kept: float = 0.0
    """What the adapter keeps of it."""


@dataclass(frozen=True)
class Extraction:
    """An adapter that was written, and how much of the difference it keeps."""

    folder: Path
    base: str
    rank: int
    """The highest of its matrices: what was asked for, or less where they are all smaller."""
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
        """Share of the whole difference that the adapter keeps; what it has no matrices for is lost."""
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
    """Write the PEFT adapter of a rank that brings the base model nearest to a fully fine-tuned one.

    The difference D of every linear layer to the base is decomposed, D = U S V^T, and cut off after the `rank` largest
    singular values: B = U sqrt(S), A = sqrt(S) V^T, lora_alpha = rank. One pair of tensors is in memory at a time, and
    the adapter.

    Embeddings, output head, norms and biases get no matrices: an adapter of tied embeddings is added to them twice when
    PEFT merges it, and whole tensors beside an adapter are read by PEFT alone. Their part of the difference is lost, and
    is counted so.

    Args:
        source: folder of a run that trained all weights, one of its checkpoints, or any such checkpoint.
        destination: the folder to make. It appears when everything in it is written.
        rank: of the adapter, 1 or more; matrices with fewer rows or columns are kept whole.
        base: the model it was trained from: hub id, folder or builtin:NAME; None: the one that its recipe names.
        dtype: of the adapter: bfloat16, float32 or float16; None: that of the weights.
        overwrite: replace a model that lies at the destination.
        trust_remote_code: run the Python code that comes with the model.
        progress: told the name of each tensor before it is read.

    Raises:
        SbftError: if there is no such model, the base does not fit it, or the two do not differ.
    """
    begun = time.perf_counter()
    if rank < 1:
        raise ExportError(f"The rank is {rank}, expected 1 or more.")
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
    """The two factors of a matrix's best approximation of some rank.

    All singular values are computed where a good part of them is wanted, and of matrices of up to 1024 rows or columns,
    where one core does so in a second. At 2048 it needs six, 8 (rank 64) to 25 times (rank 16) as long as a randomized
    decomposition (Halko et al., arXiv 0909.4061), which finds the first few. A fine-tuning's values fall slowly, because
    the rounding of weights adds to all of them, so it looks for more directions than are wanted and iterates eight times.
    Of what the best approximation keeps it then loses a thousandth, and 2 % of a matrix that is little but noise.

    Args:
        matrix: [m, n], float32.
        rank: of the approximation, at most the smaller of m and n.

    Returns:
        B [m, rank] and A [rank, n]; B @ A is the approximation, and a column of B is as long as its row of A.
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
        raise MissingPackageError("--as-lora needs the package peft. " + how_to_install("'sbft[lora]'")) from error


def _base_of(source: Path, base: str | None) -> str:
    """The model that a fully fine-tuned one began as."""
    check_source(source)
    if is_adapter(source):
        raise ExportError(
            f"{source} holds a LoRA adapter already. Copy the folder as it is, or leave --as-lora out to merge it into its "
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
    """A tensor as trained, and as it was before, as far as the trained one's dtype can hold it."""
    there = next((one for one in _spellings(name, prefix) if one in start), None)
    if there is None:
        raise ExportError(
            f"The base model in {start.folder} does not fit: it has no weight {name}. Type another --base."
        )
    if start.shape(there) != tuned.shape(name):
        raise ExportError(
            f"The base model in {start.folder} does not fit: its {name} has the shape {list(start.shape(there))}, and that "
            f"in {tuned.folder} {list(tuned.shape(name))}. Type another --base."
        )
    after = tuned.read(name)
    return after, start.read(there).to(after.dtype)


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """A name as it is, and with and without the decoder's own, which some checkpoints leave out."""
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
        f"No adapter can be extracted from {source}: {type(model).__name__} holds {name}, which training has changed, not as "
        "a matrix of its own, but with others in one tensor, as the experts of a mixture are. Leave --as-lora out to "
        "export the whole model."
    )


def _kind(name: str) -> str:
    """What a tensor is called in every layer: q_proj, input_layernorm, q_proj.bias."""
    module, leaf = name.split(".")[-2:]
    return module if leaf == "weight" else f"{module}.{leaf}"


def _takes_adapter(name: str, module: nn.Module, model: PreTrainedModel) -> bool:
    linear = isinstance(module, (nn.Linear, Conv1D)) and module is not model.get_output_embeddings()
    return linear and name.endswith(".weight")


def _measure(
    name: str, pair: tuple[Tensor, Tensor], kind: Kind, module: nn.Module, rank: int, dtype: torch.dtype | None
) -> Factors | None:
    """Add the difference of one pair to those of its kind, and decompose it if it takes an adapter."""
    after, before = pair
    # Embeddings are large, so that a difference that need not be whole is not made.
    parts = [pair] if kind.adapted else _in_parts(after, before)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    norm = 0.0
    for one, other in parts:
        difference = one.to(device, torch.float32) - other.to(device, torch.float32)
        norm += _squared_norm(difference)
    if not math.isfinite(norm):
        raise ExportError(f"The weight {name} holds values that are no finite numbers, in the model or in its base.")
    kind.tensors += 1
    kind.difference += norm
    if not kind.adapted:
        return None
    if isinstance(module, Conv1D):
        difference = difference.T  # GPT-2 holds its weights as [in, out]
    up, down = (cast(name, part, dtype or after.dtype) for part in decompose(difference, min(rank, *difference.shape)))
    # Of the factors as they are written, which their dtype has rounded.
    kind.kept += norm - _squared_norm(difference.addmm(up.float(), down.float(), alpha=-1))
    return Factors(down.cpu().contiguous(), up.cpu().contiguous())


def _in_parts(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(torch.atleast_1d(tensor).split(_ROWS) for tensor in tensors), strict=True))


def _squared_norm(tensor: Tensor) -> float:
    """Squared Frobenius norm, summed in float64 over rows, without a copy of the tensor in it."""
    return float(torch.linalg.vector_norm(tensor, dim=-1).double().square().sum())


def _check_there_is_something(kinds: dict[str, Kind], factors: Collection[str], source: Path, base: str) -> None:
    if not kinds:
        raise ExportError(
            f"The weights in {source} are those of {base}: there is no difference to extract. If it was trained from "
            "another model, type --base MODEL."
        )
    if not factors:
        raise ExportError(
            f"Between {source} and {base} only {', '.join(kinds)} differ, for which an adapter has no matrices. Leave "
            "--as-lora out to export the whole model."
        )
