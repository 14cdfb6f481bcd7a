"""The gallery of recipes: each does what its name says, and its head has the predictions of `sbft plan`.

Predicting all of them takes minutes, so only the peak of one recipe per model and two whole recipes are predicted here.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from sbft import files
from sbft.models.random_weights import is_random
from sbft.planning.memory.fit import make_plan
from sbft.recipe import load_recipe, recipe_text, resolve
from scripts import recipe_gallery as gallery

METHODS = {"full": "sbft", "lora": "lora", "qlora": "qlora"}
SMALL, LARGE = "smollm2-360m-full", "mistral-7b-full"
PEAKS = [name for name in gallery.names() if name.endswith("-full")] + ["mistral-7b-lora", "mistral-7b-qlora"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads are predicted for cuBLAS's largest workspace; a GPU in this machine would report its own size."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)



@pytest.mark.parametrize("name", gallery.names())
def test_a_recipe_is_what_its_name_says(name: str) -> None:
    recipe = resolve(load_recipe(name))
    shape, _, method = name.rpartition("-")
    _, random_model = gallery.SHAPES[recipe.model]
    assert recipe.method == METHODS[method] and recipe.output_dir == f"runs/{name}"
    assert random_model.removesuffix("-vision") == f"random:{shape}" and is_random(random_model)
    assert recipe.data.train == "my.jsonl"
    assert recipe.training["gradient_checkpointing"] is (billions(shape) >= 3)


def billions(shape: str) -> float:
    """Billions of weights of a model, according to its name."""
    if shape == "phi4-mini":
        return 3.8
    size = shape.rpartition("-")[2]
    return float(size[:-1]) / {"b": 1, "m": 1000}[size[-1]]


@pytest.mark.parametrize("name", gallery.names())
def test_a_head_says_the_same_everywhere(name: str) -> None:
    text, recipe = recipe_text(name), load_recipe(name)
    fit = gallery.read_fit(text)
    assert gallery.head(name, recipe, fit) + gallery.body(text) == text
    peaks = sorted([float(fit.peak), float(fit.other_peak)])
    assert float(fit.peak) == peaks[0 if gallery.checkpoints(recipe) else 1]
    fitting = [0 if tokens is None else tokens for tokens in fit.longest]
    assert len(fitting) == len(gallery.MEMORY_GIB) and fitting == sorted(fitting)
    # The recipe fits exactly where a sequence of its length fits.
    for size, tokens in zip(gallery.MEMORY_GIB, fitting, strict=True):
        assert (tokens >= recipe.data.max_length) == (float(fit.peak) <= size)


def test_every_model_has_a_recipe_of_every_method() -> None:
    recipes = [load_recipe(name) for name in gallery.names()]
    pairs = Counter((recipe.model, recipe.method) for recipe in recipes)
    assert pairs == Counter((model, method) for model in gallery.SHAPES for method in METHODS.values())


@pytest.mark.parametrize("name", PEAKS)
def test_the_peak_of_each_model_is_what_is_predicted_now(name: str) -> None:
    recipe = load_recipe(name)
    assert gallery.peak(recipe, gallery.checkpoints(recipe)) == gallery.read_fit(recipe_text(name)).peak


def test_a_whole_head_is_what_is_predicted_now() -> None:
    assert gallery.predict(load_recipe(LARGE)) == gallery.read_fit(recipe_text(LARGE))


def test_a_head_is_what_the_plan_says() -> None:
    recipe, fit = load_recipe(SMALL), gallery.read_fit(recipe_text(SMALL))
    plan = make_plan(
        gallery.SHAPES[recipe.model][1],
        sequence_length=recipe.data.max_length,
        memory_bytes=8 * gallery.GIBIBYTE,
        device="cuda",
        methods=[recipe.method],
    )
    resident = [row for row in plan.rows if not row.offload]
    peaks = {row.checkpointing: gallery.gib(row.prediction.needed_bytes) for row in resident if row.prediction}
    own = gallery.checkpoints(recipe)
    assert peaks == {own: fit.peak, not own: fit.other_peak}
    longest = next(row.longest for row in resident if row.checkpointing is own)
    written = fit.longest[gallery.MEMORY_GIB.index(8)]
    assert longest is not None and written is not None
    # Each length is at most 16 tokens or 2 % below what would still fit.
    assert abs(longest - written) <= max(16, 0.02 * max(longest, written))


def test_the_page_shows_the_heads() -> None:
    text = gallery.PAGE.read_text(encoding="utf-8")
    assert gallery.page(text) == text
    assert all(f"`{name}`" in text for name in gallery.names())


def test_the_package_is_looked_in_before_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shipped(folder: str) -> str:
        (tmp_path / folder / "family").mkdir(parents=True)
        path = tmp_path / folder / "family" / "mine-full.yaml"
        path.write_text(f"# sbft train mine-full\n# From {folder}.\n")
        files._shipped.cache_clear()
        return files.summary_of_recipe("mine-full")

    monkeypatch.setattr(files, "_PACKAGE", tmp_path / "sbft")
    try:
        assert shipped("recipes") == "From recipes."
        assert shipped("sbft/recipes") == "From sbft/recipes."
        assert files.recipe_families() == {"": [], "family": ["mine-full"]}
    finally:
        files._shipped.cache_clear()
