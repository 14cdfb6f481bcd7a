"""`sbft recipes`: list, show and copy the recipes that ship with sbft."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sbft.cli.shared import completion
from sbft.cli.shared.starting import starting
from sbft.cli.shared.verb import verb

if TYPE_CHECKING:
    from sbft.recipe import Recipe

app = typer.Typer(
    help="List, show and copy the recipes that ship with sbft.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("ls")
def ls() -> None:
    """List the recipes by model family, with what each does."""
    from sbft.files import recipe_families, summary_of_recipe

    families = recipe_families()
    column = max(len(name) for names in families.values() for name in names) + 2
    for family, names in families.items():
        if family:
            print(f"\n{family}:")
        for name in names:
            print(_in_columns(name, summary_of_recipe(name), column))
    print("\nNext: sbft train quickstart\n\nTo change a recipe first, type: sbft recipes cp quickstart my.yaml")
    print(
        "\nGiB are peaks of GPU memory that sbft plan predicts for the recipe as it is: with gradient checkpointing where the "
        "recipe sets it."
    )


def _in_columns(name: str, text: str, column: int) -> str:
    """One line; on a terminal, wrapped at its width between words."""
    import shutil
    import textwrap

    if not sys.stdout.isatty():
        return f"{name:<{column}}{text}"
    width = max(shutil.get_terminal_size().columns, 2 * column)
    return textwrap.fill(text, width, initial_indent=f"{name:<{column}}", subsequent_indent=" " * column)


@app.command("show")
@verb
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME|FILE", help="Name of a recipe, or a YAML file.", autocompletion=completion.recipes_and_files
        ),
    ],
    resolved: Annotated[
        bool, typer.Option("--resolved", help="All settings, with those that the method fills in.")
    ] = False,
) -> None:
    """Print a recipe, or with --resolved all of its settings."""
    if resolved:
        with starting():
            from sbft.recipe import load_recipe
        print(_resolved_text(load_recipe(name), name), end="")
        return
    from sbft.recipe.draft import source_text

    print(source_text(name)[0], end="")


def _resolved_text(recipe: Recipe, source: str) -> str:
    """Every setting as YAML that runs like the recipe. It begins with the command, as recipes do."""
    from sbft.recipe import for_pretraining, resolve
    from sbft.recipe.pretraining import is_pretraining

    pretrains = is_pretraining(recipe.model_dump(exclude_unset=True))
    verb = "pretrain" if pretrains else "train"
    full = resolve(for_pretraining(recipe) if pretrains else recipe)
    return f"# sbft {verb} {source}\n# All settings, with those that sbft {verb} fills in.\n\n{full.to_yaml()}"


@app.command("cp")
@verb
def cp(
    name: Annotated[str, typer.Argument(help="Name of a recipe.", autocompletion=completion.recipes)],
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="File or folder to copy it to.")],
) -> None:
    """Copy a recipe to a file of your own.

    An existing file is never overwritten.
    """
    from sbft.errors import RecipeError
    from sbft.files import verb_of_recipe
    from sbft.recipe.draft import recipe_text

    text = recipe_text(name)
    target = destination / f"{name}.yaml" if destination.is_dir() else destination
    if target.exists():
        raise RecipeError(f"{target} already exists. Choose another name, or remove it first.")
    if not target.parent.is_dir():
        raise RecipeError(f"There is no folder {target.parent}. Type: mkdir -p {target.parent}")
    target.write_text(text, encoding="utf-8")
    print(f"Wrote {target}. Next: sbft {verb_of_recipe(name)} {target}")
