"""The optimizers on weights that are stored on a grid."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbft.grid.formats import GRIDS, INT4, INT8, INT12
from sbft.grid.weight import GridWeight
from sbft.optim import SGD, Adafactor, AdamW, Muon, RowAdafactor, SinkGD
from sbft.optim.kernels import cpu

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adafactor": (Adafactor, {}),
    "Adafactor, not factored": (Adafactor, {"min_dim_size_to_factor": 1000}),
    "RowAdafactor": (RowAdafactor, {}),
    "AdamW": (AdamW, {}),
    "SGD": (SGD, {}),
    "SGD with momentum": (SGD, {"momentum": 0.9}),
    "Muon": (Muon, {}),
    "SinkGD": (SinkGD, {}),
}


def weight_on(grid: Any, shape: tuple[int, ...] = (160, 192)) -> nn.Parameter:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.05
    return nn.Parameter(GridWeight.of(values, grid))


def gradients(shape: tuple[int, ...], count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator).bfloat16() for _ in range(count)]


def train(optimizer: Any, parameter: nn.Parameter, grads: list[Tensor]) -> None:
    for grad in grads:
        optimizer.tokens_per_step = 10
        parameter.grad = grad.clone()
        optimizer.step()


def values_of(parameter: nn.Parameter) -> Tensor:
    data: Any = parameter
    return data.dequantize(torch.float32) if isinstance(data, GridWeight) else data.detach().float()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(160, 192), (3, 160, 192)], ids=str)
def test_every_optimizer_moves_a_weight_as_it_moves_a_plain_one(name, shape):
    """int12 is finer than bfloat16; the directions on the grid and in float32 differ only by rounding."""
    kind, settings = OPTIMIZERS[name]
    on_grid, plain = weight_on(INT12, shape), nn.Parameter(values_of(weight_on(INT12, shape)))
    start = values_of(on_grid)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about operations that would make the whole weight dense
        train(kind([on_grid], lr=1e-2, weight_decay=0.1, **settings), on_grid, gradients(shape))
    train(kind([plain], lr=1e-2, weight_decay=0.1, **settings), plain, [grad.float() for grad in gradients(shape)])
    moved = values_of(on_grid) - start
    error = values_of(on_grid) - values_of(plain)
    # Four updates, each rounded to a grid with steps of at most 0.25 / 2047, with at most half a step of noise; growth adds
    # as much. Muon's and SinkGD's directions are also rounded to bfloat16.
    assert error.square().mean().sqrt() < 0.25 / 2047 * 2 + 0.01 * moved.square().mean().sqrt()
    assert moved.abs().max() > 0.25 / 2047


@pytest.mark.parametrize("grid", GRIDS.values(), ids=lambda grid: grid.name)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_gives_the_same_bits(grid, name):
    kind, settings = OPTIMIZERS[name]
    grads = gradients((160, 192))
    whole = weight_on(grid)
    train(kind([whole], lr=1e-2, **settings), whole, grads)
    first = weight_on(grid)
    before = kind([first], lr=1e-2, **settings)
    train(before, first, grads[:2])
    second = copy.deepcopy(first)
    after = kind([second], lr=1e-2, **settings)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(after, second, grads[2:])
    one, other = (parameter.quantized.tensors for parameter in (whole, second))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compiled_code_and_the_reference_train_alike(name, monkeypatch):
    kind, settings = OPTIMIZERS[name]
    made = []
    for kernels in ("", "reference"):
        monkeypatch.setenv("SBFT_KERNELS", kernels)
        parameter = weight_on(INT8)
        train(kind([parameter], lr=1e-3, **settings), parameter, gradients((160, 192)))
        made.append(parameter.quantized)
    codes = [each.codes.int() for each in made]
    assert ((codes[0] - codes[1]).abs() <= 1).float().mean() > 0.995  # sums in a different order
    if "SGD" in name or name == "AdamW":
        assert torch.equal(codes[0], codes[1]) and torch.equal(made[0].scales, made[1].scales)


def test_released_gradients_give_the_same_bits():
    made = []
    for released in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(192, 160, bias=False), nn.Linear(160, 192, bias=False)).bfloat16()
        for layer in model:
            layer.weight = nn.Parameter(GridWeight.of(layer.weight, INT8))
        optimizer = Adafactor(model.parameters(), lr=1e-2)
        if released:
            optimizer.release_gradients()
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            optimizer.tokens_per_step = 10
            model(torch.randn(10, 192, generator=generator).bfloat16()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append([parameter.quantized.codes for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*made, strict=True))


def test_the_carried_sum_of_squares_is_dropped_when_the_weight_is_changed_by_others():
    grads = gradients((160, 192), 3)
    made = []
    for forget in (False, True):
        parameter = weight_on(INT8)
        optimizer = Adafactor([parameter], lr=1e-2)
        train(optimizer, parameter, grads[:2])
        with torch.no_grad():
            parameter.copy_(parameter.dequantize() * 3)
        if forget:
            optimizer._weight_square_sums.clear()
        train(optimizer, parameter, grads[2:])
        made.append(parameter.quantized.codes)
    assert torch.equal(*made)


def test_the_sum_of_squares_is_carried_from_step_to_step(monkeypatch):
    seen = []
    kernel = cpu.adafactor_factored
    monkeypatch.setattr(
        cpu, "adafactor_factored", lambda *args, **others: seen.append(args[5]) or kernel(*args, **others)
    )
    parameter = weight_on(INT8)
    train(Adafactor([parameter], lr=1e-2), parameter, gradients((160, 192), 3))
    assert [square_sum is None for square_sum in seen] == [True, False, False]


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_backward_refuses_a_weight_that_was_updated_since_forward(name, kernels, monkeypatch):
    monkeypatch.setenv("SBFT_KERNELS", kernels)
    kind, settings = OPTIMIZERS[name]
    parameter = weight_on(INT4)
    product = torch.ones(2, 192, dtype=torch.bfloat16, requires_grad=True) @ parameter.t()
    train(kind([parameter], lr=1e-2, **settings), parameter, gradients((160, 192), 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_rounding_to_nearest_can_be_asked_for():
    """An update far below half a grid step moves nothing."""
    for stochastic in (True, False):
        parameter = weight_on(INT4)
        start = parameter.quantized.codes.clone()
        train(SGD([parameter], lr=1e-4, stochastic_rounding=stochastic), parameter, gradients((160, 192)))
        assert torch.equal(parameter.quantized.codes, start) is not stochastic
