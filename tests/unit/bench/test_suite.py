"""Suites: how they are read or refused, which runs they have, and which learning rate is chosen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from sbft.bench.rate_choice import choose_rate
from sbft.bench.runner import check_same
from sbft.bench.schedule import duration, is_selected, listing, plan, predictions, time_left
from sbft.bench.suite import Suite, _contradictions, load_suite, suite_names, uneven_grids
from sbft.bench.suite_runs import Run, model_folder, possible_runs, read_run, run_folder, stored_suite, validation_runs
from sbft.errors import RecipeError
from sbft.runs.record import RunRecord

CONTENT: dict[str, Any] = {
    "summary": "A small one.",
    "models": ["builtin:smollm2-135m"],
    "tasks": {
        "needle": {
            "data": {
                "train": "generated:needle_haystack",
                "train_size": 30,
                "validation_size": 20,
                "eval_size": 20,
                "options": {"min_num_statements": 3},
            },
            "evaluation": {"metrics": ["exact_match"]},
        }
    },
    "methods": {
        "adam-accum": {"learning_rates": [1e-5, 1e-4]},
        "sbft": {"learning_rates": [1e-4, 1e-3]},
        "lora": {"learning_rates": [1e-3]},
        "nearest": {
            "method": "sbft",
            "set": {"optimizer.stochastic_rounding": False, "training.lr_scheduler_type": "constant"},
            "learning_rates_from": "sbft",
        },
    },
    "seeds": [0, 1],
    "training": {"lr_scheduler_type": "linear"},
}
MODEL = CONTENT["models"][0]


@pytest.fixture
def suite() -> Suite:
    return Suite.model_validate(CONTENT)


def written(folder: Path, **changes: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({**CONTENT, **changes}))
    return path


def finished(suite: Suite, folder: Path, run: Run, **figures: Any) -> None:
    """Save the record that a run of the suite would write, with these figures."""
    record = RunRecord(
        method="m", model=run.model, dataset="d", seed=run.seed, learning_rate=run.learning_rate,
        recipe=run.whole_recipe(suite).model_dump(mode="json", exclude_none=True),
    )  # fmt: skip
    record.status = "ok"
    for name, value in figures.items():
        setattr(record, name, value)
    run_folder(folder, run).mkdir(parents=True)
    record.save(run_folder(folder, run))


def searched(suite: Suite, folder: Path, variant: str, figures: dict[float, dict[str, Any]]) -> None:
    for run in validation_runs(suite):
        if run.variant == variant and run.learning_rate in figures:
            finished(suite, folder, run, **figures[run.learning_rate])


def measured(exact_match: float, loss: float) -> dict[str, Any]:
    return {"metrics": {"exact_match": exact_match, "loss": loss}}


def test_every_suite_that_ships_is_read_and_says_what_it_is() -> None:
    assert {"quick", "paper-table", "ablations", "memory-13b", "math-gemma3", "metamath-gsm8k"} <= set(suite_names())
    for name in suite_names():
        assert load_suite(name).summary


@pytest.mark.parametrize("name", ["quick", "paper-table", "ablations", "memory-13b", "math-gemma3", "metamath-gsm8k"])
def test_the_recipes_of_every_suite_that_ships_are_valid(name: str) -> None:
    from sbft.bench.suite_check import recipe_problems

    assert recipe_problems(load_suite(name)) == []


@pytest.mark.parametrize("name", ["quick", "paper-table"])
def test_the_grids_of_the_comparisons_that_ship_are_equally_wide(name: str) -> None:
    assert uneven_grids(load_suite(name)) is None


def test_a_suite_is_the_same_after_it_was_stored(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text(suite.to_yaml())
    assert stored_suite(tmp_path) == suite
    assert stored_suite(tmp_path / "elsewhere") is None


def test_all_mistakes_are_in_one_error_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path, seed=3, baseline="lora")
    with pytest.raises(RecipeError) as caught:
        load_suite(
            path, ["tasks.needle.data.trian=3", "methods.sbft.learning_rate=1", "methods.lora.learning_rates=[-1]"]
        )
    told = str(caught.value)
    assert told.startswith("4 problems in the suite:\n")
    line = path.read_text().splitlines().index("seed: 3") + 1
    assert f"{path} line {line}: seed is not a key of a suite; the nearest is seeds" in told
    assert "tasks.needle.data.trian is not a key here; the nearest is train" in told
    assert "methods.sbft.learning_rate is not a key here; the nearest is learning_rates" in told
    assert "-1" in told and "greater than 0" in told


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("baseline=sbtf", "baseline is sbtf, expected one of methods: adam-accum, lora, nearest, sbft"),
        ("methods.adma={learning_rates: [1e-5]}", "is not a method of sbft ('adma'), expected one of"),
        ("methods.sbft.learning_rates_from=lora", "requires either learning_rates"),
        ("methods.sbft.learning_rates=[1e-3, 1e-3]", "has a rate twice"),
        (
            "methods.nearest.learning_rates_from=nearest",
            "expected a method with learning_rates: adam-accum, lora, sbft",
        ),
        ("methods.nearest.set={training.learning_rate: 1.0}", "write learning_rates of each method"),
        ("methods.nearest.set={data.train_size: 60}", "data.train_size cannot be set for a single method"),
        ("methods.nearest.set={evaluation: {metrics: []}}", "Write it in tasks.NAME.evaluation."),
        ("methods.nearest.set={data: null}", "Write it in tasks.NAME.data."),
        (
            "methods.nearest.set={training: {num_train_epochs: 2}}",
            "training.num_train_epochs cannot be set for a single",
        ),
        ("methods.nearest.set={training.max_steps: 2}", "Write it in training of the suite."),
        ("training.seed=1", "write seeds, and search_seeds"),
        ("seeds=[0, 0]", "has a seed twice"),
        ("tasks={a/b: {data: {train: generated:x, validation_size: 1, eval_size: 1}}}", "names a folder"),
        ("tasks.needle.data.validation_size=null", "no validation part to choose the learning rate on"),
        ("tasks.needle.data.eval_size=null", "write eval_size: 100"),
        ("tasks.needle.data.train=my.jsonl", "splits its evaluation part off the training file"),
    ],
)
def test_what_cannot_be_a_fair_suite_is_refused(override: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r".*") as caught:
        load_suite(written(tmp_path), [override])
    assert told in str(caught.value)


def test_an_unknown_suite_names_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"Did you mean quick\?") as caught:
        load_suite("quik")
    assert "paper-table" in str(caught.value)


def test_grids_of_one_width_are_even_and_others_are_told(suite: Suite) -> None:
    assert uneven_grids(Suite.model_validate({**CONTENT, "methods": {
        "lora": {"learning_rates": [1e-4, 3e-4, 1e-3, 3e-3]},
        "adam": {"learning_rates": [3e-6, 1e-5, 3e-5, 1e-4]},
        "near": {"method": "sbft", "learning_rates_from": "lora"},
    }})) is None  # fmt: skip
    told = uneven_grids(suite)
    assert told is not None and "lora: 1 rate," in told and "sbft, adam-accum: 2 rates, over a factor of 10" in told


def test_a_recipe_is_the_tasks_with_the_variants_settings_over_it(suite: Suite) -> None:
    recipe = Run(MODEL, "needle", "nearest", 1e-3, 1, "test").recipe(suite)
    assert recipe == {
        "model": MODEL,
        "method": "sbft",
        "data": {**CONTENT["tasks"]["needle"]["data"], "seed": 1},
        "evaluation": {"metrics": ["exact_match"]},
        "optimizer": {"stochastic_rounding": False},
        "training": {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "seed": 1},
    }
    # The suite is unchanged: the next run starts from it.
    assert suite.training == {"lr_scheduler_type": "linear"}


def test_a_validation_run_has_nothing_of_the_evaluation_data(suite: Suite) -> None:
    suite.tasks["needle"].data.eval = "test.jsonl"
    recipe = Run(MODEL, "needle", "sbft", 1e-3, 0, "validation").recipe(suite)
    assert not {"eval", "eval_size"} & set(recipe["data"]) and recipe["data"]["validation_size"] == 20
    assert recipe["evaluation"]["before"] is False


def test_baseline_and_sbft_come_first_and_one_rate_needs_no_validation(suite: Suite, tmp_path: Path) -> None:
    assert suite.ordered_methods() == ["lora", "sbft", "adam-accum", "nearest"]
    assert [run.name for run in validation_runs(suite)] == [
        "needle/sbft/lr=0.0001/validation-seed=0",
        "needle/sbft/lr=0.001/validation-seed=0",
        "needle/adam-accum/lr=1e-05/validation-seed=0",
        "needle/adam-accum/lr=0.0001/validation-seed=0",
    ]
    assert [one.name for one in plan(suite, tmp_path) if one.phase == "test" and one.run is not None] == [
        "needle/lora/lr=0.001/test-seed=0",
        "needle/lora/lr=0.001/test-seed=1",
    ]


def test_several_models_have_a_folder_each(suite: Suite) -> None:
    suite.models = [MODEL, "org/Some Model"]
    names = {run.name.split("/")[0] for run in possible_runs(suite)}
    assert names == {"smollm2-135m", "org-Some-Model"} == {model_folder(model) for model in suite.models}


def test_the_best_validation_score_chooses_and_its_loss_where_scores_are_equal(suite: Suite, tmp_path: Path) -> None:
    searched(suite, tmp_path, "sbft", {1e-4: measured(0.8, 0.5)})
    undecided = choose_rate(suite, tmp_path, MODEL, "needle", "sbft")
    assert (undecided.rate, undecided.decided) == (None, False) and "1 of 2 validation runs" in undecided.reason
    assert choose_rate(suite, tmp_path, MODEL, "needle", "nearest").rate is None
    searched(suite, tmp_path, "sbft", {1e-3: measured(0.8, 0.4)})
    choice = choose_rate(suite, tmp_path, MODEL, "needle", "sbft")
    assert (choice.rate, choice.edge) == (1e-3, "highest") and "exact_match" in choice.reason
    assert [(one.learning_rate, one.score, one.loss) for one in choice.tried] == [(1e-4, 0.8, 0.5), (1e-3, 0.8, 0.4)]
    # It takes another method's rate, and has no search of its own.
    assert choose_rate(suite, tmp_path, MODEL, "needle", "nearest").rate == 1e-3
    runs = [one.run for one in plan(suite, tmp_path) if one.variant == "nearest"]
    assert [run and run.learning_rate for run in runs] == [1e-3, 1e-3]


def test_the_mean_over_search_seeds_decides_and_one_failure_spoils_a_rate(suite: Suite, tmp_path: Path) -> None:
    suite.search_seeds = [0, 1]
    scores = {(1e-4, 0): 0.5, (1e-4, 1): 0.5, (1e-3, 0): 0.9, (1e-3, 1): 0.2}
    for run in validation_runs(suite):
        if run.variant == "sbft":
            finished(suite, tmp_path, run, **measured(scores[run.learning_rate, run.seed], 1.0))
        else:
            figures = measured(0.9, 1.0) if run.learning_rate == 1e-4 else measured(0.1, 1.0)
            failed = run.learning_rate == 1e-4 and run.seed == 1
            finished(suite, tmp_path, run, **({"status": "oom", "error": "no memory"} if failed else figures))
    assert choose_rate(suite, tmp_path, MODEL, "needle", "sbft").rate == 1e-3  # 0.55 against 0.5
    assert choose_rate(suite, tmp_path, MODEL, "needle", "adam-accum").rate == 1e-5


def test_without_a_metric_the_lowest_loss_decides_and_no_number_is_worst(tmp_path: Path) -> None:
    tasks = {"needle": {"data": CONTENT["tasks"]["needle"]["data"]}}
    suite = Suite.model_validate({**CONTENT, "tasks": tasks})
    searched(suite, tmp_path, "sbft", {1e-4: {"metrics": {"loss": 2.0}}, 1e-3: {"metrics": {"loss": 1.0}}})
    assert choose_rate(suite, tmp_path, MODEL, "needle", "sbft").rate == 1e-3
    searched(suite, tmp_path, "adam-accum", {1e-5: {"metrics": {"loss": 9.0}}, 1e-4: {"metrics": {"loss": math.nan}}})
    assert choose_rate(suite, tmp_path, MODEL, "needle", "adam-accum").rate == 1e-5


def test_where_every_rate_failed_there_is_none_and_the_reason(suite: Suite, tmp_path: Path) -> None:
    failure = {"status": "error", "error": "The loss was not finite."}
    searched(suite, tmp_path, "sbft", {1e-4: failure, 1e-3: failure})
    choice = choose_rate(suite, tmp_path, MODEL, "needle", "sbft")
    assert choice.rate is None and choice.decided
    assert "The loss was not finite." in choice.reason
    planned = {one.name: one.state for one in plan(suite, tmp_path)}
    assert planned["needle/sbft/lr=?/test-seed=0"] == planned["needle/nearest/lr=?/test-seed=1"] == "no rate"
    assert planned["needle/adam-accum/lr=?/test-seed=0"] == "to do"


def test_an_interrupted_run_is_none(suite: Suite, tmp_path: Path) -> None:
    run = validation_runs(suite)[0]
    finished(suite, tmp_path, run, status="unfinished")
    assert read_run(tmp_path, run) is None
    # The record of a stopped run whose runner was killed before it could report this.
    stopped = "Stopped by Ctrl-C after step 3 of 9; a checkpoint lies in x/checkpoint-3. To resume, type: sbft train x"
    other = validation_runs(suite)[1]
    finished(suite, tmp_path, other, status="interrupted", error=stopped)
    assert read_run(tmp_path, other) is None and plan(suite, tmp_path)[1].state == "to do"


def test_data_that_only_test_runs_read_are_read_before_the_first_run(tmp_path: Path) -> None:
    from sbft.bench.suite_check import data_problems

    rows = [f'{{"prompt": "q{n}", "completion": "a"}}\n' for n in range(6)]
    for part, kept in (("train", rows[:2]), ("validation", rows[2:4]), ("test", rows[4:])):
        (tmp_path / f"{part}.jsonl").write_text("".join(kept))
    files = {name: str(tmp_path / f"{file}.jsonl") for name, file in
             (("train", "train"), ("validation", "validation"), ("eval", "test"))}  # fmt: skip

    def problems(**changes: str) -> list[str]:
        return data_problems(Suite.model_validate({**CONTENT, "tasks": {"own": {"data": {**files, **changes}}}}))

    assert problems() == []
    (told,) = problems(eval=str(tmp_path / "tset.jsonl"))
    assert told.startswith("tasks.own.data: There is no file ") and "tset.jsonl" in told
    (told,) = problems(eval=files["validation"])
    assert "chosen on the data that it is then tested on" in told


def test_the_tokens_of_pretraining_are_prepared_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sbft.bench.suite_check import data_problems
    from sbft.data.token_files import is_token_folder

    monkeypatch.setenv("SBFT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "code.txt"
    text.write_text("\n\n".join(f"def f{n}(x):\n    return x * {n} + {n * n}\n" for n in range(300)))

    def problems(source: Path) -> list[str]:
        method = {"learning_rates": [1e-3, 1e-2], "set": {"tokenizer": "bpe:300"}}
        tasks = {"corpus": {"data": {"train": str(source), "max_length": 32, "train_tokens": 1000}}}
        content = {
            **CONTENT,
            "models": ["scratch:0.4m"],
            "tasks": tasks,
            "methods": {"adam": method},
            "baseline": "adam",
        }
        return data_problems(Suite.model_validate(content))

    assert problems(text) == []
    assert [is_token_folder(folder) for folder in (tmp_path / "cache" / "tokens").iterdir()] == [True]
    (told,) = problems(tmp_path / "cdoe.txt")
    assert told.startswith("tasks.corpus.data: ") and "cdoe.txt" in told


def test_the_time_of_a_run_is_that_of_its_row_or_else_of_its_method(tmp_path: Path) -> None:
    tasks = {"needle": CONTENT["tasks"]["needle"], "other": CONTENT["tasks"]["needle"]}
    suite = Suite.model_validate({**CONTENT, "tasks": tasks})
    first, second, third = validation_runs(suite)[:3]
    finished(suite, tmp_path, first, total_s=100.0, **measured(0.5, 1.0))
    finished(suite, tmp_path, third, train_s=30.0, eval_s=10.0, **measured(0.5, 1.0))
    (run_folder(tmp_path, first) / "process.json").write_text('{"elapsed_s": 120.0}')
    planned = plan(suite, tmp_path)
    known = predictions(planned)
    assert known[second.name] == 120.0
    assert known["needle/adam-accum/lr=?/test-seed=0"] == 40.0
    assert known["other/sbft/lr=?/test-seed=1"] == 120.0  # that row has no run yet
    assert first.name not in known and "needle/lora/lr=0.001/test-seed=0" not in known
    # 2 tasks x (4 validation and 8 test runs), 2 of which are done; lora and nearest have no times yet.
    assert time_left(planned, 2) == (
        f"22 runs to do, 2 at a time: about {duration((7 * 120.0 + 7 * 40.0) / 2)}, without 8 of methods that have no "
        "finished run."
    )


def test_the_list_of_runs_shows_state_and_time(suite: Suite, tmp_path: Path) -> None:
    first, second = validation_runs(suite)[:2]
    finished(suite, tmp_path, first, total_s=61.0, **measured(0.5, 1.0))
    finished(suite, tmp_path, second, status="oom", error="Out of memory.", total_s=5.0)
    lines = listing(plan(suite, tmp_path), 1).splitlines()
    assert lines[0].split() == ["done", "61", "s", first.name]
    assert lines[1].split() == ["failed", "5", "s", second.name]
    assert "to do          ~61 s  needle/sbft/lr=0.0001/test-seed=0" in lines
    assert "to do                 needle/adam-accum/lr=?/test-seed=0" in lines


def test_durations_are_those_people_say() -> None:
    assert [duration(value) for value in (0, 89.6, 100, 3599, 3900)] == [
        "0 s",
        "90 s",
        "2 min",
        "1 h 00 min",
        "1 h 05 min",
    ]


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("sbft", True), ("needle", True), ("lr=0.001", True), ("test-*", True), ("needle/sbft/*", True),
        ("sbft-*", False), ("needl", False), ("lora", False),
    ],
)  # fmt: skip
def test_a_pattern_fits_a_whole_name_or_one_part(pattern: str, fits: bool) -> None:
    assert is_selected("needle/sbft/lr=0.001/test-seed=0", [pattern]) is fits
    assert is_selected("needle/sbft/lr=0.001/test-seed=0", [])


def test_methods_rates_and_seeds_may_be_added_but_settings_not_changed(suite: Suite, tmp_path: Path) -> None:
    run = validation_runs(suite)[0]
    finished(suite, tmp_path, run, **measured(0.5, 1.0))
    more = Suite.model_validate(CONTENT)
    more.seeds, more.methods["sbft"].learning_rates = [0, 1, 2], [1e-4, 1e-3, 1e-2]
    check_same(more, tmp_path)
    changed = Suite.model_validate(CONTENT)
    changed.tasks["needle"].data.train_size = 31
    with pytest.raises(RecipeError) as caught:
        check_same(changed, tmp_path)
    told = str(caught.value)
    assert run.name in told and "data.train_size (there 30, now 31)" in told and "--output-dir" in told
    assert "data.eval" not in told and "output_dir" not in told


def test_a_failed_run_may_differ_when_it_is_made_again(suite: Suite, tmp_path: Path) -> None:
    finished(suite, tmp_path, validation_runs(suite)[0], status="error", error="timed out after 1 s")
    suite.training["lr_scheduler_type"] = "constant"
    check_same(suite, tmp_path, retry=True)
    with pytest.raises(RecipeError, match=r"lr_scheduler_type \(there linear, now constant\).* --retry"):
        check_same(suite, tmp_path)


def test_a_method_may_replay_and_only_test_runs_watch() -> None:
    replay = {"data": "old.jsonl", "share": 0.05}
    methods = {
        **CONTENT["methods"],
        "replay": {"method": "sbft", "set": {"data.replay": replay}, "learning_rates_from": "sbft"},
    }
    task = CONTENT["tasks"]["needle"]
    watching = {**task, "evaluation": {**task["evaluation"], "watch": {"old": {"data": "old-test.jsonl"}}}}
    suite = Suite.model_validate({**CONTENT, "methods": methods, "tasks": {"needle": watching}})
    assert list(_contradictions(suite)) == []
    recipes = {(run.variant, run.phase): run.whole_recipe(suite) for run in possible_runs(suite)}
    assert recipes["replay", "test"].data.replay is not None and recipes["sbft", "test"].data.replay is None
    assert list(recipes["sbft", "test"].evaluation.watch) == ["old"]
    assert recipes["sbft", "validation"].evaluation.watch == {}
