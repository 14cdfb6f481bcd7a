"""`sbft prepare-data`: tokenize the text of a pretraining recipe before it is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbft.cli.pretrain import FreshModelOption, RecipeOfText, TextOption
from sbft.cli.shared.options import SetOption
from sbft.cli.shared.recipe import recipe_of
from sbft.cli.shared.starting import loading_libraries
from sbft.cli.shared.verb import verb


@verb
def prepare_data(
    recipe: RecipeOfText = None,
    model: FreshModelOption = None,
    data: TextOption = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Folder for the tokens; default: sbft's cache.")
    ] = None,
    overrides: SetOption = None,
) -> None:
    """Tokenize the text that a pretraining recipe trains on.

    Text from the hub is streamed until there are as many tokens as the recipe trains on. If it is interrupted, the same
    command continues, and the result is the same to the byte.
    """
    settings = recipe_of(recipe, overrides, pretraining=True, model=model, data=data)
    with loading_libraries():
        from rich.console import Console

        from sbft.runs.token_data import prepare_data as prepare
    console = Console(highlight=False)
    files = prepare(settings, to, say=lambda line: console.print(line, markup=False, soft_wrap=True))
    console.print(
        f"{files.tokens['train']:,} tokens to train on and {files.tokens['validation']:,} for validation are in "
        f"{files.folder}, with their tokenizer of {files.vocabulary:,} tokens.",
        markup=False,
        soft_wrap=True,
    )
    if to is not None:
        console.print(f"Next: sbft pretrain RECIPE --data {files.folder}", markup=False, soft_wrap=True)
