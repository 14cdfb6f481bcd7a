"""Arguments and options that several verbs share: the recipe, and the flags that can replace it."""

from __future__ import annotations

from typing import Annotated

import typer

from sbft.cli.shared import completion
from sbft.recipe.methods import METHODS

RecipeArgument = Annotated[
    str | None,
    typer.Argument(
        help="YAML file, or a recipe that ships with sbft: sbft recipes ls.",
        autocompletion=completion.recipes_and_files,
    ),
]
ModelOption = Annotated[str | None, typer.Option(help="Hub id, local folder, or builtin:NAME.")]
DataOption = Annotated[str | None, typer.Option(help="Training data: hub id, local file, or generated:NAME.")]
EvalDataOption = Annotated[str | None, typer.Option(help="Data to evaluate on, before and after training.")]
MethodOption = Annotated[
    str | None, typer.Option(help=f"One of {', '.join(METHODS)}.", autocompletion=completion.methods)
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="Storage format of weights: float32, bfloat16, int12, int8 or int4. Default: the method's. "
        "A recipe can name single weights: weights: {default: int4, lm_head: int8}.",
    ),
]
OffloadOption = Annotated[
    bool,
    typer.Option(
        "--offload",
        help="Keep the layers in the host's memory and stream them through the GPU. "
        "For some of them: --set offload='{layers: 12}'.",
    ),
]
OutputOption = Annotated[str | None, typer.Option(help="Folder for the model and run.json.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: training.max_steps=100. Repeatable."),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint in the output folder.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the output folder.")]
ProcessesOption = Annotated[int, typer.Option(min=1, help="Processes to start on this machine: one per GPU.")]
TrustRemoteCodeOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that comes with the model; read it first.")
]
AllowPickleOption = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Load pickled weights if the model has no safetensors."),
]
