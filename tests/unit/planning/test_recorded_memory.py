"""Predictions for runs of the lab match the measurements in their committed records."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from benchmarks.lab.predicted_memory import compare
from sbft.models.load import load_config
from sbft.planning.memory import predict
from sbft.planning.memory.graphs import shape_in_graph
from sbft.planning.memory.predict import predict_recipe
from sbft.planning.memory.skeleton import skeleton
from sbft.planning.memory.step import StepShape
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.runs.build import prepare_model
from tests.tiny import tiny_tokenizer

LAB = Path(__file__).parents[3] / "benchmarks" / "lab" / "results"
GOAL = 0.05


def resolved(*overrides: str, model: str = "scratch:0.4m") -> Recipe:
    settings = ["data.max_length=512", "data.train_tokens=4096", *overrides]
    return resolve(load_recipe(None, settings, model=model, data="builtin:python-stdlib", method="sbft"))


@pytest.mark.parametrize(
    ("folder", "variants"),
    [
        ("xeon-2-cores-cpu", {"adam-1", "adafactor-16", "spectral-4", "sgd-64", "sinkgd-stochastic-1"}),
        ("h100-small", {"sgd-1", "adam-4", "muon-16", "adafactor-64", "adam-256"}),
    ],
)
def test_pretraining_is_predicted_within_a_twentieth(folder: str, variants: set[str]) -> None:
    rows = list(compare(LAB / folder, variants))
    assert {row.name.split()[0] for row in rows} == variants
    for row in rows:
        assert max(map(abs, row.errors)) < GOAL, row


@pytest.mark.long
@pytest.mark.parametrize("folder", ["xeon-2-cores-cpu", "h100-small"])
def test_the_table_of_the_lab_is_what_is_predicted(folder: str) -> None:
    errors = [abs(error) for row in compare(LAB / folder, set()) for error in row.errors]
    within = sum(error <= 0.04 for error in errors)
    cells = [len(errors), f"{100 * statistics.median(errors):.1f} %", f"{100 * max(errors):.1f} %", within]
    line = f"| `{folder}` | {' | '.join(map(str, cells))} |"
    assert line in (LAB.parent / "README.md").read_text(encoding="utf-8").splitlines()


def test_a_skeleton_of_a_fresh_model_trains_what_the_model_does() -> None:
    recipe = resolved(model="scratch:1m")
    tokenizer = tiny_tokenizer()
    real = prepare_model(recipe, tokenizer)
    found = skeleton(recipe, real.config)
    expected = {name: (parameter.shape, parameter.requires_grad) for name, parameter in real.named_parameters()}
    assert {
        name: (parameter.shape, parameter.requires_grad) for name, parameter in found.named_parameters()
    } == expected
    assert {trained for shape, trained in expected.values() if len(shape) == 1} == {False}


def test_a_graph_takes_padded_batches_without_a_mask_and_makes_all_logits() -> None:
    shape = StepShape(batch_size=2, tokens=304, labelled=20, padded=True)
    assert shape_in_graph(shape, whole=False) == StepShape(batch_size=2, tokens=320, labelled=638, padded=False)
    assert shape_in_graph(shape, whole=True) == StepShape(batch_size=2, tokens=304, labelled=606, padded=False)


def test_graphs_add_a_workspace_a_batch_and_their_pool() -> None:
    plain, graphed = (
        predict_recipe(
            resolved(f"optimizer.cuda_graphs={graphs}", "optimizer.gradient_release=true"),
            longest=512,
            padded=False,
            labelled=511,
            device="cuda",
            config=load_config("scratch:0.4m"),
        )
        for graphs in ("false", "true")
    )
    more = graphed.peak_bytes - plain.peak_bytes
    workspaces = plain.parts["workspace"] // 2  # almost only those of two threads
    assert more == pytest.approx(workspaces + 16 * 512, rel=0.02)
    assert graphed.parts["runtime"] - plain.parts["runtime"] == plain.parts["activations"] + plain.parts["logits"]


@pytest.mark.parametrize(
    ("width", "dtype", "mebibytes"),
    [(96, "float32", 11), (96, "bfloat16", 18), (576, "float32", 31), (576, "bfloat16", 31)],
)
def test_only_narrow_models_take_less_on_first_use(width: int, dtype: str, mebibytes: int) -> None:
    config = load_config("scratch:0.4m")
    config.hidden_size = width
    assert predict._first_use_bytes(resolved(f"dtype={dtype}"), config) == mebibytes << 20
