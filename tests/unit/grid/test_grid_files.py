"""Weights on a grid in files: exact in checkpoints, and as a plain bfloat16 model."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from sbft.errors import ModelError
from sbft.grid.grid_files import FILES, has_grid_weights, holds_grid_weights, read_exact, save_dense, write_exact
from sbft.grid.update import apply_
from sbft.grid.weight import GridWeight
from tests.unit.grid.cases import FORMATS, bfloat16_model, dense_copy, grid_model, stored, tokens

KINDS = ("llama", "llama tied", "gpt2", "moe eager")


def erase(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros(parameter.shape))


def train(model: PreTrainedModel, steps: range) -> None:
    for step in steps:
        model(input_ids=tokens(seed=step), labels=tokens(seed=step), use_cache=False).loss.backward()
        for parameter in model.parameters():
            if isinstance(parameter, GridWeight) and parameter.grad is not None:
                apply_(parameter.quantized, parameter.grad, step=0.01, decay=0.0, key=(3, step))
                parameter.mark_changed()
            parameter.grad = None


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(kind: str, form: str, tmp_path: Path) -> None:
    model = grid_model(kind, form)
    train(model, range(2))
    write_exact(model, tmp_path, file_bytes=50_000)
    assert holds_grid_weights(tmp_path) and len(list(tmp_path.glob(FILES))) > 1
    resumed = grid_model(kind, form)
    erase(resumed)
    version = resumed.get_output_embeddings().weight._version
    read_exact(resumed, tmp_path)
    assert resumed.get_output_embeddings().weight._version > version
    for one in (model, resumed):
        train(one, range(2, 4))
    ours, theirs = stored(resumed), stored(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("form", FORMATS)
def test_a_checkpoint_takes_what_the_model_takes(form: str, tmp_path: Path) -> None:
    model = grid_model("llama tied", form, hidden=128)
    write_exact(model, tmp_path)
    files = list(tmp_path.glob(FILES))
    written = sum(one.nbytes for file in files for one in load_file(file).values())
    assert written == sum(one.nbytes for one in stored(model).values())


def test_files_of_an_earlier_write_are_removed(tmp_path: Path) -> None:
    write_exact(grid_model("llama"), tmp_path, file_bytes=10_000)
    write_exact(grid_model("llama"), tmp_path)
    assert len(list(tmp_path.glob(FILES))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_model_has_the_values_that_were_trained(kind: str, tmp_path: Path) -> None:
    model = grid_model(kind, "int4")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights on a grid.*")
        save_dense(model, tmp_path, file_bytes=100_000)
    assert not holds_grid_weights(tmp_path) and len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert max(path.stat().st_size for path in tmp_path.glob("*.safetensors")) < 150_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = dict(dense_copy(model).named_parameters())
    assert not has_grid_weights(loaded) and has_grid_weights(model)
    assert dict(loaded.named_parameters()).keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())


def test_another_grid_is_refused(tmp_path: Path) -> None:
    write_exact(grid_model("llama", "int8"), tmp_path)
    with pytest.raises(
        ModelError, match="as int8 in blocks of 64 in the checkpoint .* in the model as int4 in blocks of 32"
    ):
        read_exact(grid_model("llama", "int4"), tmp_path)
    with pytest.raises(ModelError, match="as int8 .* in the model in its own dtype. Resume with the same `weights`"):
        read_exact(bfloat16_model("llama"), tmp_path)


def test_another_model_is_refused(tmp_path: Path) -> None:
    write_exact(grid_model("llama"), tmp_path)
    with pytest.raises(ModelError, match=r"has the shape \(512, 64\) in .* and \(480, 64\) in the model"):
        read_exact(grid_model("llama", vocab=480), tmp_path)
    with pytest.raises(ModelError, match="lacks 9 of the model's weights"):
        read_exact(grid_model("llama", layers=3), tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model = grid_model("llama")
    write_exact(model, tmp_path)
    file = next(tmp_path.glob(FILES))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        read_exact(model, tmp_path)


def test_safetensors_itself_refuses_a_weight_on_a_grid(tmp_path: Path) -> None:
    """Otherwise it would write nothing for the weight."""
    weight = next(p for p in grid_model("llama").parameters() if isinstance(p, GridWeight))
    with pytest.raises(RuntimeError):
        save_file({"weight": weight.detach()}, tmp_path / "model.safetensors")
