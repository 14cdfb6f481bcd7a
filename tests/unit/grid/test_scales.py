"""Scales saved beside a bfloat16 model: together they give the trained codes, exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sbft.errors import ModelError
from sbft.grid.codes import Quantized, dequantize, empty, store_codes
from sbft.grid.convert import put_on_grids
from sbft.grid.formats import GRIDS, Grid
from sbft.grid.grid_files import save_checkpoint, save_dense
from sbft.grid.plain import plain_folder
from sbft.grid.scales import SCALES_FILE, TrainedCodes, recover, write_scales
from sbft.grid.weight import GridWeight
from tests.unit.grid.cases import FORMATS, bfloat16_model, dense_copy, grid_model


def every_significand() -> Tensor:
    """Float16 scales: every significand, at the smallest, a middle and the largest exponent, and every subnormal."""
    bits = torch.cat([torch.arange(1, 1024), *(torch.arange(1024) + (exponent << 10) for exponent in (1, 15, 30))])
    return bits.to(torch.int16).view(torch.float16)


def every_code(grid: Grid, scales: Tensor) -> Quantized:
    """For each scale, rows of 32 elements that have every code of a grid."""
    codes = torch.arange(-grid.largest, grid.largest + 1)
    padded = torch.cat((codes, torch.zeros(-len(codes) % 32, dtype=codes.dtype))).view(-1, 32)
    made = empty(grid, (len(scales), padded.shape[0], 32))
    store_codes(made, padded.expand(len(scales), -1, -1))
    made.scales.copy_(scales[:, None, None].expand(made.scales.shape))
    return made


@pytest.mark.parametrize("form", FORMATS)
def test_every_code_follows_from_its_bfloat16_value_and_scale(form: str) -> None:
    grid = Grid(form, GRIDS[form].largest, 32)
    scales = every_significand()
    weight = every_code(grid, scales[:: 1 if grid.bits < 12 else 17])  # 4,095 codes for every scale would be slow
    found = recover(dequantize(weight), grid, weight.scales, weight.low)
    assert found is not None
    assert all(torch.equal(found.tensors[name], stored) for name, stored in weight.tensors.items() if name != "scales")
    assert torch.equal(found.scales, weight.scales)


@pytest.mark.parametrize("form", FORMATS)
def test_a_block_without_numbers_stays_one(form: str) -> None:
    weight = every_code(Grid(form, GRIDS[form].largest, 32), torch.tensor([torch.nan], dtype=torch.float16))
    store_codes(weight, torch.zeros(weight.shape, dtype=torch.int32))
    found = recover(dequantize(weight), weight.grid, weight.scales, weight.low)
    assert found is not None and torch.equal(found.codes, weight.codes) and torch.isnan(found.scales).all()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["llama", "llama tied", "gpt2"])
def test_a_saved_model_has_its_codes_beside_it(kind: str, form: str, tmp_path: Path) -> None:
    model = grid_model(kind, form)
    save_dense(model, tmp_path, file_bytes=100_000)
    codes = TrainedCodes(tmp_path)
    values = {name: tensor for file in tmp_path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    trained = {name: one for name, one in model.named_parameters() if isinstance(one, GridWeight)}
    assert codes.grids.keys() == trained.keys()
    for name, weight in trained.items():
        found = codes.recover(name, values[name])
        assert found.block == weight.quantized.block
        assert all(torch.equal(found.tensors[part], one) for part, one in weight.quantized.tensors.items())
    # Scales, and half a byte per weight for int12.
    stored = sum(one.nbytes for one in load_file(tmp_path / SCALES_FILE).values())
    low = sum(weight.numel() // 2 for weight in trained.values()) if form == "int12" else 0
    assert stored == low + sum(weight.scales.nbytes for weight in trained.values())


def test_a_model_off_the_grid_has_nothing_beside_it(tmp_path: Path) -> None:
    save_dense(bfloat16_model("llama"), tmp_path)
    write_scales({}, tmp_path)
    assert not (tmp_path / SCALES_FILE).exists() and TrainedCodes(tmp_path).grids == {}


def test_values_that_were_changed_afterwards_are_refused(tmp_path: Path) -> None:
    model = grid_model("llama", "int8")
    save_dense(model, tmp_path)
    values = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    values[3, 5] += values[3].abs().max()
    with pytest.raises(ModelError, match="was changed after training.*remove the folder .*grid"):
        TrainedCodes(tmp_path).recover("model.layers.0.mlp.up_proj.weight", values)
    (tmp_path / SCALES_FILE).write_bytes(b"broken")
    with pytest.raises(ModelError, match="is damaged"):
        TrainedCodes(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "llama tied", "gpt2", "moe eager"])
def test_a_checkpoint_loads_as_a_plain_model(kind: str, tmp_path: Path) -> None:
    model = grid_model(kind, "int12")
    save_checkpoint(model, tmp_path)
    with plain_folder(tmp_path) as plain:
        assert plain != tmp_path
        loaded, report = AutoModelForCausalLM.from_pretrained(plain, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        expected = dict(dense_copy(model).named_parameters())
        assert all(torch.equal(p, expected[name]) for name, p in loaded.named_parameters())
        codes = TrainedCodes(plain)
        assert set(codes.grids) == {name for name, p in model.named_parameters() if isinstance(p, GridWeight)}
    assert not plain.exists()


def test_the_codes_of_a_checkpoint_are_those_of_the_model(tmp_path: Path) -> None:
    model = bfloat16_model("llama")
    put_on_grids(model, {"default": "int8", "up_proj": "int4", "lm_head": "int12"}, smallest_elements=1)
    save_checkpoint(model, tmp_path)
    with plain_folder(tmp_path) as plain:
        codes = TrainedCodes(plain)
        values = load_file(next(plain.glob("*.safetensors")))
        for name, weight in model.named_parameters():
            if isinstance(weight, GridWeight):
                found = codes.recover(name, values[name])
                assert all(torch.equal(found.tensors[part], one) for part, one in weight.quantized.tensors.items())


def test_a_folder_of_a_plain_model_is_left_as_it_is(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    with plain_folder(tmp_path) as plain:
        assert plain == tmp_path
