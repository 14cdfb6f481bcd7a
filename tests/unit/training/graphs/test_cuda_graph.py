"""Steps as CUDA graphs: which are captured, on any machine; what they compute, on a GPU."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

from sbft.data.collate import Collator
from sbft.data.windows import collate_windows
from sbft.errors import TrainingError
from sbft.optim import Adafactor
from sbft.training.arguments import ArgumentError, SmallBatchTrainingArguments
from sbft.training.graphs import cuda_graph
from sbft.training.graphs.cuda_graph import WARM_UP, GraphedSteps
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model

# Which steps are captured


class Recorded:
    """What a `GraphedSteps` did, without a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.circumstances: object = "as ever"
        self.pools: list[object] = []
        weight = torch.zeros((), requires_grad=True)
        recorded = self

        class Updates:
            def __init__(self, optimizer: Any) -> None:
                self.within = nullcontext

            def circumstances(self) -> object:
                return recorded.circumstances

        class Graph:
            def __init__(self, batch: Any, loss_of: Any, updates: Any, stream: Any, pool: Any) -> None:
                self.pool = pool
                recorded.pools.append(pool)
                recorded.done.append("capture")

            def forward(self, batch: Any) -> Tensor:
                recorded.done.append("replay")
                return torch.zeros(())

            def backward(self) -> None:
                recorded.done.append("replayed backward")

        monkeypatch.setattr(cuda_graph, "CapturedUpdates", Updates)
        monkeypatch.setattr(cuda_graph, "_Graph", Graph)
        monkeypatch.setattr(cuda_graph, "_Beside", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.done.append("wait"))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)

        def loss_of(batch: Any) -> Tensor:
            self.done.append("run")
            return weight * 2

        self.steps = GraphedSteps(nn.Module(), loss_of)  # type: ignore[arg-type]

    def step(self, size: int, backward: bool = True, **more: Any) -> list[str]:
        self.done.clear()
        self.steps.forward({"input_ids": torch.zeros(size), "num_items": None, **more})
        self.steps.backward() if backward else self.steps.leave_out()
        return list(self.done)


CAPTURED, REPLAYED = ["capture", "replay", "replayed backward"], ["replay", "replayed backward"]


def test_a_shape_is_captured_behind_its_warm_up_with_a_mock_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    assert [recorded.step(4) for _ in range(WARM_UP + 3)] == [["run"]] * WARM_UP + [CAPTURED, REPLAYED, REPLAYED]


def test_once_warm_a_shape_is_captured_when_it_comes_again_and_held_beside_others_with_a_mock_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recorded = Recorded(monkeypatch)
    assert [recorded.step(size) for size in (4, 8, 3)] == [["run"]] * 3
    assert [recorded.step(size) for size in (8, 16, 4, 16)] == [CAPTURED, ["run"], CAPTURED, CAPTURED]
    assert [recorded.step(size) for size in (4, 8, 16)] == [REPLAYED] * 3
    assert recorded.step(4, all_labelled=True) == ["run"]  # counts as another shape
    assert len(set(recorded.pools)) == 1


def test_shapes_for_which_there_is_no_room_run_with_a_mock_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graph, "MOST_GRAPHS", 2)
    recorded = Recorded(monkeypatch)
    for size in (1, 2, 3):
        recorded.step(size)
    assert [recorded.step(size) for size in (1, 2, 3, 3, 1)] == [CAPTURED, CAPTURED, ["run"], ["run"], REPLAYED]


def test_a_step_that_an_error_left_is_not_gone_on_with_with_a_mock_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    for _ in range(WARM_UP + 1):
        recorded.step(4)
    recorded.steps.forward({"input_ids": torch.zeros(8), "num_items": None})  # without a backward
    assert recorded.step(4) == REPLAYED


def test_what_no_longer_holds_is_captured_anew_with_a_mock_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    for _ in range(WARM_UP + 2):
        recorded.step(4)
    recorded.circumstances = "others"
    assert recorded.step(4) == ["wait", "run"]
    assert [recorded.step(4) for _ in range(WARM_UP)] == [["run"]] * (WARM_UP - 1) + [CAPTURED]


def test_a_step_that_is_left_out_has_no_backward_with_a_mock_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch)
    assert recorded.step(4, backward=False) == ["run"]
    assert recorded.steps._waiting is None


def test_steps_that_are_left_out_warm_nothing_up_with_a_mock_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first backward creates the optimizer's state; if a capture did, every replay would create it again."""
    recorded = Recorded(monkeypatch)
    for _ in range(WARM_UP + 1):
        assert recorded.step(4, backward=False) == ["run"]
    assert [recorded.step(4) for _ in range(WARM_UP + 1)] == [["run"]] * WARM_UP + [CAPTURED]


def test_a_model_that_cannot_be_captured_is_named_as_such_with_a_mock_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand much more")

    recorded = Recorded(monkeypatch)
    for _ in range(WARM_UP):
        recorded.step(4)
    monkeypatch.setattr(cuda_graph, "_Graph", refuse)
    with pytest.raises(TrainingError, match="Set cuda_graphs=False.*stream is capturing$"):
        recorded.step(4)


def test_what_does_not_go_with_graphs_is_refused(tmp_path: Path) -> None:
    for settings in (
        {"gradient_release": False}, {"token_optimizer": None}, {"schedule": "power"}, {"gradient_checkpointing": True},
        {"logits_free_loss": False}, {"bf16": True},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="cuda_graphs=True"):
            SmallBatchTrainingArguments(output_dir=str(tmp_path), cuda_graphs=True, **settings)  # type: ignore[arg-type]


def on_the_cpu(folder: Path, kind: type[SmallBatchTrainer] = SmallBatchTrainer, **settings: Any) -> SmallBatchTrainer:
    trainer_settings = {name: settings.pop(name) for name in ("compute_loss_func",) if name in settings}
    args = SmallBatchTrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **settings)
    return kind(model=tiny_model(), args=args, **trainer_settings)


class WithItsOwnLoss(SmallBatchTrainer):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)


def test_a_training_that_a_capture_would_change_is_refused(tmp_path: Path) -> None:
    checkpointing = on_the_cpu(tmp_path)
    checkpointing.model.gradient_checkpointing_enable()
    for trainer, reason in (
        (on_the_cpu(tmp_path), None),
        (on_the_cpu(tmp_path, label_smoothing_factor=0.1), "it has another loss"),
        (on_the_cpu(tmp_path, compute_loss_func=lambda *given, **named: None), "it has another loss"),
        (on_the_cpu(tmp_path, kind=WithItsOwnLoss), "it has another loss"),
        (on_the_cpu(tmp_path, logits_free_loss=False), "its loss is made from logits"),
        (checkpointing, "gradient checkpointing was enabled"),
    ):
        found = trainer._why_not_graphed(trainer._find_head())
        assert found is None if reason is None else found is not None and reason in found


def test_an_optimizer_that_releases_gradients_already_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = Adafactor(model.parameters())
    args = SmallBatchTrainingArguments(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, cuda_graphs=True, max_steps=1, disable_tqdm=True
    )
    row = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    trainer = SmallBatchTrainer(
        model=model, args=args, train_dataset=[row] * 2, data_collator=Collator(0), optimizers=(optimizer, None)
    )
    with (
        optimizer.release_gradients(),
        pytest.raises(ArgumentError, match=r"already releases its gradients.*remove\(\)"),
    ):
        trainer.train()
    trainer.train()


def test_one_warning_tells_that_batches_are_not_launched_as_graphs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = on_the_cpu(tmp_path)
    graphed: Any = object()
    trainer._graphed = graphed
    ids = torch.arange(8).view(1, 8)
    packed = {"input_ids": ids, "labels": ids, "position_ids": ids}
    padded_left = {"input_ids": ids, "labels": ids, "attention_mask": (ids > 3).long()}
    with caplog.at_level(logging.WARNING, logger="sbft.training.graphs.graphed_training"):
        for batch in (packed, packed, padded_left):
            assert trainer._graphed_step(trainer.model, batch) is None
    said = [record.getMessage() for record in caplog.records if "cuda_graphs=True" in record.getMessage()]
    assert len(said) == 1 and "position_ids" in said[0]


# What they compute

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adafactor": {}, "adamw": {"token_optimizer": "adamw"}, "sgd": {"token_optimizer": "sgd", "momentum": 0.9},
    "muon": {"token_optimizer": "muon"}, "sinkgd": {"token_optimizer": "sinkgd"},
    "row_adafactor": {"token_optimizer": "row_adafactor"},
}  # fmt: skip


def trained(
    folder: Path,
    graphs: bool,
    windows: int = 12,
    bad: int | None = None,
    dtype: Any = torch.bfloat16,
    callbacks: list[TrainerCallback] | None = None,
    **settings: Any,
) -> SmallBatchTrainer:
    """The trainer of a tiny model after a few windows of equal length, with plain attention, which sums in a fixed order."""
    torch.manual_seed(0)
    model = tiny_model().to("cuda", dtype)
    generator = np.random.default_rng(0)
    examples = [{"input_ids": generator.integers(0, 500, 48)} for _ in range(windows)]
    args = SmallBatchTrainingArguments(
        output_dir=str(folder), num_train_epochs=1, report_to="none", save_strategy="no", seed=1, cuda_graphs=graphs,
        lr_scheduler_type="linear", disable_tqdm=True, cast_weights=False, **{"logging_steps": 1, **settings},
    )  # fmt: skip
    trainer = SmallBatchTrainer(
        model=model, args=args, train_dataset=examples, data_collator=collate_windows, callbacks=callbacks
    )
    if bad is not None:
        trainer._all_finite = one_bad(trainer._all_finite, bad)  # type: ignore[method-assign]
    with sdpa_kernel(SDPBackend.MATH):
        trainer.train()
    return trainer


def one_bad(finite: Callable[[Tensor], bool], bad: int) -> Callable[[Tensor], bool]:
    seen = itertools.count()
    return lambda loss: finite(loss) and next(seen) != bad


def assert_same(ours: SmallBatchTrainer, theirs: SmallBatchTrainer) -> None:
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert history(ours) == history(theirs)
    assert ours.optimizer.optimizer.clock == theirs.optimizer.optimizer.clock  # type: ignore[union-attr]


def history(trainer: SmallBatchTrainer) -> list[tuple[float, float]]:
    found = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) > 5
    return found


@gpu
@needs_gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_graphed_steps_have_the_bits_of_plain_ones(name: str, tmp_path: Path) -> None:
    """In float32."""
    settings = {"stochastic_rounding": False, "dtype": torch.float32, **OPTIMIZERS[name]}
    ours = trained(tmp_path / "graphs", True, **settings)
    assert_same(ours, trained(tmp_path / "plain", False, **settings))


@gpu
@needs_gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 2, "windows": 15},  # the last batch is smaller
        {"batch_doubling_examples": 6, "largest_batch_size": 2, "windows": 24},
        {"bad": 2},
        {"bad": 9},
        {"weight_decay": 0.5, "learning_rate": 1e-3},
    ],
    ids=str,
)
def test_graphed_steps_among_others(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {"stochastic_rounding": False, "dtype": torch.float32, **settings}
    ours = trained(tmp_path / "graphs", True, **settings)
    theirs = trained(tmp_path / "plain", False, **settings)
    assert ours.skipped_steps == theirs.skipped_steps == int("bad" in settings)
    assert_same(ours, theirs)


@gpu
@needs_gpu
def test_graphs_are_used_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(self), replay(self)))
    trainer = trained(tmp_path, True)
    assert len(replays) == 2 * (12 - WARM_UP) and trainer._graphed is None


@gpu
@needs_gpu
def test_bfloat16_steps_come_close_to_plain_ones(tmp_path: Path) -> None:
    ours, theirs = trained(tmp_path / "graphs", True), trained(tmp_path / "plain", False)
    for a, b in zip(history(ours), history(theirs), strict=True):
        assert a == pytest.approx(b, rel=2**-8)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert ((a != b).float().mean() < 0.1) and torch.allclose(a, b, rtol=2**-6, atol=1e-5)


class Waits(TrainerCallback):
    """Makes torch warn about every wait for the device from the start of one step to the end of another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (self.first - 1, self.last):
            torch.cuda.set_sync_debug_mode("warn" if state.global_step < self.last else "default")


@gpu
@needs_gpu
def test_a_replayed_step_waits_for_its_loss_alone(tmp_path: Path) -> None:
    """Any other wait would also wait for the backward before it. The watch reads losses at every eighth step."""
    first, steps = 9, 16
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(tmp_path, True, windows=30, logging_steps=100, callbacks=[Waits(first, first + steps - 1)])
    where = [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchronizing CUDA" in str(one.message)]
    assert len(where) == steps + steps // 8, where
