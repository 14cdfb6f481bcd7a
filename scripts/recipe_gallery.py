"""The recipes of recipes/FAMILY/: what `sbft plan` predicts for each is written at its head, and into docs/gallery.md.

    python scripts/recipe_gallery.py                     write all heads and the page
    python scripts/recipe_gallery.py qwen3-4b-full       those of some recipes alone, and the page
    python scripts/recipe_gallery.py --check [NAME ...]  write nothing; exit code 1 where a head or the page would change

A recipe's head is its comment above the first key. The rest of the file is written by hand. Nothing is downloaded: each
checkpoint is planned as the `random:` model of its shape. A GPU older than Hopper would change the figures a little: hide it
with CUDA_VISIBLE_DEVICES="".
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sbft.files import recipe_families, shipped_file
from sbft.models.load import load_config
from sbft.planning.memory.fit import longest_that_fits
from sbft.planning.memory.predict import predict_recipe
from sbft.recipe import Recipe, load_recipe, resolve

GIBIBYTE = 1 << 30
MEMORY_GIB = (8, 12, 16, 24, 80)
PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"

SHAPES = {
    "google/gemma-3-1b-it": ("Gemma 3 1B", "random:gemma3-1b"),
    "google/gemma-3-4b-it": ("Gemma 3 4B", "random:gemma3-4b-vision"),
    "meta-llama/Llama-3.1-8B-Instruct": ("Llama 3.1 8B", "random:llama3.1-8b"),
    "meta-llama/Llama-3.2-1B-Instruct": ("Llama 3.2 1B", "random:llama3.2-1b"),
    "meta-llama/Llama-3.2-3B-Instruct": ("Llama 3.2 3B", "random:llama3.2-3b"),
    "mistralai/Mistral-7B-Instruct-v0.3": ("Mistral 7B v0.3", "random:mistral-7b"),
    "microsoft/Phi-4-mini-instruct": ("Phi-4-mini", "random:phi4-mini"),
    "Qwen/Qwen3-0.6B": ("Qwen3 0.6B", "random:qwen3-0.6b"),
    "Qwen/Qwen3-1.7B": ("Qwen3 1.7B", "random:qwen3-1.7b"),
    "Qwen/Qwen3-4B": ("Qwen3 4B", "random:qwen3-4b"),
    "Qwen/Qwen3-8B": ("Qwen3 8B", "random:qwen3-8b"),
    "HuggingFaceTB/SmolLM2-135M-Instruct": ("SmolLM2 135M", "random:smollm2-135m"),
    "HuggingFaceTB/SmolLM2-360M-Instruct": ("SmolLM2 360M", "random:smollm2-360m"),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": ("SmolLM2 1.7B", "random:smollm2-1.7b"),
    "HuggingFaceTB/SmolLM3-3B": ("SmolLM3 3B", "random:smollm3-3b"),
}
"""Each checkpoint's name in words, and the model of random weights that has its shape."""

WHAT = {"sbft": "All weights of", "lora": "LoRA of rank 16 on", "qlora": "QLoRA of rank 16 on"}
_TITLES = {
    "gemma": "Gemma", "llama": "Llama", "mistral": "Mistral", "phi": "Phi", "qwen": "Qwen", "smollm": "SmolLM",
}  # fmt: skip
_BEGIN, _END = "<!-- gallery: begin -->", "<!-- end -->"


@dataclass(frozen=True)
class Fit:
    """What `sbft plan` predicts for a recipe."""

    peak: str
    """GiB at the recipe's own length, as the plan prints it."""
    other_peak: str
    """The same with gradient checkpointing where the recipe has none, and without it where it has."""
    longest: tuple[int | None, ...]
    """Tokens of the longest sequence that fits in each of `MEMORY_GIB`; None where none does."""


def predict(recipe: Recipe) -> Fit:
    """What `sbft plan` predicts for the random model of a recipe's shape.

    Args:
        recipe: as it ships.
    """
    needed = _needed_by_length(recipe, checkpoints(recipe))
    known: dict[int, int] = {}

    def noted(tokens: int) -> int:
        known[tokens] = needed(tokens)
        return known[tokens]

    own_peak = gib(noted(recipe.data.max_length))
    at_most = load_config(SHAPES[recipe.model][1]).get_text_config().max_position_embeddings
    # What one size has shown is known to the next. As in the plan, a length is at most 2 % below what would still fit.
    longest = tuple(longest_that_fits(noted, size * GIBIBYTE, at_most, known) for size in MEMORY_GIB)
    return Fit(own_peak, peak(recipe, not checkpoints(recipe)), longest)


def peak(recipe: Recipe, checkpointing: bool) -> str:
    """What is needed at the recipe's own length alone, in GiB."""
    return gib(_needed_by_length(recipe, checkpointing)(recipe.data.max_length))


def checkpoints(recipe: Recipe) -> bool:
    """Whether a recipe sets gradient checkpointing."""
    return bool(recipe.training["gradient_checkpointing"])


def _needed_by_length(recipe: Recipe, checkpointing: bool) -> Callable[[int], int]:
    shape = SHAPES[recipe.model][1]
    training = {**recipe.training, "gradient_checkpointing": checkpointing}
    whole = resolve(recipe.model_copy(update={"model": shape, "training": training}))
    config = load_config(shape)
    return lambda tokens: predict_recipe(whole, longest=tokens, device="cuda", config=config).needed_bytes


def head(name: str, recipe: Recipe, fit: Fit) -> str:
    """The comment at the head of a recipe: its command, its summary, and the predictions."""
    title = SHAPES[recipe.model][0]
    otherwise = "Without" if checkpoints(recipe) else "With"
    lines = [
        f"sbft train {name} --data my.jsonl",
        f"{WHAT[recipe.method]} {title}: {fit.peak} GiB for {recipe.data.max_length:,} tokens.",
        "",
        f"sbft plan --model {recipe.model} --methods {recipe.method} --gpu-memory 24GiB",
        f"predicts this peak. {otherwise} gradient checkpointing it is {fit.other_peak} GiB.",
        "The longest sequence that fits, in tokens:",
        "",
        "".join(f"{f'{size} GiB':>10}" for size in MEMORY_GIB),
        "".join(f"{tokens_in_words(tokens):>10}" for tokens in fit.longest),
    ]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def read_fit(text: str) -> Fit:
    """The predictions in the head of a recipe's text.

    Raises:
        ValueError: if it has no such head.
    """
    peak_line, other_line = r"# .*: (\S+) GiB for .*\n", r"# .* checkpointing it is (\S+) GiB\.\n"
    found = re.match(
        rf"#.*\n{peak_line}(?:#.*\n)*?{other_line}(?:#.*\n)*?# +{MEMORY_GIB[0]} GiB .*\n#(.*)\n", text
    )
    if found is None:
        raise ValueError("no predictions in the head: run scripts/recipe_gallery.py")
    longest = tuple(None if word == "-" else int(word.replace(",", "")) for word in found[3].split())
    return Fit(found[1], found[2], longest)


def body(text: str) -> str:
    """A recipe's text from its first key on, and what separates it from the head."""
    rest = re.search(r"^(?!#)", text, re.MULTILINE)
    assert rest is not None
    return text[rest.start() :]


def names() -> list[str]:
    """The recipes of the gallery."""
    return [name for family, members in recipe_families().items() if family for name in members]


def page(text: str) -> str:
    """docs/gallery.md with its tables as the heads of the recipes say."""
    lines: list[str] = []
    for family, members in recipe_families().items():
        if not family:
            continue
        sizes = " | ".join(f"{size} GiB" for size in MEMORY_GIB)
        lines += ["", f"## {_TITLES[family]}", "", f"| recipe | peak with checkpointing | without | {sizes} |"]
        lines += ["|---|--:|--:|" + "--:|" * len(MEMORY_GIB)]
        for name in members:
            fit = read_fit(shipped_file("recipes", name).read_text(encoding="utf-8"))
            ships_with = checkpoints(load_recipe(name))
            with_it, without = (fit.peak, fit.other_peak) if ships_with else (fit.other_peak, fit.peak)
            cells = [f"`{name}`", _bold(with_it, ships_with), _bold(without, not ships_with)]
            lines.append("| " + " | ".join([*cells, *map(tokens_in_words, fit.longest)]) + " |")
    before, _, rest = text.partition(_BEGIN)
    return before + _BEGIN + "\n" + "\n".join(lines) + "\n\n" + _END + rest.partition(_END)[2]


def main() -> None:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes of the gallery; all when none is named")
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    stale = []
    for name in arguments.names or names():
        path, recipe = shipped_file("recipes", name), load_recipe(name)
        text = path.read_text(encoding="utf-8")
        new = head(name, recipe, predict(recipe)) + body(text)
        stale += [name] if new != text else []
        if not arguments.check:
            path.write_text(new, encoding="utf-8")
        print(name, file=sys.stderr)
    text = PAGE.read_text(encoding="utf-8")
    if page(text) != text:
        stale.append(str(PAGE.name))
        if not arguments.check:
            PAGE.write_text(page(text), encoding="utf-8")
    if arguments.check and stale:
        sys.exit(f"Out of date: {', '.join(stale)}. Type: python scripts/recipe_gallery.py")


def gib(size_bytes: int) -> str:
    """Bytes in GiB, as `sbft plan` prints them."""
    size = size_bytes / GIBIBYTE
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"


def tokens_in_words(tokens: int | None) -> str:
    """With separators; a dash where none fit."""
    return "-" if tokens is None else f"{tokens:,}"


def _bold(text: str, bold: bool) -> str:
    return f"**{text}**" if bold else text


if __name__ == "__main__":
    main()
