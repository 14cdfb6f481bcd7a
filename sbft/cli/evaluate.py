"""`sbft eval`: measure a model, trained or not, on some data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbft.cli.errors import TracebackOption, shown_as_a_paragraph

if TYPE_CHECKING:
    from datasets import Dataset

    from sbft.recipe import Recipe


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a run, any checkpoint, hub id, or builtin:NAME.")],
    data: Annotated[
        str | None, typer.Option(help="Hub id, local file, or generated:NAME; by default what the run was measured on.")
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="Metric such as exact_match. May be repeated.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Measure on the first so many examples only.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="JSONL file to write the answers to.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key: data.prompt=question. May be repeated."),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    traceback: TracebackOption = False,
) -> None:
    """Measure a model: loss, perplexity, and metrics of its generated answers."""
    with shown_as_a_paragraph(traceback):
        recipe = _recipe_of(model, data, metric, limit, overrides)
        from sbft.cli.quiet import quiet_libraries

        quiet_libraries()
        from sbft.cli.load import load_for_use
        from sbft.training.run import measure

        rows = _rows(recipe, data)
        loaded, tokenizer = load_for_use(model, str(recipe.dtype), trust_remote_code=recipe.trust_remote_code)
        metrics = measure(recipe, loaded, tokenizer, rows, predictions)
        _print(metrics, min(len(rows), recipe.evaluation.limit or len(rows)), json_output)


def _recipe_of(
    model: str, data: str | None, metric: list[str] | None, limit: int | None, overrides: list[str] | None
) -> Recipe:
    """The recipe that the model was trained by, so that questions are put as in training; else the defaults."""
    from sbft.errors import DataError
    from sbft.recipe import load_recipe, resolve

    saved = Path(model) / "recipe.yaml"
    changes = [*(overrides or [])]
    if metric:
        changes.append(f"evaluation.metrics=[{', '.join(metric)}]")
    if limit:
        changes.append(f"evaluation.limit={limit}")
    if saved.is_file():
        return resolve(load_recipe(saved, changes))
    if data is None:
        raise DataError(f"{model} is no folder of a run, so what to measure on is not known. Type --data D.")
    return resolve(load_recipe(None, changes, model=model, data=data))


def _rows(recipe: Recipe, data: str | None) -> Dataset:
    from sbft.data.sources import load_source
    from sbft.errors import DataError
    from sbft.training.run import evaluation_rows, read_splits

    if data is None:
        rows = evaluation_rows(read_splits(recipe))
        if rows is None:
            raise DataError("The recipe of this run has no evaluation data. Type --data D.")
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
