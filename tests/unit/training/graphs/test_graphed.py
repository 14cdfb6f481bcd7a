"""Batches in the form that graphs require, and training on them, with steps that run where a GPU would replay them."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sbft.data.collate import Collator
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.batches.batch_counts import Counts
from sbft.training.graphs import cuda_graph
from sbft.training.graphs.cuda_graph import WARM_UP
from sbft.training.graphs.graphed_training import is_causal, one_example_a_row, padded_length, why_plain
from sbft.training.loss.head_trial import find_head
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model


def test_lengths_are_few_and_little_longer() -> None:
    lengths = {length: padded_length(length) for length in range(1, 4097)}
    assert [lengths[n] for n in (1, 16, 17, 64, 65, 128, 129, 512, 513, 600, 1024)] == [
        16, 16, 32, 64, 80, 128, 160, 512, 640, 640, 1024,
    ]  # fmt: skip
    assert all(length <= padded < 1.25 * length + 16 for length, padded in lengths.items())
    assert all(padded_length(padded) == padded for padded in set(lengths.values()))
    assert len({padded for length, padded in lengths.items() if length > 128}) == 4 * 5
    assert len({padded for length, padded in lengths.items() if length <= 2048}) == 24 < cuda_graph.MOST_GRAPHS
    assert padded_length(1000, 1010) == 1010 and padded_length(1000, 2048) == 1024
    assert padded_length(1000, 900) == 1024  # the stated number of positions need not be a bound


IDS = torch.tensor([[5, 6, 7], [5, 6, 0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
PARTLY = torch.tensor([[-100, 6, 7], [-100, 6, -100]])


@pytest.fixture
def given(tmp_path: Path) -> Callable[[dict[str, Any]], dict[str, Any] | str]:
    """The inputs that graphs get from a batch, or the reason why they get none."""
    args = SmallBatchTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = SmallBatchTrainer(model=tiny_model(), args=args)
    trainer._is_causal, trainer._most_positions = True, 4096
    return lambda batch: trainer._graphable(batch, batch)


def test_a_batch_as_graphs_take_it(given: Any) -> None:
    taken = given({"input_ids": IDS, "labels": PARTLY, "attention_mask": MASK})
    assert taken.keys() == {"input_ids", "labels", "all_labelled"}
    assert taken["input_ids"].shape == taken["labels"].shape == (2, 16)
    assert torch.equal(taken["input_ids"][:, :3], IDS) and torch.equal(taken["labels"][:, :3], PARTLY)
    assert (taken["labels"][:, 3:] == -100).all() and taken["all_labelled"] is False


def test_windows_stay_as_they_are_and_labelled_batches_of_other_lengths_are_padded(given: Any) -> None:
    for _ in range(2):
        taken = given({"input_ids": IDS, "labels": IDS})
        assert taken["input_ids"] is taken["labels"] is IDS and taken["all_labelled"] is True
    for length in (2, 4, 5):
        ids = torch.ones(1, length, dtype=torch.int64)
        taken = given({"input_ids": ids, "labels": ids})
        assert taken["input_ids"].shape == (1, 16) and taken["all_labelled"] is False
        assert taken["labels"].tolist() == [[1] * length + [-100] * (16 - length)]


@pytest.mark.parametrize(
    ("reason", "batch"),
    [
        ("holds input_ids, labels, position_ids", {"input_ids": IDS, "labels": IDS, "position_ids": IDS}),
        ("holds input_ids$", {"input_ids": IDS}),
        ("only padding on the right", {"input_ids": IDS, "labels": PARTLY, "attention_mask": MASK.flip(1)}),
        ("only padding on the right", {"input_ids": IDS, "labels": IDS, "attention_mask": MASK}),
    ],
)
def test_batches_that_no_graph_takes(given: Any, reason: str, batch: dict[str, Tensor]) -> None:
    found = given(batch)
    assert isinstance(found, str) and re.search(reason, found)


def test_a_model_that_is_not_causal_has_graphs_of_windows_alone() -> None:
    assert why_plain(Counts(6, True, True), causal=True) is None
    found = why_plain(Counts(6, False, True), causal=False)
    assert found is not None and "change the model's other hidden states" in found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_whose_tokens_see_what_is_behind_them_is_found_out(kind: str) -> None:
    model = tiny_model(kind)
    head = find_head(model)
    model.train()
    assert is_causal(model, head)
    assert all(module.training for module in model.modules())
    for module in model.modules():
        if hasattr(module, "is_causal"):
            module.is_causal = False
    assert not is_causal(model, head)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="these versions make that mask in another way")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "gemma3"])
def test_what_is_captured_has_the_bits_of_what_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers makes another mask while a stream is captured, which rounds gradients in bfloat16 differently."""
    model = tiny_model(kind)
    head = find_head(model)
    ids = torch.randint(3, 500, (1, 48), generator=torch.Generator().manual_seed(0))

    def gradients(context: Any = nullcontext) -> tuple[Tensor, ...]:
        with context(), sdpa_kernel(SDPBackend.MATH):
            loss = head.loss(model, {"input_ids": ids, "labels": ids}, torch.tensor(47), every_position=True)
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    def are_same(some: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))

    plain = gradients()
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    if kind in ("llama", "qwen3"):
        assert not are_same(plain, gradients())  # otherwise the context is no longer needed
    assert are_same(plain, gradients(one_example_a_row))


class Again:
    """Runs a step where a graph would replay it, on the batch that the graph would have."""

    pool = None

    def __init__(self, batch: Any, loss_of: Any, updates: Any, stream: Any, pool: Any) -> None:
        self.shapes = {name: one.shape for name, one in batch.items() if isinstance(one, Tensor)}
        self._loss_of, self._updates = loss_of, updates

    def forward(self, batch: Any) -> Tensor:
        assert self.shapes == {name: one.shape for name, one in batch.items() if isinstance(one, Tensor)}
        self._loss = self._loss_of(batch)
        return self._loss.detach()

    def backward(self) -> None:
        with self._updates.within():
            self._loss.backward()


class OnGraphs(SmallBatchTrainer):
    """Uses graphs on a CPU."""

    def _attach(self) -> None:
        super()._attach()
        assert self._token_optimizer is not None
        self._start_graphs(self._token_optimizer, self._find_head())


def rows() -> list[dict[str, Any]]:
    """Questions and answers of several lengths."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (9, 30, 12, 14, 31, 40, 10, 20, 33, 15, 11, 38):
        ids = torch.randint(3, 500, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return made


def trained(folder: Path, kind: type[SmallBatchTrainer], use_cpu: bool = True, **settings: Any) -> SmallBatchTrainer:
    torch.manual_seed(0)
    args = SmallBatchTrainingArguments(
        output_dir=str(folder), use_cpu=use_cpu, num_train_epochs=2, report_to="none", save_strategy="no", logging_steps=1,
        disable_tqdm=True, seed=1, cast_weights=False, stochastic_rounding=False, **settings,
    )  # fmt: skip
    model = tiny_model(dtype=torch.float32)
    trainer = kind(model=model, args=args, train_dataset=rows(), data_collator=Collator(2))
    trainer.train()
    return trainer


ADAFACTOR: dict[str, Any] = {"learning_rate": 1e-3, "second_moment_half_life": 200}
ADAMW: dict[str, Any] = {
    "token_optimizer": "adamw", "learning_rate": 1e-4, "first_moment_half_life": 100, "second_moment_half_life": 200,
}  # fmt: skip
HEAVY_BALL: dict[str, Any] = {"token_optimizer": "sgd", "momentum_half_life": 100, "learning_rate": 0.3}


# Adafactor and AdamW take a full step even for a gradient that is only rounding errors, like that of a key's bias.
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [(ADAFACTOR, 1e-4), (ADAMW, 1e-3), (HEAVY_BALL, 1e-5), ({**HEAVY_BALL, "per_device_train_batch_size": 2}, 1e-5)],
    ids=["adafactor", "adamw", "sgd", "sgd, two at once"],
)
def test_questions_and_answers_are_trained_on_as_without_graphs_with_a_mock_graph(
    settings: dict[str, Any], tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBFT_KERNELS", "reference")
    theirs = trained(tmp_path, SmallBatchTrainer, **settings)
    captured: list[Again] = []
    monkeypatch.setattr(cuda_graph, "_Graph", lambda *given: captured.append(Again(*given)) or captured[-1])
    monkeypatch.setattr(cuda_graph, "_Beside", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    # The reference changes weights in place, which torch notices, unlike changes by Triton programs.
    monkeypatch.setattr("sbft.optim.capture.CapturedUpdates.circumstances", lambda updates: None)
    ours = trained(tmp_path, OnGraphs, **settings)
    assert len(captured) > 1 and len({one.shapes["input_ids"] for one in captured}) == len(captured)
    assert ours.tokens_seen == theirs.tokens_seen
    assert_close(ours, theirs, tolerance)


def assert_close(ours: SmallBatchTrainer, theirs: SmallBatchTrainer, tolerance: float) -> None:
    for a, b in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=30 * tolerance)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert (a - b).norm() <= 10 * tolerance * b.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [(ADAFACTOR, 1e-4), (ADAMW, 1e-3), (HEAVY_BALL, 1e-5)],
    ids=["adafactor", "adamw", "sgd"],
)
def test_questions_and_answers_on_a_gpu(
    settings: dict[str, Any], tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = trained(tmp_path, SmallBatchTrainer, use_cpu=False, **settings)
    replays: list[Any] = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph))[1])
    ours = trained(tmp_path, SmallBatchTrainer, use_cpu=False, cuda_graphs=True, **settings)
    lengths = {padded_length(-(-len(row["input_ids"]) // 16) * 16) for row in rows()}
    assert len(replays) >= 2 * (2 * len(rows()) - WARM_UP - len(lengths)) and len(set(replays)) == 2 * len(lengths)
    assert_close(ours, theirs, tolerance)
