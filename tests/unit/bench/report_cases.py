"""Made-up records of suites, for the edge cases of their report; real runs are in test_report_trained.py."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sbft.bench.rate_choice import choose_rate
from sbft.bench.suite import Suite
from sbft.bench.suite_runs import Run, groups, repeats, run_folder, validation_runs
from sbft.runs.record import RunRecord

MODEL = "builtin:smollm2-135m"
TASK = {
    "data": {"train": "generated:needle_haystack", "train_size": 300, "validation_size": 100, "eval_size": 100},
    "evaluation": {"metrics": ["exact_match"]},
}
FULL, HALF = 538_060_032, 269_030_016
"""Bytes of the weights in float32 and in bfloat16."""


def suite(**changes: Any) -> Suite:
    """A suite of two methods with three rates each, with `changes`."""
    content = {
        "summary": "Made up.",
        "models": [MODEL],
        "tasks": {"needle": TASK},
        "methods": {"lora": {"learning_rates": [1e-3, 2e-3, 4e-3]}, "sbft": {"learning_rates": [1e-4, 3e-4, 1e-3]}},
        "seeds": [0, 1, 2],
    }
    return Suite.model_validate({**content, **changes})


def store(one: Suite, folder: Path) -> Path:
    """Create the folder of a suite, without runs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.yaml").write_text(one.to_yaml())
    return folder


def record(one: Suite, run: Run, exact_match: float = 0.5, loss: float = 0.4, **changes: Any) -> RunRecord:
    """A record that a run on a CPU might write; `changes` are applied last."""
    adapter = one.method_of(run.variant) in ("lora", "qlora")
    single = adapter or one.method_of(run.variant) in ("sbft", "sgd", "hf-adafactor")
    weights = HALF if single else FULL
    trained = 4_884_480 if adapter else 134_515_008
    gradients = 4 * trained if adapter else 56_623_104 if single else FULL
    state = 2 * gradients if adapter else 1_561_664 if single else 2 * FULL
    baseline, above = 700_000_000 + weights, gradients + state + 150_000_000
    recipe = run.whole_recipe(one)
    made = RunRecord(
        method=recipe.method,
        model=run.model,
        dataset=recipe.data.train,
        seed=run.seed,
        started_at="2026-01-02T03:04:05+00:00",
        status="ok",
        device="Some CPU, 2 cores",
        dtype=str(recipe.dtype),
        parameters=134_515_008,
        trainable_parameters=trained,
        gradient_accumulation_steps=recipe.training["gradient_accumulation_steps"],
        steps=300,
        tokens=18_900,
        learning_rate=run.learning_rate,
        peak_memory_bytes=baseline + above,
        memory={
            "weights": weights + (gradients if adapter else 0),
            "gradients": gradients,
            "optimizer_state": state,
            "baseline": baseline,
            "above_baseline": above,
            "evaluation_peak": 1_500_000_000,
            "reserved_peak": None,
        },
        step_s={"median": 0.4567, "p90": 0.6},
        optimizer_s={"median": 0.0789, "p90": 0.1},
        tokens_per_s=140.0,
        train_s=140.0,
        eval_s=20.0,
        total_s=170.0,
        saved_bytes=gradients if adapter else weights,
        data={"examples": 300, "evaluation_examples": 100, "packed_into": None},
        metrics={"exact_match": exact_match, "loss": loss, "perplexity": math.exp(loss)},
        evaluated_on="eval" if run.phase == "test" else "validation",
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        versions={"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "peft": "0.21.2"},
        git_commit="0123abc",
    )
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def leave(
    folder: Path, run: Run, made: RunRecord, right: list[bool] | None = None, at_once: int = 1, cores: int | None = None
) -> None:
    """Save a record where its run would have, with predictions if `right` says which are correct.

    Old runs have no `cores`, which were not recorded then.
    """
    place = run_folder(folder, run)
    place.mkdir(parents=True, exist_ok=True)
    if right is not None:
        made.predictions = "predictions.jsonl"
        rows = [{"prompt": f"q{i}", "reference": "a", "prediction": "?", "exact_match": r} for i, r in enumerate(right)]
        (place / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made.save(place)
    process = {"elapsed_s": 175.0, "exit_code": 0, "at_once": at_once} | ({} if cores is None else {"cores": cores})
    (place / "process.json").write_text(json.dumps(process))


def search(one: Suite, folder: Path, result: Callable[[Run], RunRecord | None]) -> None:
    """Save those validation runs that have a result."""
    for run in validation_runs(one):
        if (made := result(run)) is not None:
            leave(folder, run, made)


def test(one: Suite, folder: Path, result: Callable[[Run], RunRecord | None]) -> None:
    """Save those test runs that have a result, at the chosen rates."""
    for run in decided_runs(one, folder):
        if (made := result(run)) is not None:
            leave(folder, run, made)


test.__test__ = False  # type: ignore[attr-defined]

CROWD = {
    "lora": (2e-4, 0.80),
    "sbft": (1e-4, 0.84),
    "adam": (3e-6, 0.83),
    "adam-accum": (1e-5, 0.825),
    "adam8bit": (1e-5, 0.79),
    "sgd": (1e-2, 0.60),
    "hf-adafactor": (3e-5, 0.71),
    "qlora": (2e-4, 0.785),
    "sbft-nearest-rounding": (1e-4, 0.66),
    "sbft-with-embeddings-frozen": (1e-4, 0.81),
    "sbft-without-gradient-release": (1e-4, 0.838),
}
"""Variants with the lowest rate of their grid and the score at the best one."""


def crowd(folder: Path, *, tasks: int = 2, seeds: int = 3) -> Suite:
    """A finished suite of many variants with long names and close figures."""
    methods: dict[str, Any] = {}
    for name, (lowest, _) in CROWD.items():
        methods[name] = {"learning_rates": [float(f"{lowest * factor:.3g}") for factor in (1, 3, 10, 30)]}
        if name.startswith("sbft-"):
            methods[name]["method"] = "sbft"
    names = ["needle", "count-letters", "arithmetic", "sort-words"][:tasks]
    one = suite(tasks={name: TASK for name in names}, methods=methods, seeds=list(range(seeds)))
    store(one, folder)
    noise = random.Random(0)

    def result(run: Run) -> RunRecord | None:
        lowest, best = CROWD[run.variant]
        if run.variant == "qlora":
            return record(one, run, status="unsupported", error="Method qlora needs the package bitsandbytes.")
        if run.variant == "adam" and run.learning_rate > 20 * lowest:
            return record(one, run, status="error", error="No finite loss in 20 steps in a row.")
        away = math.log(run.learning_rate / lowest / 10, 3)
        score = min(max(best - 0.06 * away**2 - 0.1 * names.index(run.task) + noise.gauss(0, 0.015), 0.0), 1.0)
        made = record(one, run, round(score, 2), loss=1.2 - score)
        every = 10 * made.gradient_accumulation_steps
        made.history = [
            {
                "step": step // made.gradient_accumulation_steps,
                "tokens": 63 * step,
                "loss": 0.3 + 1.2 * (1 - score) + 3 * math.exp(-step / 60) + noise.gauss(0, 0.08),
                "learning_rate": run.learning_rate,
            }
            for step in range(every, 301, every)
        ]
        made.peak_memory_bytes += int(noise.gauss(0, 4e6))
        if run.variant == "sbft-without-gradient-release":
            made.peak_memory_bytes += 30_000_000
        return made

    search(one, folder, result)
    test(one, folder, result)
    return one


def decided_runs(suite: Suite, folder: Path) -> list[Run]:
    """The test runs of every variant whose learning rate has been chosen."""
    return [
        run
        for model, task in groups(suite)
        for variant in suite.ordered_methods()
        if (rate := choose_rate(suite, folder, model, task, variant).rate) is not None
        for run in repeats(suite, model, task, variant, rate)
    ]
