"""`sbft pretrain`: train a new model, or a checkpoint further, on every token of a text."""

from __future__ import annotations

from typing import Annotated

import typer

from sbft.cli.shared import completion
from sbft.cli.shared.options import (
    MethodOption,
    OutputOption,
    OverwriteOption,
    ProcessesOption,
    ResumeOption,
    SetOption,
)
from sbft.cli.shared.recipe import recipe_of
from sbft.cli.shared.verb import verb
from sbft.cli.train import train_recipe

RecipeOfText = Annotated[
    str | None,
    typer.Argument(
        metavar="RECIPE",
        help="YAML file, or a recipe that ships with sbft: pretrain-stdlib.",
        autocompletion=completion.recipes_of_text,
    ),
]
FreshModelOption = Annotated[
    str | None, typer.Option(help="scratch:1m (or 0.4m, 3m, 30m, 124m, 1.3b), or a checkpoint.")
]
TextOption = Annotated[
    str | None, typer.Option(help="builtin:python-stdlib, a local file, a hub id, or a folder of prepared tokens.")
]


@verb
def pretrain(
    recipe: RecipeOfText = None,
    model: FreshModelOption = None,
    data: TextOption = None,
    method: MethodOption = None,
    output_dir: OutputOption = None,
    overrides: SetOption = None,
    resume: ResumeOption = False,
    overwrite: OverwriteOption = False,
    num_processes: ProcessesOption = 1,
) -> None:
    """Train a new model, or a checkpoint further, on plain text.

    Type sbft pretrain RECIPE, or sbft pretrain --model scratch:1m --data builtin:python-stdlib.

    Works as sbft train does, with the defaults of pretraining: 20 tokens per parameter, examples of 512 tokens, 5% of
    warm-up, then a cosine to zero, and a second moment with a half-life of 10 million tokens.
    """
    settings = recipe_of(
        recipe, overrides, pretraining=True, model=model, data=data, method=method, output_dir=output_dir
    )
    train_recipe(settings, resume=resume, overwrite=overwrite, num_processes=num_processes)
