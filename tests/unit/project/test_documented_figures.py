"""Every figure in the README and the documentation matches the committed record it was taken from."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sbft.bench.report.comparison import Comparison, Row, compare
from sbft.bench.report.statistics import Estimate, pooled
from sbft.bench.suite_runs import stored_suite

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"
CPU, GPU, EPYC = RESULTS / "xeon-2-cores", RESULTS / "h100", RESULTS / "epyc-2-cores"
MIB, GIB = 1 << 20, 1 << 30


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def share(estimate: Any, signed: bool = False) -> str:
    """A share and its standard error in percentage points, with a typographic minus."""
    sign = "+" if signed else ""
    return f"{100 * estimate.mean:{sign}.1f} ± {100 * estimate.standard_error:.1f}".replace("-", "−")


def compared(name: str) -> Comparison:
    return compare(stored_suite(CPU / name), CPU / name)


def paper_rows() -> list[Row]:
    return compared("paper-table").rows


def paper_table() -> Iterator[str]:
    comparison = compared("paper-table")
    by_task = {(one.task, one.variant): one for one in comparison.rows}
    for variant in ("lora", "sbft", "adam", "adam-accum", "sgd", "hf-adafactor"):
        cells = [f"`{variant}`"]
        for task in ("needle", "family"):
            one = by_task[task, variant]
            difference = comparison.difference(one)
            cells += [share(one.score), "" if difference is None else share(difference, signed=True)]
        records = by_task["needle", variant].records
        peak = statistics.fmean(record.peak_memory_bytes for record in records) / GIB
        above = statistics.fmean(record.memory["above_baseline"] for record in records) / MIB
        cells += [f"{peak:.2f}", f"{above:.0f}"]
        yield row(*cells, f"{records[0].trainable_parameters / 1e6:.1f}")


def ablations() -> Iterator[str]:
    for one in compared("ablations").rows:
        above = statistics.fmean(record.memory["above_baseline"] for record in one.records) / MIB
        yield row(f"`{one.variant}`", f"{one.choice.rate:g}", share(one.score), f"{above:.0f}")


def german() -> Iterator[str]:
    lines = (EPYC / "languages" / "runs.jsonl").read_text().splitlines()
    runs = {run["run"]: run["record"] for run in map(json.loads, lines)}
    for name in sorted({name.rpartition("/")[0] for name in runs}, reverse=True):
        validation, test = runs[f"{name}/validation-seed=0"], runs.get(f"{name}/test-seed=0")
        cells = [f"`{name.split('/')[1]}`", f"{validation['learning_rate']:g}", f"{validation['metrics']['bits_per_byte']:.3f}"]
        if test is None:
            yield row(*cells, "-", "-", f"{validation['peak_memory_bytes'] / GIB:.2f}")
            continue
        english = test["watched"]["english"]
        change = english["metrics"]["bits_per_byte"] - english["metrics_before"]["bits_per_byte"]
        figures = [f"{test['metrics']['bits_per_byte']:.3f}", f"{change:+.3f}"]
        yield row(*cells, *figures, f"{test['peak_memory_bytes'] / GIB:.2f}")


def optimizer_steps(path: Path, names: dict[str, str]) -> Iterator[str]:
    measured = {one["optimizer"]: one for one in read(path)}
    for name, shown in names.items():
        one = measured[name]
        temporary = one["temporary_bytes"] / MIB
        yield row(shown, f"{one['median_ms']:.0f}", f"{one['ratio']:.2f}", f"{temporary:.0f}")


CPU_OPTIMIZERS = {
    "sbft Adafactor, SR": "sbft Adafactor, stochastic rounding",
    "sbft SGD, SR": "sbft SGD, stochastic rounding",
    "torch SGD": "torch SGD",
    "torch AdamW, fused": "torch AdamW, fused",
    "sbft AdamW, SR": "sbft AdamW, stochastic rounding",
    "torch-optimi Adam": "torch-optimi Adam",
    "torch Adafactor": "torch Adafactor",
    "transformers Adafactor": "transformers Adafactor",
    "bitsandbytes AdamW8bit": "bitsandbytes AdamW8bit",
}
GPU_OPTIMIZERS = {
    "sbft Adafactor, SR": "sbft Adafactor, stochastic rounding",
    "sbft SGD, SR": "sbft SGD, stochastic rounding",
    "torch SGD": "torch SGD",
    "torch AdamW, fused": "torch AdamW, fused",
    "bitsandbytes AdamW8bit": "bitsandbytes AdamW8bit",
    "transformers Adafactor": "transformers Adafactor",
}
SMALLER_MODEL_OPTIMIZERS = {
    name: CPU_OPTIMIZERS[name]
    for name in (
        "sbft Adafactor, SR", "sbft SGD, SR", "torch SGD", "torch AdamW, fused", "sbft AdamW, SR", "transformers Adafactor",
    )
}  # fmt: skip


def training_steps(path: Path, tokens: int) -> Iterator[str]:
    measured = {one["method"]: one for one in read(path) if one["tokens"] == tokens}
    lora = measured["lora"]
    for method, one in measured.items():
        above = one["above_model_bytes"] / MIB
        yield row(
            f"`{method}`",
            str(tokens),
            f"{one['step_ms']:.0f}",
            f"{above:.0f}",
            f"{one['step_ms'] / lora['step_ms']:.2f}",
            f"{one['above_model_bytes'] / lora['above_model_bytes']:.2f}",
        )


def plans() -> Iterator[str]:
    shown = {"random:llama-8b": "Llama-3.1-8B", "random:qwen3-4b": "Qwen3-4B", "random:gemma3-4b": "Gemma-3-4B"}
    columns = [("sbft", False), ("sbft", True), ("lora", False), ("lora", True), ("qlora", True), ("adam8bit", True)]
    runs = [run for run in read(GPU / "memory_prediction.json") if run["tokens"] == 1024]
    measured = {(f"random:{run['shape']}", run["method"], run["checkpointing"]) for run in runs}
    for one in read(RESULTS / "predicted_memory_1024_tokens.json"):
        resident = [part for part in one["rows"] if not part["offload"]]
        needed = {(part["method"], part["checkpointing"]): part["needed_bytes"] / GIB for part in resident}
        marks = {key: "*" * ((one["model"], *key) in measured) for key in needed}
        yield row(shown[one["model"]], *(f"{needed[key]:.1f}{marks[key]}" for key in [*columns, ("adam", False)]))


def exports() -> Iterator[str]:
    for one in read(CPU / "export_as_lora.json")["exports"]:
        size = one["adapter_bytes"] / MIB
        yield row(
            str(one["rank"]),
            f"{size:.1f}" if size < 10 else f"{size:.0f}",
            f"{100 * one['adapter_bytes'] / one['model_bytes']:.0f} %",
            f"{100 * one['share_kept']:.0f} %",
            f"{100 * one['metrics']['exact_match']:.0f} %",
        )


def shown(point: dict[str, Any]) -> float:
    """The loss at a point of a figure: from its seeds, or from the search if no seed is done."""
    return point["loss"]["mean"] if point["loss"] else point["validation"][str(point["rate"])]


def errors(path: Path) -> list[float]:
    return [abs(one["error"]) for one in read(path)]


TABLES = {
    "the paper's table": (["README.md", "docs/results.md"], paper_table),
    "ablations": (["docs/results.md"], ablations),
    "a new language": (["docs/results.md"], german),
    "optimizer step on a CPU": (
        ["docs/results.md"],
        lambda: optimizer_steps(CPU / "optimizer_step_smollm2-135m.json", CPU_OPTIMIZERS),
    ),
    "optimizer step on a GPU": (
        ["docs/results.md"],
        lambda: optimizer_steps(GPU / "optimizer_step_llama-8b.json", GPU_OPTIMIZERS),
    ),
    "optimizer step on a GPU, 1B": (
        ["docs/results.md"],
        lambda: optimizer_steps(GPU / "optimizer_step_llama-1b.json", SMALLER_MODEL_OPTIMIZERS),
    ),
    "training step, 64 tokens": (["docs/results.md"], lambda: training_steps(CPU / "training_step_64_tokens.json", 64)),
    "training step, 512 tokens": (
        ["docs/results.md"],
        lambda: training_steps(CPU / "training_step_smollm2-135m.json", 512),
    ),
    "training step, 8B": (["docs/results.md"], lambda: training_steps(GPU / "training_step_llama-8b.json", 512)),
    "training step, 1B": (["docs/results.md"], lambda: training_steps(GPU / "training_step_llama-1b.json", 512)),
    "plans": (["docs/memory.md"], plans),
    "exports": (["docs/shipping.md"], exports),
}


def test_the_sentence_on_the_untrained_model_is_that_of_its_record():
    untrained = read(EPYC / "languages" / "untrained_german.json")["bits_per_byte"]
    assert f"The untrained model needs {untrained:.3f} on the test pages." in page("docs/results.md")


@pytest.mark.parametrize("name", TABLES)
def test_the_rows_of_a_table_are_those_of_its_record(name):
    pages, rows = TABLES[name]
    lines = list(rows())
    assert len(lines) >= 2
    for one in pages:
        missing = [line for line in lines if line not in page(one).splitlines()]
        assert not missing, f"{one} lacks:\n" + "\n".join(missing)


def test_the_sentences_on_predicted_memory_are_those_of_the_records():
    cpu, gpu = errors(CPU / "memory_prediction.json"), errors(GPU / "memory_prediction.json")
    text = " ".join(page("docs/results.md").split())
    assert f"{len(cpu)} runs on a CPU" in text and f"largest {100 * max(cpu):.1f} %" in text
    assert f"median error {100 * statistics.median(cpu):.1f} %" in text
    assert f"{len(gpu)} runs on an H100" in text and f"largest {100 * max(gpu):.1f} %" in text
    assert f"came within {math.ceil(100 * max(gpu))} % of their prediction" in " ".join(page("docs/memory.md").split())


def test_the_sentences_on_graphs_are_those_of_the_record():
    step = {(one["method"], one["graphs"]): one["step_ms"] for one in read(GPU / "graphed_steps_30m.json")}
    text = " ".join(page("docs/pretraining.md").split())
    assert f"took {step['sbft', True]:.1f} ms instead of {step['sbft', False]:.0f} with `sbft`" in text
    assert f"and {step['adam', True]:.1f} instead of {step['adam', False]:.0f} with `adam`" in text


def test_the_shipped_sizes_are_those_of_the_records():
    by_variant = {one.variant: one for one in paper_rows() if one.task == "needle"}
    adapter, model = (by_variant[name].records[0].saved_bytes / MIB for name in ("lora", "sbft"))
    assert f"LoRA's adapter is {adapter:.0f} MiB, the full model {model:.0f} in our benchmark" in page("docs/methods.md")
    assert f"in one file of {adapter:.0f} MiB" in page("docs/shipping.md")


def test_how_much_a_compiler_is_worth_is_what_was_measured():
    step = {one["optimizer"]: one for one in read(CPU / "optimizer_step_smollm2-135m.json")}
    ratio = step["sbft Adafactor, SR, reference"]["median_ms"] / step["sbft Adafactor, SR"]["median_ms"]
    assert f"about {round(ratio, -1):.0f} times as fast" in " ".join(page("docs/index.md").split())


def test_the_losses_of_pretraining_are_those_of_the_lab():
    text = page("docs/pretraining.md")
    lines = read(ROOT / "benchmarks" / "lab" / "results" / "h100-small" / "batch-size.json")
    loss = {(one["name"], one["batch"]): shown(one) for one in lines if one["rate"] is not None}
    assert "{:.2f}, {:.2f} and {:.2f}".format(*(loss["adam", batch] for batch in (1, 4, 16))) == "3.46, 3.44 and 3.43"
    assert "3.46, 3.44 and 3.43 nats; batch 64 ends at 3.68 and batch 256 at\n4.31" in text
    assert (f"{loss['adam', 64]:.2f}", f"{loss['adam', 256]:.2f}") == ("3.68", "4.31")
    assert f"SGD, without any state, is {loss['sgd', 64] - loss['adam', 64]:.1f} nats behind Adam at batch 64" in text
    assert f"and {loss['sgd', 1] - loss['adam', 1]:.2f} behind at batch 1" in text


LAB_CPU = ROOT / "benchmarks" / "lab" / "results" / "xeon-2-cores-cpu"


def difference(figure: str, worse: tuple[str, int], better: tuple[str, int], within: str = "") -> str:
    """The difference of two points of the lab; its error pools the points of that batch size with `within` in their names."""
    points = {
        (one["name"], one["batch"]): Estimate(one["loss"]["mean"], one["loss"]["standard_error"], one["loss"]["count"])
        for one in read(LAB_CPU / f"{figure}.json")
        if one["loss"]
    }
    found = pooled([value for (name, batch), value in points.items() if batch == worse[1] and within in name])
    assert found is not None
    value = found.difference(points[worse], points[better])
    return f"{value.mean:.3f} ± {value.standard_error:.3f} ({found.degrees_of_freedom})"


def test_the_differences_of_the_lab_are_those_of_its_points():
    text = " ".join(page("benchmarks/lab/README.md").split())
    assert f"the fixed value is {difference('half-life', ('adam-beta2-fixed', 1), ('adam', 1))} worse" in text
    assert f"At batch 4 it is {difference('half-life', ('adam-beta2-fixed', 4), ('adam', 4))} worse" in text
    assert f"Momentum gains {difference('momentum', ('sgd', 1), ('sgd-momentum', 1))} at batch 1" in text
    assert f"At 256 it is {difference('momentum', ('sgd-momentum', 256), ('sgd', 256))} worse" in text
    assert f"Adam is {difference('rounding', ('adam-nearest', 1), ('adam', 1))} behind" in text
    assert f"by {difference('batch-size', ('muon', 4), ('spectral', 4))} over Muon at batch 4" in text
    assert f"At batch 1 it is {difference('batch-size', ('muon', 1), ('spectral', 1))} ahead" in text
    rival, best = ("adam-doubling-beta2-of-1-to", 64), ("adam-doubling-to", 64)
    assert f"beats beta2 of batch 1 by {difference('schedule', rival, best, within='doubling')}" in text
    rival, best = best, ("adam-doubling-beta2-of-64-to", 64)
    assert f"beats the half-life by {difference('schedule', rival, best, within='doubling')}" in text


def test_what_older_and_busy_machines_cost_is_what_was_measured():
    text = " ".join(page("docs/methods.md").split())
    busy = {one["way"]: one["beside_over_alone"] for one in read(EPYC / "busy_machine.json")["rows"]}
    assert f"a step on two cores takes {busy['sbft']:.1f} times as long as alone" in text
    assert f"control of OpenMP's spinning threads it takes {busy['libgomp as it is']:.1f} times as long" in text
    steps = read(EPYC / "training_step_instructions.json")
    step = {one["method"]: one["step_ms"] for one in steps if one["instructions"].get("ONEDNN_MAX_CPU_ISA") == "AVX2"}
    ratio = step["sbft"] / step["sbft-float32"]
    assert f"bfloat16 is {ratio:.0f} times as slow as float32" in text
