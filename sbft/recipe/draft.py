"""A recipe before it is checked: nested dicts, and where each key was written."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from sbft.errors import RecipeError
from sbft.files import shipped_file, shipped_names
from sbft.recipe.defaults import EXCLUSIVE
from sbft.recipe.wording import shown

Key = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2 does: PyYAML itself reads 1e-4 as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"), list("-+0123456789.")
)


_STRATEGIES = ("eval_strategy", "logging_strategy", "save_strategy")
"""Keys of TrainingArguments that may be `no`."""
_MOST_NODES = 100_000
"""Limit on the keys and values of a text, each counted as often as an alias repeats it."""
_DEEPEST = 50


def read_yaml(text: str) -> Any:
    """Parse YAML into dicts, lists and scalars.

    Raises:
        yaml.YAMLError: if it is not valid YAML, or has what no recipe needs: custom tags, hundreds of levels, or aliases that
            repeat one another endlessly.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _nodes_below(node, (), {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise yaml.YAMLError(f"found more than {_DEEPEST} nested levels") from error
    except (ValueError, OverflowError) as error:
        # PyYAML passes on errors of int() and datetime(), as for 2026-13-45 or numbers of thousands of digits.
        raise yaml.YAMLError(f"found an invalid number or date ({error}); quote it if it is text") from error
    finally:
        loader.dispose()


def _nodes_below(node: yaml.Node, above: tuple[int, ...], known: dict[int, int]) -> int:
    """How many nodes a node expands to: itself and everything below it, including what aliases repeat."""
    if id(node) in known:
        return known[id(node)]
    if id(node) in above:
        raise yaml.YAMLError("found an alias inside the value that it refers to")
    if len(above) == _DEEPEST:
        raise yaml.YAMLError(f"found more than {_DEEPEST} nested levels")
    inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
    count = 1
    if not isinstance(node, yaml.ScalarNode):
        count += sum(_nodes_below(child, (*above, id(node)), known) for child in inner)
    if count > _MOST_NODES:
        raise yaml.YAMLError(f"found more than {_MOST_NODES:,} keys and values, including those that aliases repeat")
    known[id(node)] = count
    return count


FLAGS: dict[str, Key] = {
    "model": ("model",),
    "method": ("method",),
    "weights": ("weights",),
    "offload": ("offload",),
    "data": ("data", "train"),
    "eval_data": ("data", "eval"),
    "output_dir": ("output_dir",),
    "trust_remote_code": ("trust_remote_code",),
    "allow_pickle": ("allow_pickle",),
}
"""Flags of `sbft train`, and the key that each sets."""


def recipe_names() -> list[str]:
    """Names of the recipes that ship with sbft."""
    return shipped_names("recipes")


def recipe_text(name: str) -> str:
    """The YAML of a recipe that ships with sbft.

    Raises:
        RecipeError: if there is none of that name.
    """
    if name not in recipe_names():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(
            f"There is no recipe {name!r}: expected a YAML file or the name of a recipe that ships with sbft.{hint} "
            "Type `sbft recipes ls` to see them all."
        )
    return shipped_file("recipes", name).read_text(encoding="utf-8")


_IN_PLAIN_WORDS = (
    (
        "mapping values are not allowed",
        "a second `key:` on one line, or a line indented too far; correct it, or quote the text",
    ),
    ("character '\\t'", "a tab; indent with spaces"),
    ("expected <block end>", "an indentation that does not fit the lines above it"),
    ("could not find expected ':'", "text that is no `key: value`; put a colon and a space after the key"),
    ("expected ',' or ']'", "a list that is not closed; write ] at its end"),
    ("expected ',' or '}'", "a brace that is not closed; write } at its end"),
    ("found unexpected end of stream", "a quotation mark that is not closed; write it at the end of the text"),
    (
        "could not determine a constructor for the tag",
        "a tag (a word that begins with !), which recipes do not have; remove it, or quote the text",
    ),
    ("found unhashable key", "a list or a mapping as a key; write a word there"),
)
"""Messages of PyYAML, and what they mean to the author of a recipe."""


def _where_and_what(error: yaml.YAMLError) -> str:
    """Line, column and cause of a mistake in YAML."""
    if isinstance(error, yaml.reader.ReaderError):
        return f"is not valid YAML: found the character {chr(error.character)!r}, which is not allowed in text."
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem is None:
        return f"is not valid YAML: {' '.join(str(error).split())}."
    mark = error.problem_mark or error.context_mark
    where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    found = next((words for part, words in _IN_PLAIN_WORDS if part in error.problem), error.problem)
    begun = error.context_mark
    since = f" (it began on line {begun.line + 1})" if begun and mark and begun.line != mark.line else ""
    return f"{where.strip()} is not valid YAML: found {found.removeprefix('found ')}{since}.".strip()


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}.") from error


def source_text(source: str | Path) -> tuple[str, str]:
    """The YAML of a file or of a recipe that ships with sbft, and its name for messages.

    Raises:
        RecipeError: if there is none, or it is not text.
    """
    path = Path(source)
    if path.is_file():
        return _file_text(path), str(source)
    if path.suffix in {".yaml", ".yml"} or len(path.parts) > 1:
        raise RecipeError(
            f"There is no file {str(source)!r}. Type the path of a YAML file, or one of the recipes that ship with "
            "sbft: `sbft recipes ls` shows them."
        )
    return recipe_text(str(source)), f"recipe {source}"


class Draft:
    """The content of a recipe as nested dicts, with the origin of each key."""

    def __init__(self, content: dict[str, Any], name: str) -> None:
        self.content = content
        self.name = name
        self.problems: list[str] = []
        """Problems found while reading."""
        self._origins: dict[Key, str] = {}

    @classmethod
    def read(cls, source: str | Path) -> Draft:
        """Read a YAML file, or a recipe that ships with sbft.

        Raises:
            RecipeError: if there is none, or it is not YAML, or not a mapping of keys to values.
        """
        text, name = source_text(source)
        try:
            content = read_yaml(text)
            # Composed again, because constructing merges what `<<` names into the mapping itself.
            tree = yaml.compose(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"{name} {_where_and_what(error)}") from error
        if not isinstance(content, dict):
            raise RecipeError(
                f"{name} contains {'nothing' if content is None else 'a ' + type(content).__name__}, expected keys and "
                "values such as `model: builtin:smollm2-135m`. Type `sbft recipes show quickstart` to see a recipe."
            )
        draft = cls(content, name)
        draft._note_lines(tree, ())
        return draft

    def _note_lines(self, node: yaml.Node | None, at: Key) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key_node, value_node in node.value:
            key, line = (*at, str(key_node.value)), key_node.start_mark.line + 1
            if key in self._origins:
                self.problems.append(
                    f"{self.name} line {line}: {'.'.join(key)} is given twice; it is already in {self._origins[key]}. "
                    "Keep one."
                )
            self._origins[key] = f"{self.name} line {line}"
            self._note_lines(value_node, key)

    def origin(self, key: Key) -> str:
        """Where the key, or the nearest one above it, was written: `my.yaml line 3`, `--set data.train`."""
        for length in range(len(key), 0, -1):
            if key[:length] in self._origins:
                return self._origins[key[:length]]
        return self.name

    def apply_flags(self, flags: dict[str, Any]) -> None:
        """Apply the flags of the command line; None means not given."""
        for flag, value in flags.items():
            if value is not None:
                self._set(FLAGS[flag], value, f"--{flag.replace('_', '-')}")

    def apply_overrides(self, overrides: list[str]) -> None:
        """Apply each `a.b=c`, its value read as YAML; what cannot be read becomes a problem."""
        for override in overrides:
            path, equals, text = override.partition("=")
            key = tuple(part.strip() for part in path.split("."))
            if not equals or not all(key):
                self.problems.append(
                    f"--set {shown(override)}: expected KEY=VALUE, such as training.learning_rate=1e-4."
                )
                continue
            try:
                value = read_yaml(text)
            except yaml.YAMLError:
                self.problems.append(
                    f"--set {path.strip()}: {shown(text)} is not a YAML value; quote it if it is text."
                )
                continue
            self._set(key, value, f"--set {path.strip()}")
            if value not in (None, -1):
                self._drop_rival(key)

    def read_no_as_a_word(self) -> None:
        """Where `no` is a value of a strategy, YAML's false, which it reads an unquoted no as, becomes that word."""
        training = self.content.get("training")
        if isinstance(training, dict):
            training.update({name: "no" for name in _STRATEGIES if training.get(name) is False})

    def _drop_rival(self, key: Key) -> None:
        """Remove the rival of a setting: an override of max_steps replaces the file's number of epochs."""
        for section, one, other in (*EXCLUSIVE, ("data", "train_tokens", "tokens_per_parameter")):
            for own, rival in ((one, other), (other, one)):
                origin = self._origins.get((section, rival), "")
                if key == (section, own) and not origin.startswith("--set"):
                    self.content[section].pop(rival, None)

    def _set(self, key: Key, value: Any, origin: str) -> None:
        section = self.content
        for depth, part in enumerate(key[:-1], 1):
            inner = section.get(part)
            if inner is None:
                inner = section[part] = {}
            if not isinstance(inner, dict):
                self.problems.append(
                    f"{origin}: {'.'.join(key[:depth])} is {shown(inner)}, which has no keys."
                )
                return
            section = inner
        section[key[-1]] = value
        self._origins[key] = origin
