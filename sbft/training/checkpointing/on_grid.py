"""Checkpoints of a model with weights on a grid: exact, as codes and scales. The trained model is saved as plain bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from sbft.grid.grid_files import has_grid_weights, holds_grid_weights, read_exact, save_checkpoint, save_dense

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class GridCheckpoints(_Base):
    """Put between `WholeCheckpoints` and a `Trainer`: of weights on a grid, checkpoints hold codes and scales.

    `save_model` writes a plain bfloat16 model. Of an adapter on a frozen model, only the adapter is saved, as by a `Trainer`.
    """

    args: Any
    model: Any
    _writing: bool

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As in `Trainer`, which cannot write weights on a grid."""
        if not isinstance(self.model, PreTrainedModel) or not has_grid_weights(self.model):
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        folder = Path(str(self.args.output_dir if output_dir is None else output_dir))
        write = save_checkpoint if self._writing else save_dense
        write(self.model, folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in `Trainer`; codes and scales are read exactly."""
        if holds_grid_weights(Path(resume_from_checkpoint)):
            read_exact(self.model if model is None else model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As in `Trainer`; codes and scales are read exactly."""
        best = Path(str(self.state.best_model_checkpoint))
        if holds_grid_weights(best):
            read_exact(self.model, best)
        else:
            super()._load_best_model()
