"""The files of a LoRA adapter as PEFT reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sbft.models.names import resolve

ADAPTER_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's, before the name of a module of the base model


@dataclass(frozen=True)
class Factors:
    """The two matrices of one layer; B @ A is added to its weight."""

    down: Tensor
    """A, [rank, in]."""
    up: Tensor
    """B, [out, rank]."""

    @property
    def rank(self) -> int:
        """Upper limit of the rank of their product."""
        return len(self.down)


def save_lora(folder: Path, model: PreTrainedModel, factors: dict[str, Factors], base: str) -> None:
    """Write an adapter's weights and config.

    Args:
        folder: an existing folder to write to.
        model: the model under the adapter, for the names and types of its modules; its weights are not used.
        factors: by the name of the module.
        base: name of the model under the adapter: hub id, folder or builtin:NAME.
    """
    _config(model, factors, base).save_pretrained(folder)
    tensors = {}
    for path, both in factors.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = both.down
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = both.up
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})


def _config(model: PreTrainedModel, factors: dict[str, Factors], base: str) -> Any:
    from peft import LoraConfig

    rank = max(both.rank for both in factors.values())
    paths = [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    smaller = {
        name: lower
        for lower in {both.rank for both in factors.values()} - {rank}
        for name in _shortened({path for path, both in factors.items() if both.rank == lower}, paths)
    }
    folder = Path(resolve(base))
    return LoraConfig(
        # PEFT can resolve a hub id or an absolute folder later, but not builtin:NAME.
        base_model_name_or_path=str(folder.absolute()) if folder.is_dir() else base,
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        target_modules=_shortened(set(factors), paths),
        fan_in_fan_out=any(isinstance(model.get_submodule(path), Conv1D) for path in factors),
    )


def _shortened(chosen: set[str], paths: list[str]) -> list[str]:
    """Names of modules, shortened to a common name such as q_proj where all modules of this name are included."""
    last = {path: path.rpartition(".")[2] for path in paths}
    partly = {last[path] for path in paths if path not in chosen}
    return sorted({path if last[path] in partly else last[path] for path in chosen})
