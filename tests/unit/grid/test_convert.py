"""Which weights of a model are put on which grid, and what is refused."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbft.errors import ModelError
from sbft.grid import convert
from sbft.grid.convert import put_on_grids
from sbft.grid.weight import GridWeight
from tests.tiny import tiny_model
from tests.unit.grid.cases import bfloat16_model


def on_grids(model: nn.Module) -> dict[str, str]:
    return {name: p.grid.name for name, p in model.named_parameters() if isinstance(p, GridWeight)}


def test_matrices_are_on_the_grid_and_norms_and_small_ones_are_not() -> None:
    model = tiny_model("llama", tied=False)
    put = put_on_grids(model, "int8")
    assert put == on_grids(model) and set(put.values()) == {"int8"}
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"} <= put.keys()
    kept = {name for name, _ in model.named_parameters()} - put.keys()
    # A key projection has 32 x 64 elements.
    assert all("norm" in name or "k_proj" in name or "v_proj" in name for name in kept) and len(kept) == 9


def test_values_are_rounded_from_the_models_own() -> None:
    model, original = tiny_model("gpt2"), tiny_model("gpt2")
    put_on_grids(model, "int12")
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        if isinstance(ours, GridWeight):
            assert torch.equal(ours.codes, GridWeight.of(theirs, ours.grid).codes)
        else:
            assert torch.equal(ours, theirs)


def test_rows_that_do_not_divide_stay() -> None:
    layers = nn.ModuleList([nn.Linear(144, 64), nn.Linear(160, 64)]).bfloat16()
    assert put_on_grids(layers, "int4") == {"1.weight": "int4"}
    assert layers[1].weight.quantized.block == 32


def test_the_first_pattern_that_matches_holds_and_default_where_none_does() -> None:
    model = tiny_model("llama", tied=False)
    formats = {
        "default": "int4",
        "lm_head": "int8",
        "layers.1": "bfloat16",
        "*.mlp.*": "int12",
        "q_proj.weight": "int8",
    }
    put = put_on_grids(model, formats)
    assert put["lm_head.weight"] == "int8"
    assert put["model.embed_tokens.weight"] == "int4"
    assert put["model.layers.0.mlp.up_proj.weight"] == "int12"
    assert put["model.layers.0.self_attn.q_proj.weight"] == "int8"
    assert put["model.layers.0.self_attn.o_proj.weight"] == "int4"
    assert not any(".layers.1." in name for name in put)


def test_without_a_default_the_rest_stays() -> None:
    model = tiny_model("llama", tied=False)
    assert put_on_grids(model, {"lm_head": "int8"}) == {"lm_head.weight": "int8"}


def test_tied_weights_stay_tied_and_either_name_matches() -> None:
    model: Any = tiny_model("llama", tied=True)
    put = put_on_grids(model, {"default": "int4", "lm_head": "int8"})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert put["model.embed_tokens.weight"] == "int8" and "lm_head.weight" not in put


def test_frozen_weights_stay_frozen() -> None:
    model = tiny_model("llama").requires_grad_(False)
    put_on_grids(model, "int8")
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_experts_are_on_the_grid() -> None:
    model: Any = bfloat16_model("moe eager")
    put = put_on_grids(model, "int8")
    assert put["model.layers.0.mlp.experts.down_proj"] == "int8"


def test_no_second_model_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    shapes = {id(p): p.numel() for p in model.parameters()}
    alive = set(shapes)
    for parameter in model.parameters():
        weakref.finalize(parameter, alive.discard, id(parameter))
    del parameter
    made: list[int] = []
    original = GridWeight.of

    def watched(dense: Tensor, grid: Any) -> GridWeight:
        made.append(len(alive))
        return original(dense, grid)

    monkeypatch.setattr(convert.GridWeight, "of", watched)
    put = put_on_grids(model, "int8")
    assert made == list(range(len(shapes), len(shapes) - len(put), -1))  # each was freed before the next was made


def test_a_model_without_memory_is_converted_too() -> None:
    model = tiny_model("llama").to("meta")
    put = put_on_grids(model, "int4")
    assert len(put) > 8 and all(p.device.type == "meta" for p in model.parameters())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("int9", "no format 'int9' .* expected int4, int8, int12 or bfloat16. Did you mean int"),
        ({"default": "int4", "lm_haed": "int8"}, "'lm_haed' .* matches no weight .*Did you mean lm_head"),
        ({"norm": "int8"}, "'norm' .* matches only weights that cannot be on a grid, the first model.norm.weight"),
    ],
)
def test_a_wrong_setting_is_refused_and_nothing_is_changed(weights: Any, message: str) -> None:
    model = tiny_model("llama", tied=False)
    with pytest.raises(ModelError, match=message):
        put_on_grids(model, weights)
    assert on_grids(model) == {}


def test_a_model_in_float32_or_on_a_grid_already_is_refused() -> None:
    with pytest.raises(ModelError, match="weights are float32"):
        put_on_grids(tiny_model("llama", dtype=torch.float32), "int8")
    model = tiny_model("llama")
    put_on_grids(model, "int8")
    with pytest.raises(ModelError, match="is already on the grid int8"):
        put_on_grids(model, "int8")


def test_a_model_in_4_bits_of_bitsandbytes_is_refused() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(nn.Linear(64, 64).bfloat16(), bitsandbytes.nn.Linear4bit(64, 64))
    with pytest.raises(ModelError, match="The weight 1.weight is quantized by bitsandbytes"):
        put_on_grids(model, "int8")


def test_a_sharded_model_is_refused(tmp_path: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = nn.Linear(64, 64, dtype=torch.bfloat16)
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Replicate()]))
        with pytest.raises(ModelError, match="sharded over several processes"):
            put_on_grids(layer, "int8")
    finally:
        torch.distributed.destroy_process_group()
