"""Streamed layers in recipes: what is refused before anything is loaded, and how much memory loading takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sbft.errors import ModelError, RecipeError
from sbft.models.load import load_model
from sbft.native.memory import PeakMemory
from sbft.native.sizes import gib
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.recipe.offload import Offload
from sbft.runs.run_recipe import run
from sbft.training.offload.stand_in import StandIn
from sbft.training.offload.streamed import StreamedModel
from tests.tiny import save_tiny, tiny_model
from tests.unit.training.offload.runs import on_links

ROWS = [{"prompt": f"What is {n} and {n}?", "completion": str(2 * n)} for n in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("offload")
    save_tiny(made / "model", layers=4)
    (made / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return made


def recipe_of(folder: Path, out: str, *overrides: str) -> Recipe:
    data = str(folder / "data.jsonl")
    flags = {"model": str(folder / "model"), "data": data, "eval_data": data, "output_dir": str(folder / out)}
    return load_recipe(None, ["training.max_steps=3", "data.allow_overlap=true", *overrides], **flags)


def test_a_run_ends_with_the_model_and_the_measurements_of_a_resident_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = run(recipe_of(folder, "resident"))
    on_links(monkeypatch)
    streamed = run(recipe_of(folder, "streamed", "offload=layers"))
    assert (streamed.status, streamed.metrics, streamed.tokens) == ("ok", resident.metrics, resident.tokens)
    assert streamed.recipe["offload"] == "layers"
    one, other = (load_file(folder / out / "model.safetensors") for out in ("resident", "streamed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_cpu_is_refused_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbft.runs.run_recipe.prepare_model", lambda *a: pytest.fail("it was loaded"))
    with pytest.raises(RecipeError, match="this run's device is cpu, which computes in the host's memory"):
        run(recipe_of(folder, "none", "offload=layers"))
    assert not (folder / "none").exists()


def test_too_little_memory_is_refused_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbft.runs.run_recipe.prepare_model", lambda *a: pytest.fail("it was loaded"))
    on_links(monkeypatch)
    layer = StreamedModel(tiny_model(layers=4), Offload(), StandIn()).schedule.layers[0].size_bytes
    for available, said in ((2.5 * layer, "offload='{layers: 2}'"), (layer / 2, "--weights int4")):
        monkeypatch.setattr("sbft.planning.check.offload.available_bytes", lambda device: available)  # noqa: B023
        with pytest.raises(ModelError) as told:
            run(recipe_of(folder, "none", "offload=layers"))
        assert f"4 layers take {gib(4 * layer)} of the host's memory" in str(told.value) and said in str(told.value)
    assert not (folder / "none").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["offload=layer"], "offload is 'layer', expected layers, or keys such as"),
        (["offload={layers: 0}"], "expected layers, or keys such as"),
        (["offload={layer: 3}"], "offload"),
        (["offload=layers", "method=hf-adafactor"], "updates all weights at once, after backward"),
        (["offload=layers", "method=adam"], "Write optimizer.gradient_release: true"),
        (["offload=layers", "optimizer.cuda_graphs=true"], "whose graphs hold addresses of weights"),
        (["offload=layers", "distributed={fsdp_size: 2}"], "is given with distributed, and works in one process"),
        (["offload=layers", "training.torch_compile=true"], "traces no hooks on layers"),
        (["offload={activations: true}"], "Write training.gradient_checkpointing: true"),
    ],
)
def test_a_recipe_that_cannot_be_offloaded_is_refused(folder: Path, overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        resolve(recipe_of(folder, "none", *overrides))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("layers", Offload("all", False)),
        ("{layers: 12}", Offload(12, False)),
        ("{layers: auto, activations: true}", Offload("auto", True)),
    ],
)
def test_a_recipe_says_which_layers_are_streamed(folder: Path, value: str, expected: Offload) -> None:
    whole = resolve(recipe_of(folder, "none", f"offload={value}", "training.gradient_checkpointing=true"))
    assert whole.offloaded == expected == resolve(whole).offloaded
    assert recipe_of(folder, "none").offloaded is None


@pytest.mark.parametrize("form", ["bfloat16", "int8"])
def test_loading_holds_no_layer_twice(form: str, tmp_path: Path) -> None:
    model: Any = tiny_model(layers=16, hidden=512)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    with PeakMemory() as memory:
        loaded = load_model(str(tmp_path), dtype=torch.bfloat16, in_host_memory=True)
        if form != "bfloat16":
            from sbft.grid.convert import put_on_grids

            put_on_grids(loaded, form)
        link = StandIn()
        StreamedModel(loaded, Offload(), link)
    if form == "bfloat16":
        with PeakMemory() as saving:
            loaded.save_pretrained(tmp_path / "saved")
        assert saving.peak_bytes - saving.baseline_bytes < size // 3
    stored = link.host_bytes + link.device_bytes
    above = memory.peak_bytes - memory.baseline_bytes
    assert size > 70 << 20 and above < stored + size // 3, (above >> 20, stored >> 20, size >> 20)
