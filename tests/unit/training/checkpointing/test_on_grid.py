"""A trainer's checkpoints of weights on a grid: bit-exact resuming, the best model, and a plain model at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sbft import SmallBatchTrainer, SmallBatchTrainingArguments
from sbft.grid.grid_files import has_grid_weights, holds_grid_weights
from tests.unit.grid.cases import FORMATS, dense_copy, grid_model, stored, tokens


def trainer(folder: Path, steps: int, form: str = "int4", **settings: Any) -> SmallBatchTrainer:
    model = grid_model("llama tied", form, smallest_elements=4096)
    data: Any = [{"input_ids": tokens(seed=i)[0], "labels": tokens(seed=i)[0]} for i in range(4)]
    arguments = SmallBatchTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        disable_tqdm=True,
        lr_scheduler_type="constant",
        learning_rate=0.01,
        use_cpu=True,
        **settings,
    )
    return SmallBatchTrainer(model, arguments, train_dataset=data, eval_dataset=data[:1])


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_a_resumed_run_ends_in_the_same_bits(optimizer: str, form: str, tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 4, form, token_optimizer=optimizer)
    whole.train()
    begun = trainer(tmp_path / "resumed", 2, form, token_optimizer=optimizer)
    begun.train()
    assert holds_grid_weights(tmp_path / "resumed" / "checkpoint-2")
    assert not (tmp_path / "resumed" / "checkpoint-2" / "model.safetensors").exists()
    resumed = trainer(tmp_path / "resumed", 4, form, token_optimizer=optimizer)
    resumed.train(resume_from_checkpoint=True)
    assert equal(stored(resumed.model), stored(whole.model))
    assert not equal(stored(resumed.model), stored(begun.model))


def test_the_best_model_is_read_exactly_and_saved_as_bfloat16(tmp_path: Path) -> None:
    # The loss falls, but larger counts as better, so that the first checkpoint is the best.
    best = trainer(tmp_path, 4, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True)
    best.train()
    assert str(best.state.best_model_checkpoint).endswith("checkpoint-2")
    first = trainer(tmp_path / "first", 2)
    first.train()
    assert equal(stored(best.model), stored(first.model))
    best.save_model(str(tmp_path / "final"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.bfloat16)
    assert not has_grid_weights(loaded) and not holds_grid_weights(tmp_path / "final")
    expected = dict(dense_copy(best.model).named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in loaded.named_parameters())
