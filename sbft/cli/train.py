"""`sbft train`: fine-tune a model by a recipe, or by flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from sbft.cli.shared.launch import is_silent_rank
from sbft.cli.shared.options import (
    AllowPickleOption,
    DataOption,
    EvalDataOption,
    MethodOption,
    ModelOption,
    OffloadOption,
    OutputOption,
    OverwriteOption,
    ProcessesOption,
    RecipeArgument,
    ResumeOption,
    SetOption,
    TrustRemoteCodeOption,
    WeightsOption,
)
from sbft.cli.shared.recipe import recipe_of
from sbft.cli.shared.starting import loading_libraries
from sbft.cli.shared.verb import verb
from sbft.native.sizes import gib

if TYPE_CHECKING:
    from rich.console import Console

    from sbft.recipe import Recipe
    from sbft.runs.record import RunRecord


@verb
def train(
    recipe: RecipeArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    eval_data: EvalDataOption = None,
    method: MethodOption = None,
    weights: WeightsOption = None,
    offload: OffloadOption = False,
    output_dir: OutputOption = None,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    num_processes: ProcessesOption = 1,
    trust_remote_code: TrustRemoteCodeOption = False,
    allow_pickle: AllowPickleOption = False,
) -> None:
    """Fine-tune a model on your data.

    Type sbft train RECIPE, or sbft train --model M --data D.
    """
    settings = recipe_of(
        recipe,
        overrides,
        model=model,
        data=data,
        eval_data=eval_data,
        method=method,
        weights=weights,
        offload="layers" if offload else None,
        output_dir=output_dir,
        trust_remote_code=trust_remote_code or None,
        allow_pickle=allow_pickle or None,
    )
    train_recipe(settings, resume=resume, overwrite=overwrite, num_processes=num_processes)


def train_recipe(recipe: Recipe, *, resume: bool, overwrite: bool, num_processes: int) -> None:
    """Train by a resolved recipe, in one process or several, and show the progress."""
    if num_processes > 1:
        flags = [flag for flag, is_set in {"--resume": resume, "--overwrite": overwrite}.items() if is_set]
        raise typer.Exit(_train_in_parallel(recipe, flags, num_processes))
    with loading_libraries():
        from rich.console import Console

        from sbft.cli.shared.progress import TrainingProgress
        from sbft.recipe import in_brief
        from sbft.runs.run_recipe import run_resolved

    console = Console(highlight=False, quiet=is_silent_rank())
    console.print(in_brief(recipe), style="dim", markup=False, soft_wrap=True)
    console.print(
        f"All other settings are those of method {recipe.method}: {recipe.output_dir}/recipe.yaml will list every one.",
        markup=False,
        soft_wrap=not console.is_terminal,
    )
    progress = TrainingProgress(console)
    record = run_resolved(
        recipe,
        resume=resume,
        overwrite=overwrite,
        callbacks=[progress],
        say=lambda line: console.print(line, markup=False),
    )
    _summarize(console, record, str(recipe.output_dir))


def _train_in_parallel(recipe: Recipe, flags: list[str], processes: int) -> int:
    """Make checks in this process, then train in several; returns their exit code."""
    import tempfile
    from pathlib import Path

    from rich.console import Console

    from sbft.cli.shared.launch import launch
    from sbft.runs.processes import over_processes

    recipe, note = over_processes(recipe, processes)
    if note is not None:
        Console(highlight=False).print(note, markup=False)
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "recipe.yaml"
        resolved.write_text(recipe.to_yaml(), encoding="utf-8")
        return launch(["train", str(resolved), *flags], processes)


def _summarize(console: Console, record: RunRecord, folder: str) -> None:
    from rich.table import Table

    from sbft.runs.record import forgetting

    measured = [("", record.metrics_before, record.metrics)]
    for name, figures in record.watched.items():
        measured.append((f"{name}: ", figures.get("metrics_before", {}), figures.get("metrics", {})))
    if any(after for *_, after in measured):
        table = Table("", "before", "after", box=None, pad_edge=False)
        for prefix, befores, after in measured:
            for name, value in after.items():
                before = befores.get(name)
                table.add_row(f"{prefix}{name}", "" if before is None else f"{before:.4g}", f"{value:.4g}")
        console.print()
        console.print(table)
        for name, forgotten in forgetting(record).items():
            console.print(
                f"Forgetting of {name}: {forgotten.change:+.4g} {forgotten.metric}, after minus before.", markup=False
            )
    peak, above = gib(record.peak_memory_bytes or 0), gib(record.memory.get("above_baseline") or 0)
    kind = "allocated on the GPU" if record.memory_kind == "cuda_allocated" else "resident"
    speed = "" if record.tokens_per_s is None else f", {record.tokens_per_s:.0f} per s"
    console.print(
        f"\n{record.steps} steps, {record.tokens} tokens in {record.train_s or 0:.0f} s{speed}. "
        f"Peak memory {peak} {kind}, {above} of it above the loaded model.",
        markup=False,
        soft_wrap=not console.is_terminal,
    )
    console.print(
        f"The model is in {folder}, its record in {folder}/run.json.\n"
        f'Next: sbft generate {folder} "Your question"'
        if record.recipe.get("save_model", True)
        else f"The record is in {folder}/run.json.",
        markup=False,
        soft_wrap=True,
    )
