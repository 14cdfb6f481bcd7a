"""Short trainings, with resident and with streamed layers, and their results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from sbft import SmallBatchTrainer, SmallBatchTrainingArguments
from sbft.training.offload.stand_in import StandIn
from tests.unit.grid.cases import stored
from tests.unit.training.offload.watched import WatchedLink, run_watched

ROWS = [
    {"input_ids": (ids := [5 + i % 7, 6, 7, 8 + i % 3, *range(20, 24 + i % 4)]), "labels": list(ids)} for i in range(24)
]


def trainer_of(folder: Path, model: PreTrainedModel | nn.Module, **arguments: Any) -> SmallBatchTrainer:
    defaults = {
        "learning_rate": 3e-3, "max_steps": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "logging_steps": 1, "per_device_eval_batch_size": 1,
    }  # fmt: skip
    args = SmallBatchTrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    rows = Dataset.from_list([{"input_ids": ROWS[0]["input_ids"], "labels": ROWS[0]["labels"]}] * 8)
    rows = rows if args.per_device_train_batch_size > 1 else Dataset.from_list(ROWS)
    return SmallBatchTrainer(model, args, train_dataset=rows, eval_dataset=rows.select(range(3)))


def on_links(patch: pytest.MonkeyPatch, make: Any = StandIn) -> None:
    """Make offloading use stand-ins for the device instead of refusing a CPU."""
    patch.setattr("sbft.training.offload.link.link_to", lambda device: make())


def train(folder: Path, model: Any, resume: bool | None = None, **arguments: Any) -> SmallBatchTrainer:
    trainer = trainer_of(folder, model, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def train_watched(
    folder: Path, model: Any, patch: pytest.MonkeyPatch, *, eager: bool = False, **arguments: Any
) -> SmallBatchTrainer:
    """Train with streamed layers, checking every access to their memory."""
    on_links(patch, lambda: WatchedLink(eager=eager))
    trainer = trainer_of(folder, model, **{"offload": "layers", **arguments})
    assert trainer.streamed is not None and isinstance(trainer.streamed.link, WatchedLink)
    streamed = trainer.streamed
    streamed.link.computes = lambda: streamed.computes
    run_watched(trainer.streamed.link, patch, trainer.train)
    return trainer


def outcome(trainer: SmallBatchTrainer) -> dict[str, Any]:
    """The complete result of a training: weights or codes, optimizer state, losses."""
    optimizer: Any = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    state = optimizer.state_dict()["state"]
    found: dict[str, Any] = {f"weights.{name}": value for name, value in stored(trainer.model).items()}
    found |= {f"state.{i}.{name}": value for i, of in state.items() for name, value in of.items()}
    losses = [entry.get("loss", entry.get("eval_loss")) for entry in trainer.state.log_history]
    return {**found, "losses": losses}


def assert_same(first: SmallBatchTrainer, second: SmallBatchTrainer) -> None:
    one, other = outcome(first), outcome(second)
    assert one.keys() == other.keys()
    differs = [name for name, value in one.items() if not _same(value, other[name])]
    assert differs == []


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other
