"""docs/recipes.md and docs/reference.md: their tables match the schema and the settings; examples are valid recipes.

    python -m tests.unit.recipe.test_recipe_page

rewrites the tables.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from sbft.recipe import load_recipe
from sbft.recipe.draft import read_yaml
from sbft.recipe.schema import INNER_SECTIONS, SECTIONS, Recipe
from sbft.recipe.training_keys import training_types
from sbft.training.arguments import SmallBatchArguments

PAGE = Path(__file__).parents[3] / "docs" / "recipes.md"
REFERENCE = PAGE.with_name("reference.md")


def table(section: type[BaseModel]) -> str:
    """The table of a section: its keys that are not sections themselves, with defaults and meanings."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        if section is Recipe and (name in SECTIONS or name == "training"):
            continue
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        shown = "" if default in (None, [], {}) else f"`{yaml.safe_dump(default).split()[0]}`"
        shown = "required" if field.is_required() else shown
        lines.append(f"| `{name}` | {shown} | {' '.join((field.description or '').split()).rstrip('.')} |")
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """The text between the marks of each section."""
    inner = {name: section for (_, name), section in INNER_SECTIONS.items()}
    return {name: table(section) for name, section in {"top": Recipe, **SECTIONS, **inner}.items()}


def table_of_arguments() -> str:
    """The fields of SmallBatchArguments, with defaults and meanings."""
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    for field in fields(SmallBatchArguments):
        lines.append(f"| `{field.name}` | `{field.default!r}` | {field.metadata['help'].rstrip('.')} |")
    return "\n".join(lines)


def with_tables(text: str, rows_by_name: dict[str, str]) -> str:
    for name, rows in rows_by_name.items():
        begin, end = f"<!-- {name}: begin -->", "<!-- end -->"
        before, after = text.split(begin)
        text = f"{before}{begin}\n\n{rows}\n\n{end}{after.split(end, 1)[1]}"
    return text


def pages() -> dict[Path, str]:
    """Both pages with up-to-date tables."""
    tables_of_page = {PAGE: tables(), REFERENCE: {"arguments": table_of_arguments()}}
    return {page: with_tables(page.read_text(encoding="utf-8"), rows) for page, rows in tables_of_page.items()}


def test_the_tables_are_those_of_the_schema_and_of_the_settings() -> None:
    for page, text in pages().items():
        assert page.read_text(encoding="utf-8") == text, "type python -m tests.unit.recipe.test_recipe_page"
        assert not re.search(r"\|  \|$", text, re.MULTILINE), f"{page.name}: a key has no sentence"


def test_the_settings_of_training_exist() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("## training")[2].partition("## optimizer")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    names = [name for cell in cells for name in re.findall("`(.*?)`", cell)]
    assert len(names) > 10 and set(names) <= set(training_types())


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
def test_its_examples_are_recipes(text: str, tmp_path: Path) -> None:
    example = tmp_path / "example.yaml"
    example.write_text(yaml.safe_dump({"model": "m", "data": {"train": "d.jsonl"}} | read_yaml(text)), encoding="utf-8")
    assert load_recipe(example)


if __name__ == "__main__":
    for page, text in pages().items():
        page.write_text(text, encoding="utf-8")
