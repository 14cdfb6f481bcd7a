"""`sbft batch-size`: which size is recommended, how it is measured, which settings are advised, and running out of memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from typer.testing import CliRunner

from sbft.cli.batch_size import batch_size
from sbft.errors import TrainingError
from sbft.planning.batch_size.curve import Curve, Timed, expected_peak_bytes, search
from sbft.planning.batch_size.flops import training_flops
from sbft.planning.batch_size.peak_flops import peak_flops
from sbft.planning.batch_size.scaled_recipe import batch_settings, scaled_rate
from sbft.planning.batch_size.search import find_batch_size
from sbft.planning.batch_size.step_timing import StepTimer, longest_examples
from sbft.planning.memory.usable import usable_bytes
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.runs.build import prepare_model
from tests.tiny import tiny_model

GIB = 2**30
ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(12)]


def timed(size: int, tokens_per_s: float = 1.0, peak: int = 0, baseline: int = 0, fixed: int = 0) -> Timed:
    return Timed(
        batch_size=size, tokens_per_step=100.0 * size, step_s=100.0 * size / tokens_per_s, steps=5, peak_bytes=peak,
        baseline_bytes=baseline, fixed_bytes=fixed,
    )  # fmt: skip


def machine(
    speeds: list[float], *, memory_from: int | None = None, peaks: Callable[[int], int] = lambda size: 0
) -> Any:
    """A function that runs a size on a machine with these speeds at 1, 2, 4, ...; the last holds for all larger sizes."""

    def run(size: int) -> Timed | None:
        run.sizes.append(size)  # type: ignore[attr-defined]
        if memory_from is not None and size >= memory_from:
            return None
        return timed(size, speeds[min(int(math.log2(size)), len(speeds) - 1)], peaks(size))

    run.sizes = []  # type: ignore[attr-defined]
    return run


# Which size is chosen


def test_the_smallest_size_at_95_percent_of_the_best_is_chosen() -> None:
    run = machine([100, 190, 330, 460, 490, 500])
    curve = search(run, share=0.95)
    # 8 reaches 92 % of the best, 16 reaches 98 %; from 16 on, two doublings gain less than 1 / 0.95.
    assert curve.smallest_at(0.95).batch_size == 16 and curve.best().batch_size == 32
    assert curve.smallest_at(0.9).batch_size == 8 and curve.smallest_at(1.0).batch_size == 32
    assert run.sizes == [1, 2, 4, 8, 16, 32, 64] and curve.ending.reason == "no gain"


def test_one_slow_size_ends_nothing_and_a_peak_in_the_middle_is_found() -> None:
    curve = search(machine([100, 80, 150, 140, 300, 200, 150]), share=0.95)
    assert curve.smallest_at(0.95).batch_size == 16
    assert [one.batch_size for one in curve.timed] == [1, 2, 4, 8, 16, 32, 64]


def test_a_slow_rise_is_followed_as_long_as_two_doublings_bring_more_than_the_tolerance() -> None:
    # 4 % each: one doubling is within the tolerance, two are not.
    curve = search(machine([100 * 1.04**n for n in range(8)]), share=0.95, largest=128)
    assert curve.ending.reason == "largest" and len(curve.timed) == 8


@given(
    speeds=st.lists(st.floats(0.1, 1e6), min_size=1, max_size=9),
    share=st.floats(0.01, 1.0),
    memory_from=st.none() | st.sampled_from([2, 4, 8, 16]),
    limit=st.none() | st.integers(60, 400),
    largest=st.none() | st.integers(1, 100),
)
def test_no_size_is_chosen_that_did_not_run(
    speeds: list[float], share: float, memory_from: int | None, limit: int | None, largest: int | None
) -> None:
    run = machine(speeds, memory_from=memory_from, peaks=lambda size: 50 + 5 * size)
    curve = search(run, share=share, largest=largest, limit_bytes=limit)
    chosen = curve.smallest_at(share)
    finished = [size for size in run.sizes if memory_from is None or size < memory_from]
    assert chosen.batch_size in finished
    assert limit is None or chosen.peak_bytes <= limit
    assert largest is None or chosen.batch_size <= largest
    assert chosen.tokens_per_s >= share * max(one.tokens_per_s for one in curve.timed)
    slower = [one for one in curve.timed if one.batch_size < chosen.batch_size]
    assert all(one.tokens_per_s < share * curve.best().tokens_per_s for one in slower)


# Memory


def test_a_size_that_will_not_fit_is_not_run() -> None:
    run = machine([2.0**n for n in range(9)], peaks=lambda size: GIB + size * GIB)
    curve = search(run, share=0.95, limit_bytes=10 * GIB)
    # 8 takes 9 GiB, 16 would take 17. (After size 1 alone, no part is known to be fixed: 2 is expected to take twice as much.)
    assert run.sizes == [1, 2, 4, 8]
    assert (curve.ending.reason, curve.ending.batch_size, curve.ending.needed_bytes) == ("would not fit", 16, 17 * GIB)


def test_the_second_size_is_foreseen_from_what_grows_with_the_batch() -> None:
    first = timed(1, peak=10 * GIB, baseline=2 * GIB, fixed=6 * GIB)
    assert expected_peak_bytes([first], 2) == 12 * GIB  # two more GiB of activations
    assert expected_peak_bytes([], 1) == 0


def test_a_size_that_found_memory_already_there_does_not_hide_the_rise() -> None:
    peaks = {1: 100, 2: 140, 4: 220, 8: 220}
    assert expected_peak_bytes([timed(size, peak=peak) for size, peak in peaks.items()], 16) > 220 + 8 * 120 / 7 - 1


def test_a_size_above_the_limit_is_not_used_even_though_it_ran() -> None:
    # Size 4 is predicted to take 5 GiB, but takes 20.
    peaks = {1: 2 * GIB, 2: 3 * GIB, 4: 20 * GIB}
    curve = search(machine([1, 2, 4], peaks=peaks.__getitem__), share=0.95, limit_bytes=6 * GIB)
    assert [one.batch_size for one in curve.timed] == [1, 2]
    assert (curve.ending.reason, curve.ending.needed_bytes) == ("over the limit", 20 * GIB)


def test_what_is_free_here_is_more_than_this_process_and_less_than_the_machine() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    found = usable_bytes(torch.device("cpu"))
    assert found is not None and 0 < found < total
    assert usable_bytes(torch.device("cuda")) is None


# Operations


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3", "gpt2"])
def test_operations_of_training_are_those_that_torch_counts(kind: str) -> None:
    model = tiny_model(kind, dtype=torch.float32, attn_implementation="eager")
    ids = torch.arange(3, 51)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    # For the loss on all tokens, torch also computes the logits of the last one.
    counted = training_flops(model, tokens=48, labels=48)
    assert counted is not None and counted == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_frozen_weights_take_two_thirds_and_attention_stays() -> None:
    model = tiny_model("llama", tied=False)
    layer = model.get_submodule("model.layers.0.mlp.up_proj").get_parameter("weight")
    whole = training_flops(model, 10, 4)
    head = model.get_output_embeddings().weight.numel()
    assert whole is not None and training_flops(model, 10, 5) == whole + 6 * head
    layer.requires_grad_(False)
    assert training_flops(model, 10, 4) == whole - 2 * 10 * layer.numel()


def test_the_base_of_an_adapter_counts_as_frozen() -> None:
    recipe = given_recipe("method=lora", "lora.rank=4", model="random:tiny")
    adapted, plain = prepare_model(recipe), prepare_model(given_recipe(model="random:tiny"))
    adapters = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    head = plain.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in plain.parameters() if p.dim() == 2) - head  # tied: the embedding is the head
    attention = 12 * 2 * 160 * 10
    expected = 10 * (4 * body + 6 * adapters + attention) + 4 * 3 * head
    assert training_flops(adapted, 10, 3) == expected


@pytest.mark.parametrize(
    ("device", "dtype", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312),
        ("NVIDIA A100-PCIE-40GB", "float32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("Tesla T4", "bfloat16", None),
        ("Tesla T4", "float32", 8.1),
        # GPUs to which the figure does not apply.
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("NVIDIA GeForce RTX 3090 Ti", "bfloat16", None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", "bfloat16", None),
        ("NVIDIA H100 80GB HBM3 x 8", "bfloat16", None),
        ("Intel Xeon Processor, 2 cores", "bfloat16", None),
    ],
)
def test_peaks_of_known_devices(device: str, dtype: str, tera: float | None) -> None:
    assert peak_flops(device, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def test_tf32_has_half_the_peak_of_bfloat16() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "float32", tf32=True) == pytest.approx(156e12)
    assert peak_flops("Tesla T4", "float32", tf32=True) == pytest.approx(8.1e12)


# Advice


def given_recipe(*overrides: str, model: str = "m", data: str = "d") -> Recipe:
    return resolve(load_recipe(None, list(overrides), model=model, data=data))


def test_the_learning_rate_grows_threefold_from_1_to_512_and_is_called_a_first_guess() -> None:
    assert scaled_rate(6.7e-5, 1, 512) == pytest.approx(2.01e-4)
    assert scaled_rate(scaled_rate(1.0, 1, 8), 8, 1) == pytest.approx(1.0)
    settings = batch_settings(given_recipe("training.learning_rate=9e-4"), 8, 100.0)
    assert float(settings.overrides["training.learning_rate"]) == pytest.approx(9e-4 * 15 / 9)
    assert any("first guess: tune it" in note for note in settings.notes)


def test_the_half_life_stays_and_beta2_is_told() -> None:
    settings = batch_settings(given_recipe("optimizer.second_moment_half_life=1000"), 4, 125.0)
    assert not any("optimizer" in key for key in settings.overrides)
    # 4 examples of 125 tokens are half a half-life: a decay of the root of one half.
    assert any("1,000 tokens" in note and "0.7071" in note and "500 tokens" in note for note in settings.notes)


def test_a_beta2_per_step_is_rescaled_and_accumulation_turned_off() -> None:
    settings = batch_settings(given_recipe("method=adam-accum"), 4, 100.0)
    assert settings.overrides["training.gradient_accumulation_steps"] == "1"
    assert float(settings.overrides["optimizer.beta2"]) == pytest.approx(0.95**0.25, abs=1e-6)
    assert float(settings.overrides["training.learning_rate"]) < 1e-5  # 16 examples before, 4 now


def test_counts_of_steps_cover_the_same_data() -> None:
    recipe = given_recipe("training.max_steps=101", "training.warmup_steps=0.1")
    overrides = batch_settings(recipe, 4, 100.0).overrides
    assert overrides["training.max_steps"] == "26" and "training.warmup_steps" not in overrides


@pytest.mark.parametrize("method", ["sbft", "sgd", "adam-accum", "lora", "hf-adafactor"])
def test_the_overrides_are_a_recipe(method: str) -> None:
    recipe = given_recipe(f"method={method}", "training.warmup_steps=20")
    overrides = [f"{key}={value}" for key, value in batch_settings(recipe, 8, 100.0).overrides.items()]
    changed = given_recipe(f"method={method}", "training.warmup_steps=20", *overrides)
    assert changed.training["per_device_train_batch_size"] == 8


def test_the_recipes_own_size_changes_nothing() -> None:
    overrides = batch_settings(given_recipe("method=lora", "training.max_steps=9"), 1, 100.0).overrides
    assert overrides == {"training.per_device_train_batch_size": "1"}


# Steps that really run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def test_the_longest_examples_fill_one_width() -> None:
    lengths = [3, 20, 33, 40, 48, 47, 16]
    rows = Dataset.from_dict({"input_ids": [[0] * n for n in lengths], "labels": [[0] * n for n in lengths]})
    assert sorted(len(one) for one in longest_examples(rows)["input_ids"]) == [33, 40, 47, 48]


def timer(model: PreTrainedModel, recipe: Recipe) -> StepTimer:
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (17, 20)]
    return StepTimer(recipe, model, Dataset.from_list(rows), pad_token_id=2, seconds=0.0)


@pytest.mark.parametrize("method", ["sbft", "adam-accum", "lora"])
def test_steps_are_timed_with_state_in_place_and_leave_the_model_as_it_was(method: str) -> None:
    recipe = given_recipe(f"method={method}", "training.warmup_steps=20", model="random:tiny")
    model = prepare_model(recipe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    four = timer(model, recipe)(4)
    assert four is not None
    assert four.batch_size == 4 and 4 * 17 <= four.tokens_per_step <= 4 * 20
    assert four.steps == 3 and four.step_s > 0 and four.peak_bytes >= four.baseline_bytes > 0
    one_example = training_flops(model, 18.5, 17.5)
    assert one_example is not None and four.flops_per_step == pytest.approx(4 * one_example)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = sum(p.numel() for p in trained)
    # Adam's two moments and the gradients, in float32; sbft has a small factored state, and no gradients.
    assert four.fixed_bytes >= 12 * weights if method != "sbft" else 0 < four.fixed_bytes < weights
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in trained)


def test_running_out_of_memory_is_survived() -> None:
    recipe = given_recipe(model="random:tiny")
    model = prepare_model(recipe)
    layer = model.get_submodule("model.layers.1")

    def out_of_memory(module: Any, gradients: Any, outputs: Any) -> None:
        if outputs[0].shape[0] >= 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    layer.register_full_backward_hook(out_of_memory)
    steps = timer(model, recipe)
    assert steps(4) is None
    assert all(p.grad is None and not p._post_accumulate_grad_hooks for p in model.parameters())
    curve = search(steps, share=0.95)
    assert (curve.ending.reason, curve.ending.batch_size) == ("out of memory", 4)
    assert [one.batch_size for one in curve.timed] == [1, 2]


def test_a_loss_that_is_not_finite_is_no_timing() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").fill_(float("nan"))
    with pytest.raises(TrainingError, match="not finite"):
        timer(model, given_recipe())(1)


def test_a_limit_below_size_1_is_an_error(data: Path) -> None:
    with pytest.raises(TrainingError, match="Batch size 1 takes .* --memory-limit"):
        find_batch_size(given_recipe(model="random:tiny", data=str(data)), limit_bytes=1, seconds=0)


# The command


def command(*arguments: str) -> tuple[int, str, str]:
    app = typer.Typer()
    app.command()(batch_size)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


def test_the_command_prints_the_curve_the_answer_and_what_to_type(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--model", "random:tiny", "--data", str(data), "--set", "training.learning_rate=1e-3"]
    code, out, err = command(*given, "--max-batch-size", "2", "--seconds", "0")
    assert code == 0, err
    _, header, first, second, *_ = out[out.index("\n\n") :].split("\n", 1)[1].splitlines()
    assert header.split("  ")[:2] == ["batch size", "tokens/step"] and "MFU" not in header
    assert (first.split()[0], second.split()[0]) == ("1", "2")
    kept = json.loads(Path("runs/batch-size-rows/batch-size.json").read_text())
    assert kept["batch_size"] in (1, 2) and f"Batch size {kept['batch_size']} is the " in out
    typed = next(line for line in out.splitlines() if line.startswith("sbft train --model random:tiny"))
    assert f"--set training.per_device_train_batch_size={kept['batch_size']}" in typed
    assert typed.count("training.learning_rate") == 1 and "--max-batch-size" in out
    assert Path("runs/batch-size-rows/batch-size.png").stat().st_size > 10_000
    assert sorted(path.name for path in Path("runs").iterdir()) == ["batch-size-rows"]  # not the recipe's own folder


def test_json_is_all_that_is_printed(data: Path, tmp_path: Path) -> None:
    given = ["--model", "random:tiny", "--data", str(data), "--output-dir", str(tmp_path)]
    code, out, err = command(*given, "--max-batch-size", "1", "--seconds", "0", "--json")
    assert code == 0 and "Batch size 1: " in err
    result = json.loads(out)
    assert result["batch_size"] == 1 and result["ending"]["reason"] == "largest"
    (one,) = result["timed"]
    assert one["tokens_per_s"] == pytest.approx(one["tokens_per_step"] / one["step_s"])
    assert result["command"].startswith("sbft train --model random:tiny --data")


def test_the_table_says_what_did_not_run_and_fits_80_columns() -> None:
    import io
    from dataclasses import replace

    from rich.console import Console

    from sbft.cli.batch_size_report import print_batch_sizes
    from sbft.planning.batch_size.curve import Ending
    from sbft.planning.batch_size.scaled_recipe import BatchSettings
    from sbft.planning.batch_size.search import BatchSizes

    sizes = [
        replace(timed(2**n, 20_000 * (1 + n), peak=(20 + 2**n) * GIB), flops_per_step=2.0**n * 1.25e12)
        for n in range(3)
    ]
    found = BatchSizes(
        recipe=given_recipe(), device="NVIDIA H100 PCIe", share=0.95, limit_bytes=26 * GIB, peak_flops=756.5e12,
        curve=Curve(sizes, Ending("would not fit", 8, 28 * GIB)), settings=BatchSettings({}),
    )  # fmt: skip
    out = io.StringIO()
    print_batch_sizes(Console(file=out, width=80), found, "sbft train")
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in out.getvalue()
    last = next(line for line in lines if line.strip().startswith("8 "))
    assert "not run" in last and "~28.00" in last
    # 100 tokens in 5 ms, 1.25e12 operations: 2.5e14 per second of 7.565e14.
    assert "250.0  33.0 %" in out.getvalue()
    told = " ".join(out.getvalue().split())
    assert "Batch size 4 is the fastest that ran" in told and "26.00 GiB is the limit. A larger one may" in told
