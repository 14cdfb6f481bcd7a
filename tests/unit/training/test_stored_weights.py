"""Weights in 4, 8 and 12 bits in the trainer and in recipes: what is on a grid, what is saved, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from sbft import SmallBatchTrainer, SmallBatchTrainingArguments, load_recipe, run
from sbft.errors import ModelError, RecipeError
from sbft.grid.weight import GridWeight
from sbft.recipe import resolve
from sbft.runs.record import RunRecord
from sbft.training.arguments import ArgumentError
from tests.tiny import save_tiny, tiny_model
from tests.unit.grid.cases import stored

ROWS = [{"input_ids": [5 + i % 7, 6, 7, 8 + i % 3], "labels": [5 + i % 7, 6, 7, 8 + i % 3]} for i in range(24)]
BITS = {"int12": 12, "int8": 8, "int4": 4}


def train(folder: Path, model: PreTrainedModel, resume: bool = False, **arguments: Any) -> SmallBatchTrainer:
    defaults = {"learning_rate": 3e-3, "max_steps": 8, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = SmallBatchTrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    trainer = SmallBatchTrainer(model, args, train_dataset=Dataset.from_list(ROWS))
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@pytest.mark.parametrize("form", BITS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_matrices_are_trained_on_the_grid_and_saved_as_bfloat16(tmp_path: Path, form: str, kind: str) -> None:
    model = tiny_model(kind, hidden=128)
    before = sum(parameter.numel() for parameter in model.parameters())
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = train(tmp_path, model, weights=form)
    on_grid = {name: p for name, p in model.named_parameters() if isinstance(p, GridWeight)}
    assert all((p.dim() >= 2) == (name in on_grid) for name, p in model.named_parameters() if p.numel() >= 4096)
    assert sum(p.numel() for p in on_grid.values()) > 0.9 * before
    stored_bytes = sum(tensor.nbytes for p in on_grid.values() for tensor in p.quantized.tensors.values())
    blocks = 32 if form == "int4" else 128
    assert stored_bytes == sum(p.numel() for p in on_grid.values()) * (BITS[form] / 8 + 2 / blocks)
    trainer.save_model(str(tmp_path / "model"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    for name, parameter in saved.named_parameters():
        assert parameter.dtype == torch.bfloat16
        trained = on_grid[name].dequantize() if name in on_grid else model.get_parameter(name)
        assert torch.equal(parameter, trained)
    moved = [name for name in on_grid if not torch.equal(on_grid[name].dequantize(), start[name])]
    assert len(moved) == len(on_grid)


@pytest.mark.parametrize("form", [*BITS, {"default": "int4", "lm_head": "int8", "*.layers.0.mlp": "bfloat16"}])
def test_a_resumed_run_ends_in_the_same_codes(tmp_path: Path, form: Any) -> None:
    whole = tiny_model("llama", hidden=128, tied=False)
    train(tmp_path / "whole", whole, weights=form)
    first = tiny_model("llama", hidden=128, tied=False)
    train(tmp_path / "parts", first, weights=form, max_steps=5, save_strategy="steps", save_steps=5)
    resumed = tiny_model("llama", hidden=128, tied=False, seed=9)  # its own weights do not matter
    train(tmp_path / "parts", resumed, resume=True, weights=form)
    expected, got = stored(whole), stored(resumed)
    assert expected.keys() == got.keys() and all(torch.equal(expected[name], got[name]) for name in expected)
    if isinstance(form, dict):
        kinds = {name: getattr(getattr(p, "grid", None), "name", "bfloat16") for name, p in resumed.named_parameters()}
        assert kinds["lm_head.weight"] == "int8" and kinds["model.layers.1.mlp.up_proj.weight"] == "int4"
        assert kinds["model.layers.0.mlp.up_proj.weight"] == "bfloat16"


def test_a_float32_model_is_cast_before_it_goes_on_the_grid(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    train(tmp_path, model, weights="int8", max_steps=1)
    assert isinstance(model.lm_head.weight, GridWeight)
    kept = tiny_model("llama", dtype=torch.float32)
    train(tmp_path, kept, weights="float32", max_steps=1)
    assert kept.lm_head.weight.dtype == torch.float32
    with pytest.raises(ModelError, match="are float32, but only bfloat16 can be put on a grid"):
        train(tmp_path, tiny_model("llama", dtype=torch.float32), weights="int8", cast_weights=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"weights": "int5"}, "'int5'"),
        ({"weights": {"lm_head": "in8"}}, "Did you mean int8"),
        ({"weights": "int8", "token_optimizer": None}, "only sbft's optimizers update"),
        ({"weights": "int8", "torch_compile": True}, "torch_compile=True does not support weights in int8"),
    ],
)
def test_arguments_that_cannot_be_trained_are_refused(tmp_path: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        SmallBatchTrainingArguments(output_dir=str(tmp_path), **arguments)


def test_a_pattern_that_names_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="'lm_haed' of `weights` matches no weight"):
        train(tmp_path, tiny_model("llama", tied=False), weights={"default": "int4", "lm_haed": "int8"})


def recipe(folder: Path, **changes: Any) -> Path:
    file = folder / "recipe.yaml"
    data = folder / "data.jsonl"
    data.write_text("".join(f'{{"prompt": "What is {n} and {n}?", "completion": "{2 * n}"}}\n' for n in range(12)))
    import yaml

    content = {
        "model": str(folder / "model"),
        "data": {"train": str(data), "eval": str(data), "allow_overlap": True},
        "training": {"max_steps": 4},
        "evaluation": {"limit": 4},
        "output_dir": str(folder / "out"),
        **changes,
    }
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.parametrize("form", BITS)
def test_a_recipe_trains_on_the_grid_and_records_it(tmp_path: Path, form: str) -> None:
    save_tiny(tmp_path / "model", hidden=128)
    by_method = resolve(load_recipe(recipe(tmp_path, method=f"sbft-{form}")))
    by_key = resolve(load_recipe(recipe(tmp_path, weights=form)))
    assert by_method.weights == by_key.weights == form and by_method.dtype == "bfloat16"
    record = run(load_recipe(recipe(tmp_path, method=f"sbft-{form}")))
    plain = run(load_recipe(recipe(tmp_path)), overwrite=True)
    assert record.status == "ok" and record.recipe["weights"] == form
    assert record.memory["weights"] < plain.memory["weights"] * (BITS[form] / 16 + 0.08)
    assert RunRecord.load(tmp_path / "out").recipe.get("weights") is None
    assert abs(record.metrics_before["loss"] - plain.metrics_before["loss"]) < (0.3 if form == "int4" else 0.02)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": "int7"}, "weights"),
        ({"weights": "int8", "dtype": "float32"}, "compute in bfloat16"),
        ({"weights": "float32", "dtype": "bfloat16"}, "is float32, but dtype is bfloat16"),
        ({"weights": "int8", "method": "hf-adafactor"}, "the optimizer of method hf-adafactor cannot update it"),
        ({"weights": "int8", "method": "lora"}, "the optimizer of method lora cannot update it"),
        ({"weights": "int4", "distributed": {"fsdp_size": 2}}, "distributed shards weights in bfloat16 or float32"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(recipe(tmp_path, **changes))


def test_a_format_that_is_a_dtype_is_the_dtype(tmp_path: Path) -> None:
    assert resolve(load_recipe(recipe(tmp_path, weights="float32"))).dtype == "float32"
    assert resolve(load_recipe(recipe(tmp_path, weights="bfloat16"))).grids is None
