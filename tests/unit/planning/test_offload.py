"""The cost of streaming layers: bytes against the model's own, counts against enumeration, times against hand arithmetic."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.models.load import load_config
from sbft.planning.memory.fit import make_plan
from sbft.planning.memory.offload import (
    USUAL_SPEEDS,
    Layer,
    Speeds,
    decoder_layers,
    fewest_layers,
    streaming,
    without_inputs,
)
from sbft.planning.memory.predict import predict_recipe
from sbft.planning.memory.skeleton import skeleton
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.recipe.offload import Offload


def recipe_with(*settings: str, method: str = "sbft", model: str = "random:smollm2-135m") -> Recipe:
    return resolve(load_recipe(None, list(settings), model=model, data="my.jsonl", method=method))


@pytest.mark.parametrize(("method", "trained"), [("sbft", True), ("sbft-int4", True), ("lora", False)])
def test_layers_are_as_large_as_the_models(method: str, trained: bool) -> None:
    recipe = recipe_with(method=method)
    config = load_config(recipe.model)
    layers = decoder_layers(recipe, config, 3, 1)
    assert len(layers) == config.num_hidden_layers and layers == decoder_layers(recipe, config, len(layers), 1)
    expected = 0
    for name, weight in skeleton(recipe, config).named_parameters():
        if ".layers.7." in name and "lora" not in name:
            stored = getattr(weight, "quantized", None)
            tensors = [weight] if stored is None else stored.tensors.values()
            expected += sum(-(-tensor.numel() * tensor.itemsize // 256) * 256 for tensor in tensors)
    assert layers[7].size_bytes == expected
    assert layers[7].trained_bytes == (expected if trained else 0)


def test_costs_of_streaming_are_those_counted_by_hand() -> None:
    layers = [Layer(100, 80, 50)] * 8
    made = streaming(layers, Offload(4), inputs_bytes=7)
    assert (made.layers, made.saved_bytes, made.host_bytes) == (4, 400 - 3 * 100, 400 + 8 * 7)
    assert (made.moved_in_bytes, made.moved_out_bytes) == (2 * 400 + 6 * 7, 4 * 80 + 6 * 7)
    read_only = streaming([Layer(100, 0, 50)] * 8, Offload())
    assert read_only.saved_bytes == 800 - 2 * 100 and read_only.moved_out_bytes == 0
    speeds = Speeds(link_bytes_per_s=10.0, flops=1000.0)
    # Forward: 80 s of transfers, 0.8 s of products per token.
    assert read_only.hidden_from_tokens(speeds) == 100
    assert read_only.step_s(50, speeds, checkpointing=False) == pytest.approx(80 + 80)
    assert read_only.step_s(200, speeds, checkpointing=True) == pytest.approx(160 + 480)


@pytest.mark.parametrize("most", range(0, 1100, 90))
def test_as_few_layers_are_streamed_as_let_it_fit(most: int) -> None:
    layers = [Layer(100, 100, 1)] * 8
    enough = [n for n in range(1, 9) if 1000 - streaming(layers, Offload(n)).saved_bytes <= most]
    expected = 0 if most >= 1000 else min(enough, default=8)
    assert fewest_layers(layers, 1000, most) == expected


def test_inputs_in_the_hosts_memory_leave_two_on_the_device() -> None:
    phases = {
        (name, layer): Counter({"activations": 1000, "weights": 5})
        for name, layer in [("forward", None), ("backward", 0), ("backward", 3), ("backward", -1)]
    }
    held = {phase: counted["activations"] for phase, counted in without_inputs(phases, 8, 100).items()}
    assert held == {("forward", None): 400, ("backward", 0): 1000, ("backward", 3): 800, ("backward", -1): 400}


def test_a_prediction_has_what_is_not_streamed() -> None:
    resident = predict_recipe(recipe_with(), longest=128, device="cuda")
    streamed = predict_recipe(recipe_with("offload=layers"), longest=128, device="cuda")
    assert resident.streaming is None and streamed.streaming is not None
    assert resident.needed_bytes - streamed.needed_bytes == streamed.streaming.saved_bytes > 0
    assert streamed.parts | {"weights": 0} == resident.parts | {"weights": 0}


def test_auto_streams_what_does_not_fit() -> None:
    recipe = recipe_with("offload.layers=auto")
    plenty = predict_recipe(recipe, longest=128, device="cuda", memory_bytes=24 << 30)
    assert plenty.streaming is None
    tight = predict_recipe(recipe, longest=128, device="cuda", memory_bytes=plenty.needed_bytes - (20 << 20))
    assert tight.streaming is not None and 0 < tight.streaming.layers < 30
    assert tight.needed_bytes <= plenty.needed_bytes - (20 << 20)


def test_inputs_leave_the_device_only_where_asked_for() -> None:
    settings = ["offload.layers=30", "training.gradient_checkpointing=true", "data.max_length=2048"]
    kept = predict_recipe(recipe_with(*settings), longest=2048, device="cuda")
    moved = predict_recipe(recipe_with(*settings, "offload.activations=true"), longest=2048, device="cuda")
    assert kept.streaming is not None and moved.streaming is not None
    assert moved.streaming.host_bytes - kept.streaming.host_bytes == 30 * 2048 * 576 * 2
    assert moved.needed_bytes < kept.needed_bytes


def test_a_host_that_is_too_small_is_named_first() -> None:
    for host_bytes, verdict in [(64 << 30, "yes"), (6 << 30, "host")]:
        plan = make_plan(
            "random:llama3.2-3b", sequence_length=128, memory_bytes=6 << 30, device="cuda", host_bytes=host_bytes,
            methods=["sbft", "adam"],
        )  # fmt: skip
        rows = {(row.method, row.checkpointing, row.offload): row for row in plan.rows}
        assert ("adam", True, True) not in rows
        row = rows["sbft", True, True]
        assert (row.verdict, row.fits) == (verdict, verdict == "yes") and "--offload" in row.command
    flags = ["--gpu-memory", "6GiB", "--host-memory", "6GiB", "--methods", "sbft", "--sequence-length", "128"]
    shown = CliRunner().invoke(app, ["plan", "--model", "random:llama3.2-3b", *flags])
    assert shown.stdout.startswith("The host's memory is the limit: with --offload, sbft requires")
    shown = CliRunner().invoke(app, ["plan", "--model", "random:llama3.2-3b", *flags, "--json", "--link", "10GB"])
    plan_json = json.loads(shown.stdout)
    assert plan_json["link_bytes_per_s"] == 1e10
    assert [row["fits"] for row in plan_json["rows"]] == [False, False, False]
    assert plan_json["rows"][2]["offload"]["step_s"] > 0


def test_llama_8b_is_planned_within_the_targets() -> None:
    settings = ("offload=layers", "training.gradient_checkpointing=true")
    for method, most in [("sbft", 5.5), ("sbft-int8", 4.0)]:
        recipe = recipe_with(*settings, method=method, model="random:llama3.1-8b")
        assert predict_recipe(recipe, longest=1024, device="cuda").needed_bytes <= most * 2**30


@pytest.mark.long
def test_the_pages_table_is_what_is_planned() -> None:
    page = (Path(__file__).parents[3] / "docs" / "offload.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(random:[^`]+)`, `([^`]+)` \| (.+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 7
    for model, method, cells in rows:
        recipe = recipe_with("offload=layers", "training.gradient_checkpointing=true", method=method, model=model)
        prediction = predict_recipe(recipe, longest=1024, device="cuda")
        made = prediction.streaming
        assert made is not None
        sizes = (prediction.needed_bytes, made.host_bytes, made.moved_in_bytes, made.moved_out_bytes)
        shown = [f"{size / 2**30:{'.2f' if size < 10 * 2**30 else '.1f'}}" for size in sizes]
        assert cells.split(" | ") == [*shown, f"{made.hidden_from_tokens(USUAL_SPEEDS):,}"], (model, method)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_speeds_are_measured() -> None:
    from sbft.planning.memory.offload import measured_speeds

    speeds = measured_speeds()
    assert speeds.link_bytes_per_s > 1e9 and speeds.flops > 1e12
