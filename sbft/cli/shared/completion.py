"""What the shell offers when the name of a recipe, a suite or a method is expected.

Every press of the tab key starts a process, so this imports nothing heavy. If nothing is returned, the shell completes file
names itself.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterable
from pathlib import Path

from sbft.files import Kind, shipped_names, summary_of_recipe, verb_of_recipe
from sbft.recipe.methods import METHODS

Offer = tuple[str, str]
"""A word, and a sentence on it, which zsh and fish show beside the word."""
_YAML = (".yaml", ".yml")
_LONGEST = 72
"""Characters of such a sentence. Typer wraps what is wider than the terminal, and fish takes the second line for a word."""


def recipes(incomplete: str) -> list[Offer]:
    """Recipes that ship with sbft."""
    return [(name, _in_short(summary_of_recipe(name))) for name in _beginning(incomplete, "recipes")]


def recipes_and_files(incomplete: str) -> list[Offer]:
    """The same, and YAML files."""
    return _with_files(recipes(incomplete), incomplete)


def recipes_of_text(incomplete: str) -> list[Offer]:
    """Recipes of pretraining that ship with sbft, and YAML files."""
    shipped = [offer for offer in recipes(incomplete) if verb_of_recipe(offer[0]) == "pretrain"]
    return _with_files(shipped, incomplete)


def suites_and_files(incomplete: str) -> list[Offer]:
    """Suites that ship with sbft, and YAML files."""
    return _with_files([(name, "") for name in _beginning(incomplete, "suites")], incomplete)


def methods(incomplete: str) -> list[Offer]:
    """Methods."""
    return [(name, _in_short(method.summary)) for name, method in METHODS.items() if name.startswith(incomplete)]


def lists_of_methods(incomplete: str) -> list[Offer]:
    """Methods after those that are already in a comma-separated list."""
    listed, comma, last = incomplete.rpartition(",")
    return [
        (f"{listed}{comma}{name}", summary) for name, summary in methods(last) if name not in listed.split(",")
    ]


def _beginning(incomplete: str, kind: Kind) -> Iterable[str]:
    return (name for name in shipped_names(kind) if name.startswith(incomplete))


def _in_short(sentence: str) -> str:
    return textwrap.shorten(re.split(r"[:;.] ", sentence)[0], _LONGEST, placeholder=" …")


def _with_files(shipped: list[Offer], incomplete: str) -> list[Offer]:
    offers = [*shipped, *((name, "") for name in _files(incomplete))]
    # A shell adds a space after a single offer, but not after a folder that it completes itself.
    return [] if len(offers) == 1 and offers[0][0].endswith("/") else offers


def _files(incomplete: str) -> Iterable[str]:
    """YAML files, and once something is typed, folders too."""
    above, slash, start = incomplete.rpartition("/")
    try:
        entries = sorted(Path(above + slash or ".").expanduser().iterdir())
    except OSError:
        return
    for entry in entries:
        # Hidden files only if a dot is typed. bash does not quote what it inserts, so nothing that needs quotes.
        hidden = entry.name.startswith(".") and not start
        if not entry.name.startswith(start) or hidden or shlex.quote(entry.name) != entry.name:
            continue
        if entry.suffix in _YAML and entry.is_file():
            yield f"{above}{slash}{entry.name}"
        elif incomplete and entry.is_dir():
            yield f"{above}{slash}{entry.name}/"
