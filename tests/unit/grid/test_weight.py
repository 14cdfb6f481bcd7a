"""A weight on a grid as a parameter: what modules, autograd, copying and pickling do with it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbft.grid.convert import put_on_grids
from sbft.grid.formats import GRIDS, INT4, INT8, INT12
from sbft.grid.update import apply_
from sbft.grid.weight import GridWeight
from sbft.native.memory import model_bytes
from tests.unit.grid.cases import FORMATS, pair


def same_codes(one: GridWeight, other: GridWeight) -> bool:
    tensors = other.quantized.tensors
    return one.grid == other.grid and all(torch.equal(v, tensors[name]) for name, v in one.quantized.tensors.items())


def linear(form: str = "int8") -> nn.Linear:
    layer = nn.Linear(64, 96, dtype=torch.bfloat16)
    layer.weight = pair(form=form)[0]
    return layer


@pytest.mark.parametrize("form", FORMATS)
def test_is_a_bfloat16_parameter(form: str) -> None:
    weight, _ = pair(form=form)
    assert isinstance(weight, nn.Parameter) and isinstance(weight, GridWeight)
    assert (weight.dtype, weight.shape, weight.is_leaf, weight.requires_grad) == (torch.bfloat16, (96, 64), True, True)
    assert dict(linear(form).named_parameters()).keys() == {"weight", "bias"}
    assert "grid=" + form in repr(weight)


@pytest.mark.parametrize(
    ("form", "bytes_of_weight"), [("int4", 3072 + 384), ("int8", 6144 + 192), ("int12", 9216 + 192)]
)
def test_model_bytes_are_those_that_are_stored(form: str, bytes_of_weight: int) -> None:
    layer = linear(form)
    assert layer.weight.nbytes == bytes_of_weight == GRIDS[form].size_bytes((96, 64))
    assert model_bytes(layer) == bytes_of_weight + 2 * 96
    tied = nn.ModuleList([layer, layer])
    assert model_bytes(tied) == model_bytes(layer)


def test_frozen_gets_no_gradient_and_passes_one_on() -> None:
    layer = linear().requires_grad_(False)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None


def test_gradients_accumulate() -> None:
    weight, plain = pair()
    for parameter in (weight, plain):
        for seed in (1, 2):
            x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)).bfloat16()
            F.linear(x, parameter).sum().backward()
    assert weight.grad is not None and plain.grad is not None and torch.equal(weight.grad, plain.grad)


@pytest.mark.parametrize("form", FORMATS)
def test_an_update_in_a_hook_raises_the_version_and_frees_the_gradient(form: str) -> None:
    weight, _ = pair(form=form)
    version, before = weight._version, weight.dequantize(torch.float32)
    seen: list[Tensor] = []

    def update(parameter: Any) -> None:
        seen.append(parameter.grad)
        apply_(parameter.quantized, parameter.grad, step=0.5, decay=0.0, key=None)
        parameter.mark_changed()
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(update)
    F.linear(torch.ones(2, 64).bfloat16(), weight).sum().backward()
    assert weight.grad is None and type(seen[0]) is Tensor and seen[0].dtype == torch.bfloat16
    assert weight._version == version + 1
    moved = before - weight.dequantize(torch.float32)  # the gradient is 2 everywhere
    assert (moved - 1).abs().max() <= weight.scales.float().max()


def test_backward_refuses_a_weight_that_has_changed_since_forward() -> None:
    weight, _ = pair()
    x = torch.randn(2, 64).bfloat16().requires_grad_()
    result = F.linear(x, weight).sum()
    weight.mark_changed()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.backward()


@pytest.mark.parametrize("form", FORMATS)
def test_deepcopy_is_independent_and_keeps_ties(form: str) -> None:
    layer = linear(form)
    layer.weight.grad = torch.ones(96, 64).bfloat16()
    one, other = copy.deepcopy([layer, layer])
    assert one.weight is other.weight
    assert isinstance(one.weight, nn.Parameter) and same_codes(one.weight, layer.weight)
    assert one.weight.grad is not layer.weight.grad and torch.equal(one.weight.grad, layer.weight.grad)
    with torch.no_grad():
        one.weight.copy_(torch.zeros(96, 64))
    assert layer.weight.dequantize().any() and not one.weight.dequantize().any()


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_pickle_and_torch_save_keep_the_codes(form: str, requires_grad: bool) -> None:
    weight = pair(form=form)[0].requires_grad_(requires_grad)
    stream = io.BytesIO()
    torch.save({"weight": weight, "tied": weight}, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    for restored in (pickle.loads(pickle.dumps(weight)), loaded["weight"]):
        assert isinstance(restored, nn.Parameter) and same_codes(restored, weight)
        assert restored.requires_grad == requires_grad
    assert loaded["weight"] is loaded["tied"]


def test_clone_and_detach() -> None:
    weight, _ = pair()
    detached, cloned = weight.detach(), weight.detach().clone()
    assert same_codes(detached, weight) and detached.codes.data_ptr() == weight.codes.data_ptr()
    assert same_codes(cloned, weight) and cloned.codes.data_ptr() != weight.codes.data_ptr()
    assert not detached.requires_grad and weight.clone().requires_grad


@pytest.mark.parametrize("form", FORMATS)
def test_copy_from_values_rounds_to_the_grid(form: str) -> None:
    weight, _ = pair(form=form)
    values = torch.randn(96, 64, generator=torch.Generator().manual_seed(5))
    for source in (values, values.bfloat16()):
        version = weight._version
        with torch.no_grad():
            weight.copy_(source)
        assert same_codes(weight, GridWeight.of(source, weight.grid)) and weight._version == version + 1


def test_copy_between_weights_is_exact_on_one_grid_and_rounds_on_another() -> None:
    source, target, other = pair(form="int12", seed=3)[0], pair(form="int12")[0], pair(form="int4")[0]
    plain = torch.empty(96, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        target.copy_(source)
        other.copy_(source)
        plain.copy_(source)
    assert same_codes(target, source)
    assert same_codes(other, GridWeight.of(source.dequantize(torch.float32), INT4))
    assert torch.equal(plain, source.dequantize())


def test_data_is_another_weight_and_nothing_else() -> None:
    weight, _ = pair()
    weight.data = weight.data.clone()
    other = GridWeight.of(torch.ones(96, 64), INT8)
    weight.data = other
    assert same_codes(weight, other) and isinstance(weight, nn.Parameter)
    with pytest.raises(TypeError, match="Use copy_"):
        weight.data = torch.ones(96, 64, dtype=torch.bfloat16)


@pytest.mark.parametrize("form", FORMATS)
def test_a_model_moves_to_another_device_with_its_parameters(form: str) -> None:
    layer = linear(form)
    weight = layer.weight
    layer.to("meta")
    assert layer.weight is weight and weight.device.type == "meta" and weight.codes.device.type == "meta"
    assert isinstance(weight, GridWeight) and weight.grid == GRIDS[form]


def test_to_bfloat16_leaves_it_and_to_float32_is_refused() -> None:
    layer = linear()
    weight = layer.weight
    assert layer.to(torch.bfloat16).weight is weight
    with pytest.raises(TypeError, match="torch.float32.*dtype cannot be changed"):
        layer.float()
    assert layer.weight is weight


@pytest.mark.parametrize("form", FORMATS)
def test_state_dict_is_exact_and_plain_values_load_too(form: str) -> None:
    layer, other = linear(form), linear(form)
    with torch.no_grad():
        other.weight.copy_(torch.zeros(96, 64))
    other.load_state_dict(layer.state_dict())
    assert same_codes(other.weight, layer.weight)
    values = torch.randn(96, 64)
    other.load_state_dict({"weight": values, "bias": layer.bias})
    assert same_codes(other.weight, GridWeight.of(values, layer.weight.grid))


def test_a_shape_that_cannot_be_on_a_grid_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        GridWeight.of(torch.ones(4, 33), INT12)


def test_adapters_on_a_frozen_weight_train_as_on_bfloat16() -> None:
    peft = pytest.importorskip("peft")
    results = []
    for form in ("int8", None):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)).bfloat16()
        put_on_grids(base, "int8")
        if form is None:
            for layer in base:
                layer.weight = nn.Parameter(layer.weight.dequantize())
        model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "1"], init_lora_weights=False))
        model(torch.ones(3, 64).bfloat16()).sum().backward()
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert not any(isinstance(p, GridWeight) and p.requires_grad for p in model.parameters())
        results.append(trained)
    ours, theirs = results
    assert len(ours) == 4 and all(torch.equal(ours[name], theirs[name]) for name in theirs)
