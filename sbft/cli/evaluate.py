"""`sbft eval`: measure a model, trained or not, on some data."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbft.cli.shared.load import asked_for, load_for_use
from sbft.cli.shared.options import AllowPickleOption, TrustRemoteCodeOption
from sbft.cli.shared.recipe import recipe_of
from sbft.cli.shared.starting import loading_libraries
from sbft.cli.shared.verb import verb
from sbft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from sbft.evaluation.harness import TaskResult
    from sbft.recipe import Recipe


@verb
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a run, any checkpoint, hub id, or builtin:NAME.")],
    data: Annotated[
        str | None, typer.Option(help="Hub id, local file, or generated:NAME; default: the data the run was evaluated on.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric such as exact_match. Repeatable.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only this many examples (of each task).")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Examples per batch.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="JSONL file to write the answers to.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: data.prompt=question. Repeatable."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    harness: Annotated[
        str | None,
        typer.Option(metavar="TASKS", help="Run tasks of lm-evaluation-harness instead: gsm8k,arc_easy."),
    ] = None,
    harness_tasks: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder with YAML files of your own tasks for --harness.")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="With --harness, ask in the model's chat template.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the results of --harness; default: in the model's folder.")
    ] = None,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_pickle: AllowPickleOption = False,
) -> None:
    """Measure a model on your data, or on public tasks.

    What is measured: loss, perplexity, and metrics of the answers that the model generates.
    """
    _refuse_contradictions(
        harness,
        {"--data": data, "--metric": metric, "--predictions": predictions},
        {"--harness-tasks": harness_tasks, "--chat-template": chat_template, "--output": output},
    )
    # These override a recipe that came with the model. What the user sets comes last.
    overrides = [*asked_for(trust_remote_code, allow_pickle), *(overrides or [])]
    if harness is not None:
        settings = {"limit": limit, "batch_size": batch_size or 1, "chat_template": chat_template}
        _on_public_tasks(model, harness, harness_tasks, overrides, settings, output, json_output)
        return
    with loading_libraries():
        from sbft.runs.measurement import measure

    recipe = _recipe_of(model, data, metric, limit, batch_size, overrides)
    rows = _rows(recipe, data)
    loaded, tokenizer = load_for_use(
        model, str(recipe.dtype), trust_remote_code=recipe.trust_remote_code, allow_pickle=recipe.allow_pickle
    )
    with _advice_if_out_of_memory(recipe.evaluation.batch_size):
        metrics = measure(recipe, loaded, tokenizer, rows, predictions)
    _print(metrics, min(len(rows), recipe.evaluation.limit or len(rows)), json_output)


def _refuse_contradictions(harness: str | None, without: dict[str, Any], only_with: dict[str, Any]) -> None:
    """Refuse options for the user's own data together with `--harness`, and options of `--harness` without it."""
    if harness is None:
        if misplaced := [option for option, value in only_with.items() if value]:
            raise DataError(f"{' and '.join(misplaced)} belongs to --harness TASKS, which is not given. Add it.")
        return
    if misplaced := [option for option, value in without.items() if value]:
        raise DataError(
            f"{' and '.join(misplaced)} cannot be given with --harness, whose tasks bring their own data and metrics. Type "
            "two commands, one for each."
        )


def _on_public_tasks(
    model: str,
    names: str,
    folder: Path | None,
    overrides: list[str] | None,
    settings: dict[str, Any],
    output: Path | None,
    as_json: bool,
) -> None:
    """Measure on tasks of lm-evaluation-harness, print the results, and save them in the model's folder."""
    with loading_libraries():
        from sbft.evaluation.harness import FILE_NAME, load_tasks, read, run_tasks, save

    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise DataError("--harness names no task. Type for example: --harness gsm8k,arc_easy")
    for change in overrides or []:
        if change.partition("=")[0].strip() not in ("dtype", "trust_remote_code", "allow_pickle"):
            raise DataError(
                f"--set {change} changes nothing about the tasks of --harness, which bring their own data and prompts. "
                "Only dtype, trust_remote_code and allow_pickle can be set."
            )
    saved = Path(model) / "recipe.yaml"
    recipe = (
        recipe_of(saved, overrides) if saved.is_file() else recipe_of(None, overrides, model=model, data="none")
    )
    destination = output or (Path(model) / FILE_NAME if Path(model).is_dir() else None)
    if destination is not None:
        read(destination)  # to fail now, not after hours
    tasks = load_tasks(wanted, folder)
    loaded, tokenizer = load_for_use(
        model, str(recipe.dtype), trust_remote_code=recipe.trust_remote_code, allow_pickle=recipe.allow_pickle
    )
    with _advice_if_out_of_memory(settings["batch_size"]):
        results = run_tasks(loaded, tokenizer, tasks, **settings)
    if destination is not None:
        save(results, destination, model=model, dtype=str(recipe.dtype), **settings)
    _print_tasks(results, destination, as_json)


@contextmanager
def _advice_if_out_of_memory(batch_size: int) -> Iterator[None]:
    """Say what to type if memory runs out."""
    from sbft.runs.failures import is_out_of_memory

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        smaller = (
            f"--batch-size {batch_size // 2}" if batch_size > 1 else "--limit N, shorter examples or a smaller model"
        )
        raise DataError(f"Out of memory with batches of {batch_size}. Try {smaller}.") from error


def _recipe_of(
    model: str,
    data: str | None,
    metric: list[str] | None,
    limit: int | None,
    batch_size: int | None,
    overrides: list[str] | None,
) -> Recipe:
    """The recipe that the model was trained by, so that it is prompted as in training; else the defaults."""
    saved = Path(model) / "recipe.yaml"
    changes = [*(overrides or [])]
    if metric:
        changes.append(f"evaluation.metrics=[{', '.join(metric)}]")
    if limit:
        changes.append(f"evaluation.limit={limit}")
    if batch_size:
        changes.append(f"evaluation.batch_size={batch_size}")
    if saved.is_file():
        return recipe_of(saved, changes)
    if data is None:
        raise DataError(f"{model} is no folder of a run, so there is no data to measure on. Add --data D.")
    return recipe_of(None, changes, model=model, data=data)


def _rows(recipe: Recipe, data: str | None) -> Dataset:
    from sbft.data.sources import load_source, read_splits
    from sbft.runs.prepare import evaluation_rows

    if data is None:
        rows = evaluation_rows(read_splits(recipe.data))
        if rows is None:
            raise DataError("The recipe of this run has no evaluation data. Add --data D.")
        return rows
    generated = data.startswith("generated:")
    size = recipe.data.eval_size or (recipe.evaluation.limit or 100 if generated else None)
    return load_source(
        data,
        split="eval" if generated else recipe.data.eval_split,
        subset=recipe.data.subset,
        size=size,
        seed=recipe.data.seed,
        options=recipe.data.options,
        completion=recipe.data.completion,
        label_names=recipe.data.label_names,
    )


def _print(metrics: dict[str, float], examples: int, as_json: bool) -> None:
    if as_json:
        import json

        print(json.dumps({"examples": examples, **metrics}))
        return
    print(f"{examples} examples")
    width = max(map(len, metrics))
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.4g}")


def _print_tasks(results: list[TaskResult], written: Path | None, as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps({result.task: asdict(result) for result in results}))
        return
    rows = [("task", "metric", "value", "shots", "examples")]
    for result in results:
        shots, examples = ("" if count is None else str(count) for count in (result.shots, result.examples))
        for score in result.scores:
            metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
            error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
            rows.append((result.task, metric, f"{score.value:.4f}{error}", shots, examples))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if written is not None:
        print(f"Written to {written}")
