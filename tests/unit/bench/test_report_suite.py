"""The report of a suite: finished, half done, failed, and with odd figures."""

from __future__ import annotations

import base64
import builtins
import csv
import itertools
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sbft.bench.report import charts, export_peft_json, scatter, write_report
from sbft.bench.report.comparison import Comparison, Row, compare
from sbft.bench.report.labels import overlap
from sbft.bench.report.notes import command
from sbft.bench.report.parts import parts_of, parts_of_row
from sbft.bench.report.scatter import draw_scatter
from sbft.bench.report.style import looks
from sbft.bench.report.tables import front, main_table
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run, run_folder, validation_runs
from sbft.cli.app import app
from sbft.errors import DataError
from sbft.runs.record import RunRecord
from tests.unit.bench.report_cases import CROWD, TASK, crowd, leave, record, search, store, suite
from tests.unit.bench.report_cases import test as leave_tests

PICTURES = ["accuracy-memory.png", "memory-parts.png", "learning-rates.png", "training-loss.png"]
SCORES = {("lora", 1e-3): 0.7, ("lora", 2e-3): 0.8, ("lora", 4e-3): 0.75} | {
    ("sbft", 1e-4): 0.6, ("sbft", 3e-4): 0.9, ("sbft", 1e-3): 0.85,
}  # fmt: skip


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished suite of many variants on two tasks, with its report."""
    folder = tmp_path_factory.mktemp("crowd")
    crowd(folder)
    write_report(folder)
    return folder


def scored(one: Suite, run: Run) -> RunRecord:
    return record(one, run, SCORES[run.variant, run.learning_rate])


def chosen(one: Suite, folder: Path) -> Suite:
    """A suite whose validation runs are done."""
    store(one, folder)
    search(one, folder, lambda run: scored(one, run))
    return one


def cells(folder: Path, variant: str, heading: str = "## needle") -> list[str]:
    """The row of a variant in the table under a heading of report.md."""
    lines = (folder / "report.md").read_text().partition(f"{heading}\n")[2].partition("\n## ")[0].splitlines()
    row = next(line for line in lines if re.match(rf"\| {re.escape(variant)}[ ⚠¹²³]*\|", line))
    return [cell.strip() for cell in row.strip("|").split("|")]


def row_of(one: Suite, folder: Path, variant: str) -> Row:
    return next(row for row in compare(one, folder).rows if row.variant == variant)


def test_a_finished_suite_has_everything(crowded):
    assert sorted(path.name for path in crowded.iterdir() if path.is_file()) == sorted(
        [*PICTURES, "report.html", "report.md", "runs.csv", "suite.yaml", "summary.csv"]
    )
    text = (crowded / "report.md").read_text()
    for name in PICTURES:
        assert f"]({name})" in text and (crowded / name).read_bytes().startswith(b"\x89PNG")
    assert cells(crowded, "lora")[1:4:2] == ["0.002", "baseline"]
    assert cells(crowded, "qlora")[2].startswith("no learning rate worked; unsupported: Method qlora needs the package")
    assert "**0.002: " in text and "9e-05: failed ¹" in text
    for said in ("Some CPU, 2 threads per run.", "torch 2.13.0", "0123abc", "seeds 0, 1, 2", "on 100 items (eval)"):
        assert said in text


def test_the_figures_are_means_over_seeds_with_the_paired_difference(tmp_path):
    one = chosen(suite(), tmp_path)
    figures = {"lora": [0.80, 0.84, 0.76], "sbft": [0.85, 0.86, 0.84]}
    losses = {"lora": [0.4, 0.5, 0.6], "sbft": [0.2, 0.2, 0.2]}
    leave_tests(
        one, tmp_path, lambda run: record(one, run, figures[run.variant][run.seed], losses[run.variant][run.seed])
    )
    write_report(tmp_path)
    # sbft: deviations 0, 1, -1: 1 / sqrt(3). Differences 5, 2, 8: 3 / sqrt(3).
    assert cells(tmp_path, "sbft")[1:5] == ["0.0003", "85.0 ± 0.6", "+5.0 ± 1.7", "0.200 ± 0.000"]
    assert cells(tmp_path, "lora")[1:5] == ["0.002", "80.0 ± 2.3", "baseline", "0.500 ± 0.058"]
    peak = record(one, validation_runs(one)[0]).peak_memory_bytes or 0
    assert cells(tmp_path, "lora")[5:] == [
        f"{peak / 2**30:.2f}", "199", "1.40", "457", "79", "140", "3 min", "4.9", "18.6",
    ]  # fmt: skip
    with (tmp_path / "summary.csv").open() as lines:
        summary = {line["variant"]: line for line in csv.DictReader(lines)}
    assert float(summary["sbft"]["score"]) == pytest.approx(0.85)
    assert float(summary["sbft"]["difference_standard_error"]) == pytest.approx(0.03 / math.sqrt(3))
    assert (summary["sbft"]["difference_count"], summary["sbft"]["difference_over"]) == ("3", "seeds")
    assert summary["sbft"]["on_pareto_front"] == "True"


def test_step_time_is_the_median_of_the_test_runs_and_the_rest_that_of_the_quickest(tmp_path):
    one = suite()
    store(one, tmp_path)

    def timed(run, step_s, exact_match=0.5, **changes):
        return record(one, run, exact_match, step_s={"median": step_s}, optimizer_s={"median": step_s / 10}, **changes)

    # Validation runs were quicker, also at the winning rate; they do not count.
    search(
        one,
        tmp_path,
        lambda run: timed(run, *((0.3, 0.9) if run.learning_rate == 3e-4 else (0.1, 0.5)), tokens_per_s=7.0),
    )
    leave_tests(
        one,
        tmp_path,
        lambda run: timed(run, 0.4 + run.seed, total_s=100.0 + 60 * run.seed, tokens_per_s=60.0 - run.seed),
    )
    write_report(tmp_path)
    # Steps of 0.4, 1.4 and 2.4 s.
    assert cells(tmp_path, "sbft")[8:12] == ["1400", "140", "60", "2 min"]


def test_with_one_seed_the_difference_is_paired_over_the_items(tmp_path):
    one = chosen(suite(seeds=[0]), tmp_path)
    right = {"lora": [True, True, False, False], "sbft": [True, True, True, False]}
    for row in compare(one, tmp_path).rows:
        made = record(one, row.tested[0].run, sum(right[row.variant]) / 4, data={"evaluation_examples": 4})
        leave(tmp_path, row.tested[0].run, made, right[row.variant])
    write_report(tmp_path)
    # Differences 0, 0, 1, 0: a sample standard deviation of 0.5, over 2. For a single share: sqrt(3/16 / 4).
    assert cells(tmp_path, "sbft")[2:4] == ["75.0 ± 21.7", "+25.0 ± 25.0 ¹"]
    assert "¹ One seed: paired over the evaluation items" in (tmp_path / "report.md").read_text()


def test_items_that_are_not_the_same_are_not_paired(tmp_path):
    one = chosen(suite(seeds=[0]), tmp_path)
    for row in compare(one, tmp_path).rows:
        leave(tmp_path, row.tested[0].run, record(one, row.tested[0].run, 0.75), [True, True, True, False])
    other = run_folder(tmp_path, row_of(one, tmp_path, "sbft").tested[0].run) / "predictions.jsonl"
    other.write_text(other.read_text().replace("q2", "another question"))
    write_report(tmp_path)
    assert cells(tmp_path, "sbft")[3] == "0.0 ¹"
    assert "¹ One seed, and no items to pair" in (tmp_path / "report.md").read_text()


def test_marks_of_the_learning_rate(tmp_path):
    methods = {
        "lora": {"learning_rates": [1e-3, 2e-3]},
        "sbft": {"learning_rates": [1e-4, 3e-4, 1e-3]},
        "sgd": {"learning_rates": [1e-2]},
        "nearest": {"method": "sbft", "learning_rates_from": "sbft"},
    }
    one = chosen(suite(methods=methods), tmp_path)
    leave_tests(one, tmp_path, lambda run: record(one, run))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert cells(tmp_path, "lora")[1] == "0.002 ⚠¹" and "¹ The best learning rate is the highest of its grid" in text
    assert cells(tmp_path, "sbft")[1] == "0.0003"
    assert cells(tmp_path, "sgd")[1] == "0.01 ⚠²" and "² Only one learning rate was tried" in text
    assert cells(tmp_path, "nearest")[1] == "0.0003 ³" and "³ The learning rate that was chosen for sbft" in text
    assert "not searched over grids of the same width" in text


def test_what_failed_or_is_still_to_be_made_has_a_row_that_says_so(tmp_path):
    rates = {"learning_rates": [1e-3]}
    methods = {"lora": rates, "sbft": rates, "adam": rates, "sgd": rates, "qlora": rates}
    one = store(suite(methods=methods), tmp_path)
    parsed = suite(methods=methods)
    assert one == tmp_path

    def result(run: Run) -> RunRecord | None:
        if run.variant == "adam":
            return record(parsed, run, status="oom", error="Out of memory | on the CPU.\nMore.", metrics={})
        if run.variant == "sgd" or (run.variant == "sbft" and run.seed == 2):
            return None
        if run.variant == "sbft" and run.seed == 1:
            return record(parsed, run, status="error", error="timed out after 60 s", metrics={}, memory={}, step_s={})
        if run.variant == "qlora":
            return record(parsed, run, status="unfinished")
        return record(parsed, run)

    leave_tests(parsed, tmp_path, result)
    report = write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert cells(tmp_path, "adam")[2].startswith("oom: Out of memory \\") and "More." not in text
    assert cells(tmp_path, "sgd")[2] == cells(tmp_path, "qlora")[2] == "not run yet"
    assert "sbft: 1 of 3 seeds; seed 1 failed: error: timed out after 60 s; seed 2 not run yet." in text
    assert "4 runs done; 4 failed; 7 still to be made." in report.text
    with (tmp_path / "runs.csv").open() as lines:
        runs = list(csv.DictReader(lines))
    assert len(runs) == 15
    assert sum(line["status"] == "not run" for line in runs) == 7
    assert {line["error"] for line in runs if line["variant"] == "adam"} == {"Out of memory | on the CPU.\nMore."}


@pytest.mark.parametrize("done", range(7))
def test_a_suite_can_be_reported_after_every_validation_run(done, tmp_path):
    one = store(suite(), tmp_path)
    assert one.exists()
    parsed = suite()
    for run in validation_runs(parsed)[:done]:
        leave(tmp_path, run, scored(parsed, run))
    report = write_report(tmp_path)
    assert ("learning-rates.png" in [path.name for path in report.files]) == (done > 0)
    if done < 6:
        assert cells(tmp_path, "sbft")[2].startswith("not run yet: ")
    else:
        assert cells(tmp_path, "sbft")[2] == "not run yet" and cells(tmp_path, "sbft")[1] == "0.0003"
    assert f"Made up. {done} run{'' if done == 1 else 's'} done" in report.text
    rows = [line for line in report.text.splitlines() if line.startswith("| ")]
    # The column of names has one width, however long a reason is.
    assert len({line.index("|", 1) for line in rows}) == 1


def test_a_picture_of_runs_that_are_gone_goes_too(tmp_path):
    one = chosen(suite(), tmp_path)
    leave_tests(one, tmp_path, lambda run: record(one, run))
    write_report(tmp_path)
    assert (tmp_path / "accuracy-memory.png").exists()
    import shutil

    shutil.rmtree(tmp_path / "runs")
    assert [path.suffix for path in write_report(tmp_path).files] == [".md", ".html", ".csv", ".csv"]
    assert not list(tmp_path.glob("*.png"))


def test_figures_that_are_no_numbers_do_not_stop_the_report(tmp_path):
    one = chosen(suite(), tmp_path)
    history = [{"step": 10.0, "tokens": 600.0, "loss": math.nan, "learning_rate": 1e-3}]
    history += [{"step": 20.0, "tokens": 1200.0, "loss": 1.0, "learning_rate": 1e-3}]
    leave_tests(
        one,
        tmp_path,
        lambda run: record(
            one, run, metrics={"exact_match": 0.5, "loss": math.nan}, history=history, total_s=None, saved_bytes=None
        ),
    )
    write_report(tmp_path)
    assert cells(tmp_path, "sbft")[4] == "" and cells(tmp_path, "sbft")[11] == ""


def test_where_there_is_no_metric_the_loss_decides_and_less_is_better(tmp_path):
    task = {"data": TASK["data"], "evaluation": {"metrics": []}}
    methods = {name: {"learning_rates": [1e-3]} for name in ("lora", "sbft", "adam")}
    one = suite(tasks={"needle": task}, methods=methods)
    store(one, tmp_path)
    losses = {"lora": 0.4, "sbft": 0.5, "adam": 0.3}
    leave_tests(one, tmp_path, lambda run: record(one, run, loss=losses[run.variant]))
    write_report(tmp_path)
    comparison = compare(one, tmp_path)
    table = main_table(comparison, comparison.rows)
    assert table.head[2:5] == ["loss", "difference to lora", "peak memory, GiB"]
    assert cells(tmp_path, "adam")[2:4] == ["0.300 ± 0.000", "−0.100 ± 0.000"]
    # adam needs the most memory and has the lowest loss; sbft needs as much memory as lora and has a higher loss.
    on_front = [row.variant for row in front(comparison.rows)]
    assert on_front[-1] == "adam" and "sbft" not in on_front[1:]


def test_several_models_are_compared_apart(tmp_path):
    models = ["builtin:smollm2-135m", "org/other-model"]
    one = suite(models=models, methods={name: {"learning_rates": [1e-3]} for name in ("lora", "sbft")})
    store(one, tmp_path)
    leave_tests(one, tmp_path, lambda run: record(one, run, 0.9 if run.model == models[1] else 0.4))
    write_report(tmp_path)
    assert cells(tmp_path, "sbft", "## needle, smollm2-135m")[2] == "40.0 ± 0.0"
    assert cells(tmp_path, "sbft", "## needle, org-other-model")[2] == "90.0 ± 0.0"


def test_runs_that_shared_the_machine_are_told(tmp_path):
    one = chosen(suite(), tmp_path)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Each runner made one run at a time." in text and "--jobs" not in text
    run = validation_runs(one)[0]
    leave(tmp_path, run, scored(one, run), at_once=2, cores=4)
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "Up to 2 runs were on the machine at the same time" in text and "Each runner" not in text
    assert f"--output-dir {tmp_path} --jobs 2\n" in text
    assert "Machine: Some CPU, 4 cores, 2 threads per run." in text


def test_on_gpus_the_command_leaves_the_number_of_runs_at_once_to_the_machine(tmp_path):
    one = chosen(suite(), tmp_path)
    run = validation_runs(one)[0]
    leave(tmp_path, run, record(one, run, memory_kind="cuda_allocated", device="NVIDIA H100"), at_once=2)
    assert "--jobs" not in command(compare(one, tmp_path))


def test_a_row_with_a_failed_seed_is_not_on_the_front_and_says_so_wherever_it_is_shown(tmp_path, monkeypatch):
    one = chosen(suite(), tmp_path)

    def result(run: Run) -> RunRecord:
        if run.variant == "sbft" and run.seed == 1:
            return record(one, run, status="error", error="timed out after 60 s", metrics={})
        # The better score with less memory: sbft would be alone on the front if no seed had failed.
        return record(
            one, run, 0.9 if run.variant == "sbft" else 0.5, peak_memory_bytes=10**9 + (run.variant == "lora")
        )

    leave_tests(one, tmp_path, result)
    names: list[str] = []
    place = scatter.place
    monkeypatch.setattr(
        scatter, "place", lambda a, points, *rest: names.extend(p.name for p in points) or place(a, points, *rest)
    )
    write_report(tmp_path)
    assert [row.variant for row in front(compare(one, tmp_path).rows)] == ["lora"]
    assert sorted(names) == ["lora", "sbft (2 of 3 seeds)"]
    assert cells(tmp_path, "sbft")[2] == "90.0 ± 0.0 (2 of 3 seeds)" and cells(tmp_path, "lora")[2] == "50.0 ± 0.0"
    text = (tmp_path / "report.md").read_text()
    assert "score and peak memory: lora. Not considered for the Pareto front, because a seed failed: sbft." in text
    with (tmp_path / "summary.csv").open() as lines:
        on_front = {line["variant"]: line["on_pareto_front"] for line in csv.DictReader(lines)}
    assert on_front == {"lora": "True", "sbft": "False"}


@pytest.mark.parametrize("failed", ["error", "no number"])
def test_where_every_row_has_a_failed_seed_there_is_a_picture_without_a_front(failed, tmp_path):
    one = chosen(suite(), tmp_path)

    def result(run: Run) -> RunRecord:
        if run.seed != 1:
            return record(one, run)
        if failed == "error":
            return record(one, run, status="error", error="timed out", metrics={})
        return record(one, run, metrics={"exact_match": math.nan, "loss": 0.4})

    leave_tests(one, tmp_path, result)
    write_report(tmp_path)
    assert front(compare(one, tmp_path).rows) == [] and (tmp_path / "accuracy-memory.png").exists()
    text = (tmp_path / "report.md").read_text()
    assert "On the Pareto front" not in text
    why = "error: timed out" if failed == "error" else "its exact match is not finite"
    assert f"sbft: 2 of 3 seeds; seed 1 failed: {why}." in text


RATES = "## Validation scores by learning rate: needle"


def test_validation_scores_have_the_standard_error_of_the_share_with_one_search_seed(tmp_path):
    one = chosen(suite(), tmp_path)
    write_report(tmp_path)
    # sqrt(0.9 * 0.1 / 100) and sqrt(0.6 * 0.4 / 100), the items of the validation part.
    assert cells(tmp_path, "sbft", RATES)[1:3] == ["0.0001: 60.0 ± 4.9", "**0.0003: 90.0 ± 3.0**"]
    drawn = charts._curve(row_of(one, tmp_path, "sbft"))
    assert drawn[3e-4].standard_error == pytest.approx(0.03) and list(drawn) == [1e-4, 3e-4, 1e-3]


def test_validation_scores_over_several_search_seeds_have_the_error_over_them(tmp_path):
    one = store(suite(search_seeds=[0, 1]), tmp_path)
    parsed = suite(search_seeds=[0, 1])
    assert one == tmp_path

    def result(run: Run) -> RunRecord | None:
        if run.variant == "lora":
            return None if run.seed == 1 else record(parsed, run, 0.5)
        if run.learning_rate == 1e-3:
            return record(parsed, run, metrics={"exact_match": None if run.seed else 0.9, "loss": 0.4})
        return record(parsed, run, [0.8, 0.9][run.seed])

    search(parsed, tmp_path, result)
    write_report(tmp_path)
    # Deviations of 5 from 85: a sample standard deviation of 5 times the root of 2, over the root of 2.
    assert cells(tmp_path, "sbft", RATES)[1] == "**0.0001: 85.0 ± 5.0**"
    assert cells(tmp_path, "sbft", RATES)[3] == "0.001: failed ¹"
    assert "¹ its exact match is not finite" in (tmp_path / "report.md").read_text()
    assert cells(tmp_path, "lora", RATES)[1] == "0.001: 50.0 ± 5.0 (1 of 2 seeds)"
    assert list(charts._curve(row_of(parsed, tmp_path, "sbft"))) == [1e-4, 3e-4]


def test_a_loss_and_a_score_that_is_no_share_of_items_have_no_error_of_one_seed(tmp_path):
    one = chosen(suite(seeds=[0]), tmp_path)
    leave_tests(one, tmp_path, lambda run: record(one, run, metrics={"exact_match": 0.5, "loss": 0.4, "rouge": 31.5}))
    row = row_of(one, tmp_path, "sbft")
    for metric, mean in (("rouge", 31.5), ("loss", 0.4)):
        score = replace(row, metric=metric).score
        assert score is not None and (score.mean, score.standard_error) == (mean, None)


@pytest.mark.parametrize("kind", ["resident", "cuda_allocated"])
def test_the_memory_by_part_stands_in_a_table_in_mebibytes(kind, tmp_path):
    methods = {"adam": {"learning_rates": [1e-5]}, "sbft": {"learning_rates": [1e-4]}}
    one = chosen(suite(methods=methods, baseline="adam"), tmp_path)
    leave_tests(one, tmp_path, lambda run: record(one, run, memory_kind=kind))
    write_report(tmp_path)
    heading, gpu = "## Peak memory by part, MiB: needle", kind == "cuda_allocated"
    # 700 MB held before; weights, two moments and gradients of 538060032 bytes each; and 150 MB of activations.
    peak = 850_000_000 + 4 * 538_060_032
    parts = ["668", "513", "1026", "513", "143", f"{peak / 2**20:.0f}"]
    assert cells(tmp_path, "adam", heading) == ["adam", *parts, *([f"{peak / 1e9:.2f}"] if gpu else [])]
    process = "in use before" if gpu else "Python and libraries"
    # No column for adapters: no method here has them.
    head = ["method", process, "weights", "optimizer state", "gradients", "activations and temporaries", "peak"]
    assert cells(tmp_path, "method", heading) == [*head, *(["peak, GB (10⁹ bytes)"] if gpu else [])]
    assert "<h2>Peak memory by part, MiB: needle</h2>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("above", [3_000_000_000, 300_000_000, 40_000_000, 0])
def test_the_parts_of_the_memory_add_up_to_the_peak(above, tmp_path):
    one = chosen(suite(methods={"lora": {"learning_rates": [1e-3]}, "adam": {"learning_rates": [1e-5]}}), tmp_path)

    def result(run: Run) -> RunRecord:
        made = record(one, run)
        made.memory["above_baseline"] = above
        made.peak_memory_bytes = (made.memory["baseline"] or 0) + above
        return made

    leave_tests(one, tmp_path, result)
    for variant in ("lora", "adam"):
        row = row_of(one, tmp_path, variant)
        parts = parts_of_row(row)
        assert parts is not None and all(value >= 0 for value in parts.values())
        assert sum(parts.values()) == pytest.approx(row.peak_bytes)
    adapters = parts_of(row_of(one, tmp_path, "lora").records[0], True)
    assert adapters is not None and adapters["adapters"] == 4 * 4_884_480 and adapters["weights"] == 269_030_016
    assert parts_of_row(row_of(one, tmp_path, "adam"))["adapters"] == 0  # type: ignore[index]


def test_memory_that_was_not_measured_has_no_parts(tmp_path):
    one = chosen(suite(), tmp_path)
    made = record(one, validation_runs(one)[0])
    # On a system where the peak cannot be reset.
    made.memory["above_baseline"] = None
    assert parts_of(made, False) is None


@pytest.mark.parametrize("gpu", [False, True])
def test_a_prediction_stands_beside_what_was_measured(gpu, tmp_path):
    one = chosen(suite(methods={"lora": {"learning_rates": [1e-3]}, "sbft": {"learning_rates": [1e-3]}}), tmp_path)

    def result(run: Run) -> RunRecord:
        made = record(one, run)
        made.memory |= {"above_baseline": 1000 << 20, "baseline": 1000 << 20}
        made.peak_memory_bytes = 2000 << 20
        if gpu:
            made.memory_kind = "cuda_allocated"
        if run.variant == "sbft":  # measured: 2000 MiB on a GPU, elsewhere 1000 MiB above the model
            made.memory |= {"predicted_peak": 1900 << 20, "predicted_above_baseline": 1100 << 20}
        return made

    leave_tests(one, tmp_path, result)
    write_report(tmp_path)
    heading = "## Peak memory by part, MiB: needle"
    assert cells(tmp_path, "method", heading)[-2:] == [
        "peak, predicted" if gpu else "above the model, predicted",
        "error",
    ]
    assert cells(tmp_path, "sbft", heading)[-2:] == (["1900", "−5 %"] if gpu else ["1100", "+10 %"])
    assert cells(tmp_path, "lora", heading)[-2:] == ["", ""]


@pytest.mark.parametrize("tasks, seeds", [(2, 3), (1, 1), (3, 2)])
def test_no_name_in_the_picture_covers_another_or_leaves_its_panel(tasks, seeds, tmp_path):
    one = crowd(tmp_path, tasks=tasks, seeds=seeds)
    panels = draw_scatter(compare(one, tmp_path), tmp_path / "picture.png")
    assert panels is not None and len(panels) == tasks
    for boxes in panels:
        assert len(boxes) == len(CROWD) - 1
        for first, second in itertools.combinations(boxes, 2):
            assert overlap(first, second) == 0
        for left, bottom, right, top in boxes:
            assert left >= 0 and bottom >= 0 and right <= 1350 and top <= 555 * tasks


def test_every_variant_of_many_has_a_look_of_its_own():
    found = looks([str(i) for i in range(60)])
    assert len({(look.colour, look.marker) for look in found.values()}) == 60
    assert found["3"] == looks([str(i) for i in range(9)])["3"]


class Page(HTMLParser):
    """Records what a page loads, and checks that its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself(crowded):
    text = (crowded / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert len(page.sources) == 4 and "http" not in re.sub(r"base64,[^\"]*", "", text)
    for source, name in zip(page.sources, PICTURES, strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data) == (crowded / name).read_bytes()
    assert "prefers-color-scheme: dark" in text and "overflow-x: auto" in text
    assert '<td class="reason" colspan="12">no learning rate worked' in text
    assert "<strong>" in text and "**" not in text


def test_text_from_elsewhere_cannot_break_the_page(tmp_path):
    one = chosen(suite(summary="<b>Bold</b> & more"), tmp_path)
    leave_tests(one, tmp_path, lambda run: record(one, run, status="error", error="</table><script>alert(1)</script>"))
    write_report(tmp_path)
    page = Page()
    page.feed((tmp_path / "report.html").read_text())
    assert "script" not in page.tags and "b" not in page.tags


def test_csv_has_a_row_for_every_run_and_every_variant(crowded):
    one = Suite.model_validate(yaml.safe_load((crowded / "suite.yaml").read_text()))
    with (crowded / "runs.csv").open() as lines:
        runs = list(csv.DictReader(lines))
    # qlora has no chosen rate, so no test runs.
    assert len(runs) == len(validation_runs(one)) + 2 * 3 * (len(CROWD) - 1)
    test_run = next(line for line in runs if line["phase"] == "test")
    assert test_run["chosen"] == "True" and int(test_run["memory.weights"]) > 0 and test_run["data.packed_into"] == ""
    with (crowded / "summary.csv").open() as lines:
        summary = list(csv.DictReader(lines))
    assert len(summary) == 2 * len(CROWD)
    assert {line["seeds_done"] for line in summary if line["variant"] != "qlora"} == {"3"}


def test_the_command_names_the_suite_that_ships_or_the_copy_beside_the_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from sbft.bench.suite import load_suite, suite_names

    store(suite(), tmp_path / "my runs")
    assert command(Comparison(suite(), Path("my runs"), [])) == "sbft bench 'my runs/suite.yaml' --output-dir 'my runs'"
    for name in suite_names():
        told = command(Comparison(load_suite(name), tmp_path / "runs" / name, []))
        assert told == f"sbft bench {name} --output-dir runs/{name}"


def test_without_matplotlib_all_but_the_pictures_is_written(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments, **keywords)

    one = chosen(suite(), tmp_path)
    leave_tests(one, tmp_path, lambda run: record(one, run))
    monkeypatch.setattr(builtins, "__import__", without)
    report = write_report(tmp_path)
    assert [path.name for path in report.files] == ["report.md", "report.html", "runs.csv", "summary.csv"]
    assert report.warning is not None and "matplotlib" in report.warning and "Type: " in report.warning
    assert ".png" not in (tmp_path / "report.md").read_text()


# The keys of huggingface/peft, method_comparison/MetaMathQA/utils.py: log_results and TrainConfig.
TRAIN_INFO = {
    "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
    "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
}  # fmt: skip
RUN_INFO = {"created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg"}
TRAIN_CONFIG = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile", "use_gc",
    "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler", "use_amp",
    "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
}  # fmt: skip
META_INFO = {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"}
# The keys that their processing.py reads from the last entry.
LAST = {"test accuracy", "train loss", "train samples", "train total tokens"}


def test_results_can_be_had_in_the_schema_of_pefts_comparison(tmp_path):
    one = chosen(suite(seeds=[0]), tmp_path / "suite")
    history = [{"step": 10.0, "tokens": 600.0, "loss": 1.5, "learning_rate": 1e-3}]
    gpu = {"memory_kind": "cuda_allocated", "device": "NVIDIA H100 80GB HBM3", "history": history}

    def result(run: Run) -> RunRecord:
        if run.variant == "sbft":
            return record(one, run, status="oom", error="Out of memory.", metrics={}, saved_bytes=None)
        made = record(one, run, 0.5, **gpu)
        made.memory["reserved_peak"] = 3_000_000_000
        return made

    leave_tests(one, tmp_path / "suite", result)
    files = export_peft_json(tmp_path / "suite", tmp_path / "out")
    assert [path.name for path in files] == [
        "lora--smollm2-135m-needle-lora-lr_0.002-seed_0.json",
        "sbft--smollm2-135m-needle-sbft-lr_0.0003-seed_0.json",
    ]
    lora, sbft = (json.loads(path.read_text()) for path in files)
    for content in (lora, sbft):
        assert set(content) == {"run_info", "train_info", "meta_info"}
        assert set(content["run_info"]) == RUN_INFO and set(content["train_info"]) == TRAIN_INFO
        assert set(content["run_info"]["train_config"]) == TRAIN_CONFIG | {"gradient_accumulation_steps"}
        assert set(content["meta_info"]) == META_INFO
        assert content["meta_info"]["package_info"]["torch-version"] == "2.13.0"
        assert content["run_info"]["created_at"] == "2026-01-02T03:04:05+00:00"
    assert lora["run_info"]["peft_config"]["peft_type"] == "LORA" and lora["run_info"]["peft_config"]["r"] == 16
    assert lora["run_info"]["train_config"]["optimizer_kwargs"]["lr"] == 2e-3
    assert lora["train_info"]["accelerator_memory_max"] == 3_000_000_000
    assert lora["train_info"]["status"] == "success" and set(lora["train_info"]["metrics"][-1]) >= LAST
    last = lora["train_info"]["metrics"][-1]
    assert [last[name] for name in sorted(LAST)] == [0.5, 1.5, 300, 18_900]
    assert lora["meta_info"]["system_info"]["accelerator"] == "NVIDIA H100 80GB HBM3"
    assert sbft["run_info"]["peft_config"] is None and sbft["run_info"]["error_msg"] == "Out of memory."
    assert sbft["train_info"]["status"] == "failed" and sbft["train_info"]["file_size"] is None
    assert sbft["train_info"]["accelerator_memory_max"] is None and sbft["train_info"]["metrics"] == []


def test_only_a_suite_with_test_runs_can_be_exported(tmp_path):
    with pytest.raises(DataError, match="is not the folder of a suite"):
        export_peft_json(tmp_path, tmp_path / "out")
    chosen(suite(), tmp_path)
    with pytest.raises(DataError, match="No test run"):
        export_peft_json(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_prints_the_short_table_and_where_the_rest_lies(tmp_path):
    one = chosen(suite(), tmp_path / "s")
    leave_tests(one, tmp_path / "s", lambda run: record(one, run))
    done = CliRunner().invoke(app, ["report", str(tmp_path / "s"), "--peft-json", str(tmp_path / "out")])
    assert done.exit_code == 0
    head = next(line for line in done.stdout.splitlines() if line.startswith("| method"))
    assert "peak memory, GiB" in head and "evaluation peak" not in head
    assert f"{tmp_path}/s/report.html" in done.stdout and f"{tmp_path}/out/lora--" in done.stdout
    alone = tmp_path / "plain"
    (alone / "run").mkdir(parents=True)
    record(one, validation_runs(one)[0]).save(alone / "run")
    refused = CliRunner().invoke(app, ["report", str(alone), "--peft-json", str(tmp_path / "out")])
    assert refused.exit_code == 2 and "is not the folder of a suite" in refused.stderr


def test_the_report_of_a_suite_says_what_was_forgotten(tmp_path: Path) -> None:
    one = suite(seeds=[0, 1])
    folder = store(one, tmp_path / "suite")
    search(one, folder, lambda run: record(one, run))

    def forgetful(run: Run) -> RunRecord:
        before, after = {"loss": 2.0, "exact_match": 0.5}, {"loss": 2.1 + 0.2 * run.seed, "exact_match": 0.4}
        made = record(one, run)
        made.recipe["evaluation"]["watch"] = {"sums": {"data": "sums.jsonl", "metrics": ["exact_match"]}}
        made.watched = {name: {"metrics_before": before, "metrics": after} for name in ("english", "sums")}
        return made

    leave_tests(one, folder, lambda run: forgetful(run) if run.variant == "sbft" else record(one, run))
    report = write_report(folder)
    for text in (report.text, (folder / "report.md").read_text()):
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
        places = [table[0].index(f"forgetting of {name}") for name in ("english", "sums")]
        rows = {row[0]: [row[place] for place in places] for row in table[2:4]}
        assert rows["lora"] == ["", ""]
        # 0.1 and 0.3 nats: their standard error is 0.1. Ten points of a hundred, twice.
        assert [cell[: cell.rindex(" ")] for cell in rows["sbft"]] == ["+0.200 ± 0.100", "−10.0 ± 0.0"]
        assert "it has forgotten where this is positive" in text and "it has forgotten where this is negative" in text
    assert "forgetting of english" in (folder / "report.html").read_text()
    assert "forgetting.english" in (folder / "summary.csv").read_text().splitlines()[0]
