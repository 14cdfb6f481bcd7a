"""`sbft batch-size`: the smallest batch at full throughput, measured on this machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbft.cli.shared.options import DataOption, MethodOption, ModelOption, RecipeArgument
from sbft.cli.shared.recipe import recipe_of
from sbft.cli.shared.starting import loading_libraries
from sbft.cli.shared.verb import verb
from sbft.native.sizes import parse_bytes

if TYPE_CHECKING:
    from sbft.planning.batch_size.search import BatchSizes


@verb
def batch_size(
    recipe: RecipeArgument = None,
    model: ModelOption = None,
    data: DataOption = None,
    method: MethodOption = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: data.max_length=512. Repeatable."),
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the best tokens/s that counts as full throughput.")
    ] = 0.95,
    max_batch_size: Annotated[int | None, typer.Option(min=1, help="Try no larger batch.")] = None,
    memory_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Peak memory to stay within: 20GiB. Default: what is free.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time each size for at least this long.")] = 2.0,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder for the plot and figures; default: runs/batch-size-RECIPE.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find the smallest batch at full throughput.

    It times training steps with 1, 2, 4, ... of the longest examples; the model is not changed. Small batches train as well
    as large ones, so a larger batch than this gains nothing. Full throughput often begins at a few hundred tokens per device.
    """
    flags: dict[str, Any] = {"model": model, "data": data, "method": method}
    settings = recipe_of(recipe, overrides, **flags)
    with loading_libraries():
        from rich.console import Console

        from sbft.planning.batch_size.search import find_batch_size

    # With --json, stdout is for the JSON alone.
    console = Console(highlight=False, stderr=json_output)
    result = find_batch_size(
        settings,
        share=share,
        largest=max_batch_size,
        limit_bytes=None if memory_limit is None else parse_bytes(memory_limit, "--memory-limit"),
        seconds=seconds,
        say=lambda line: console.print(line, style="dim", markup=False, soft_wrap=True),
    )
    folder = output_dir or Path("runs") / f"batch-size-{Path(recipe or settings.data.train).stem}"
    lines = _written(result, folder)
    if json_output:
        import json

        print(json.dumps({**result.to_dict(), "command": _command(result, recipe, flags, overrides)}))
        return
    from sbft.cli.batch_size_report import print_batch_sizes

    print_batch_sizes(console, result, _command(result, recipe, flags, overrides))
    print("\n".join(lines))


def _command(result: BatchSizes, recipe: str | None, flags: dict[str, Any], overrides: list[str] | None) -> str:
    """What the user typed, as a training command with the batch size that was found."""
    words = ["sbft", "train", *([] if recipe is None else [recipe])]
    for flag, value in flags.items():
        words += [] if value is None else [f"--{flag}", value]
    new = result.settings.overrides
    kept = [override for override in overrides or [] if override.partition("=")[0].strip() not in new]
    for override in [*kept, *(f"{key}={value}" for key, value in new.items())]:
        words += ["--set", override]
    return shlex.join(words)


def _written(result: BatchSizes, folder: Path) -> list[str]:
    """Write the figures and their plot, replacing those of an earlier run; lines that say where."""
    import json

    from sbft.cli.batch_size_report import draw_batch_sizes
    from sbft.errors import how_to_install

    folder.mkdir(parents=True, exist_ok=True)
    figures, plot = folder / "batch-size.json", folder / "batch-size.png"
    figures.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    try:
        draw_batch_sizes(result, plot)
    except ImportError as error:
        if error.name is None or not error.name.startswith("matplotlib"):
            raise
        missing = "There is no plot: matplotlib, which draws it, is not installed. " + how_to_install("'sbft[report]'")
        return [f"Written: {figures}", missing]
    return [f"Written: {plot}, {figures}"]
