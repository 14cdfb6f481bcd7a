"""Muon, SinkGD and Adafactor by rows against torch's Muon, float64 arithmetic and sbft's other optimizers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sbft.errors import RecipeError
from sbft.optim import Adafactor, AdamW, Muon, RowAdafactor, SinkGD, TokenOptimizer, matrix_groups, sinkgd
from sbft.optim.muon import orthogonalized
from sbft.recipe import load_recipe
from sbft.rounding import noise, stochastic_round
from tests.tiny import tiny_model
from tests.unit.optim.test_optimizer_oracles import FLOAT32, gradients, start

STEPS = 20
MATRICES = [(64, 48), (48, 64), (40, 40), (3, 40, 24), (3, 24, 40)]


def tokens(step: int) -> int:
    return 10 + 37 * (step % 4)


def run(
    optimizer_class: type[TokenOptimizer], shape: tuple[int, ...], **settings: Any
) -> tuple[Tensor, TokenOptimizer]:
    weight = nn.Parameter(start(shape))
    optimizer = optimizer_class([weight], **settings)
    for step, gradient in enumerate(gradients(shape, STEPS)):
        optimizer.tokens_per_step = tokens(step)
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer


def state_bytes(optimizer: TokenOptimizer) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values())


# Muon


@pytest.mark.parametrize("shape", MATRICES[:3], ids=str)
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_with_a_fixed_momentum_is_torchs(shape: tuple[int, int], adjust: str, nesterov: bool) -> None:
    weight = nn.Parameter(start(shape))
    settings = {"lr": 1e-2, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust, "weight_decay": 0.1}
    theirs = torch.optim.Muon([weight], **settings)
    for gradient in gradients(shape, STEPS):
        weight.grad = gradient.clone()
        theirs.step()
    ours, _ = run(Muon, shape, **settings)
    # The directions, in bfloat16, have the same bits; what remains is float32 rounding of weights below one.
    torch.testing.assert_close(ours, weight.detach(), rtol=0, atol=STEPS * 2**-24)


def orthogonalized_float64(matrix: np.ndarray) -> np.ndarray:
    """Computed from the singular values: every iteration applies the same polynomial to them."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(matrix)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ v


def muon_float64(shape: tuple[int, ...], half_life: float | None, lr: float, weight_decay: float) -> np.ndarray:
    rows, columns = shape[-2:]
    weight = start(shape).double().numpy().reshape(-1, rows, columns)
    average = np.zeros_like(weight)
    for step, gradient in enumerate(gradients(shape, STEPS)):
        g = gradient.double().numpy().reshape(weight.shape)
        beta = 0.0 if half_life is None else 2.0 ** (-tokens(step) / half_life)
        average = beta * average + (1 - beta) * g
        mixed = beta * average + (1 - beta) * g
        weight = weight * (1 - lr * weight_decay)
        for i in range(len(weight)):
            weight[i] -= lr * 0.2 * math.sqrt(max(rows, columns)) * orthogonalized_float64(mixed[i])
    return weight.reshape(shape)


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("half_life", [300.0, None])
def test_muon_measures_its_momentum_in_tokens(shape: tuple[int, ...], half_life: float | None) -> None:
    momentum = {"momentum": 0.0} if half_life is None else {"momentum_half_life": half_life}
    ours, optimizer = run(Muon, shape, lr=1e-2, weight_decay=0.2, newton_schulz_dtype="float32", **momentum)
    expected = muon_float64(shape, half_life, 1e-2, 0.2)
    # Five iterations multiply the rounding error of a singular value by at most 3.4445 ** 5.
    error = STEPS * 1e-2 * 0.2 * math.sqrt(64) * 2**-24 * 3.4445**5
    np.testing.assert_allclose(ours.double().numpy(), expected, rtol=0, atol=error)
    (state,) = optimizer.state.values()
    assert set(state) == (set() if half_life is None else {"momentum"})


def test_singular_values_end_near_one() -> None:
    matrix = torch.randn(96, 32, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrix))
    assert values.min() > 0.68 and values.max() < 1.14  # the polynomial's minimum and maximum near one
    assert torch.linalg.svdvals(matrix).max() > 2 * torch.linalg.svdvals(matrix).min()
    assert not orthogonalized(torch.zeros(5, 3)).any()


# SinkGD


def balanced_float64(matrix: np.ndarray, iterations: int) -> np.ndarray:
    """Algorithm 3 of arXiv 2502.06742; rows and columns of zeros remain zero."""
    rows, columns = matrix.shape
    for _ in range(iterations):
        norm = np.linalg.norm(matrix, axis=1, keepdims=True)
        matrix = math.sqrt(columns) * matrix / np.where(norm == 0, 1, norm)
        norm = np.linalg.norm(matrix, axis=0, keepdims=True)
        matrix = math.sqrt(rows) * matrix / np.where(norm == 0, 1, norm)
    return matrix


@pytest.mark.parametrize("shape", MATRICES, ids=str)
@pytest.mark.parametrize("iterations", [1, 5])
def test_sinkgd_agrees_with_float64(shape: tuple[int, ...], iterations: int) -> None:
    lr, weight_decay = 1e-2, 0.1
    weight = start(shape).double().numpy().reshape(-1, *shape[-2:])
    for gradient in gradients(shape, STEPS):
        weight = weight * (1 - lr * weight_decay)
        for i, g in enumerate(gradient.double().numpy().reshape(weight.shape)):
            weight[i] -= lr * balanced_float64(g, iterations)
    ours, optimizer = run(SinkGD, shape, lr=lr, weight_decay=weight_decay, sinkhorn_iterations=iterations)
    np.testing.assert_allclose(ours.double().numpy(), weight.reshape(shape), **FLOAT32)
    assert not any(optimizer.state.values())


def test_blocks_of_rows_are_balanced_as_a_whole_matrix_is(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(70, 30, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(sinkgd, "_BLOCK", 9 * 30 + 5)
    expected = balanced_float64(matrix.double().numpy(), 5)
    np.testing.assert_allclose(sinkgd.balanced_(matrix, 5).double().numpy(), expected, **FLOAT32)


@pytest.mark.parametrize("iterations", [1, 5, 12, 40])
@pytest.mark.parametrize("tiny", [1e-19, 1e-21, 1e-30])
def test_rows_and_columns_of_very_unlike_size_are_balanced(tiny: float, iterations: int) -> None:
    matrix = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    matrix[3] *= tiny
    matrix[:, 5] *= tiny
    matrix[3, 5] = tiny  # tiny * tiny underflows in float32
    expected = balanced_float64(matrix.double().numpy(), iterations)
    np.testing.assert_allclose(sinkgd.balanced_(matrix, iterations).double().numpy(), expected, **FLOAT32)


def test_factors_that_grow_in_every_iteration_stay_within_float32() -> None:
    matrix = torch.randn(150, 128, generator=torch.Generator().manual_seed(0))
    matrix[:120, 1:] = 0.0  # rows with one element: each iteration divides their column's squared factor by a hundred
    expected = balanced_float64(matrix.double().numpy(), 40)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(sinkgd.balanced_(matrix, 40).double().numpy(), expected, **FLOAT32)


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_balanced_rows_and_columns_have_one_size_and_empty_ones_stay_empty(scale: float) -> None:
    gradient = torch.randn(30, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 30)[:, None]
    gradient[4], gradient[:, 7] = 0.0, 0.0
    weight = nn.Parameter(torch.zeros(30, 20))
    optimizer = SinkGD([weight], lr=1.0, sinkhorn_iterations=40)
    weight.grad, optimizer.tokens_per_step = gradient * scale, 1
    optimizer.step()
    moved = -weight.detach()
    assert not moved[4].any() and not moved[:, 7].any()
    kept = moved[[i for i in range(30) if i != 4]][:, [i for i in range(20) if i != 7]]
    # Columns are scaled last; if the rows' norms are right too, the iteration has converged.
    torch.testing.assert_close(kept.norm(dim=0), torch.full((19,), 30**0.5))
    torch.testing.assert_close(kept.norm(dim=1), torch.full((29,), (19 * 30 / 29) ** 0.5), rtol=1e-4, atol=0)


# What both share


@pytest.mark.parametrize("kind", [Muon, SinkGD])
@pytest.mark.parametrize("rest", ["adamw", "adafactor"])
def test_the_rest_is_updated_by_sbfts_own(kind: type[TokenOptimizer], rest: str) -> None:
    ends = []
    for ours in (True, False):
        generator = torch.Generator().manual_seed(0)
        shapes = [(140, 130), (9,), (40, 1), (2, 3, 4, 5)]
        weights = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
        settings = {"weight_decay": 0.1, "second_moment_half_life": 200.0, "seed": 3}
        if ours:
            groups = [{"params": weights[:1], "matrices": False}, {"params": weights[1:]}]
            optimizer = kind(groups, lr=1e-3, rest_lr_ratio=4.0, rest_optimizer=rest, **settings)
        elif rest == "adamw":
            optimizer = AdamW(weights, lr=4e-3, **settings)
        else:
            optimizer = Adafactor(weights, lr=4e-3, relative_step=False, **settings)
        for step in range(6):
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator).bfloat16()
            optimizer.tokens_per_step = tokens(step)
            optimizer.step()
        ends.append([*weights, *(value for weight in weights for value in optimizer.state[weight].values())])
    assert len(ends[0]) == len(ends[1]) > 8
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", [Muon, SinkGD, RowAdafactor])
def test_bfloat16_weights_follow_float32_weights_in_the_mean(kind: type[TokenOptimizer]) -> None:
    """With a gradient of ones, and rates at which the directions are the same numbers in both dtypes."""
    steps, shape, moved = 40, (32, 256), {}
    lr = {Muon: 2e-3, SinkGD: 2**-15, RowAdafactor: 2**-15}[kind]
    settings: dict[str, Any] = {"relative_step": False} if kind is RowAdafactor else {}
    for name, dtype, stochastic in [("float32", torch.float32, False), ("sr", torch.bfloat16, True),
                                    ("nearest", torch.bfloat16, False)]:  # fmt: skip
        weight = nn.Parameter(torch.ones(shape, dtype=dtype))
        optimizer = kind([weight], lr=lr, stochastic_rounding=stochastic, **settings)
        for _ in range(steps):
            optimizer.tokens_per_step = 1
            weight.grad = torch.ones(shape, dtype=dtype)
            optimizer.step()
        moved[name] = 1.0 - weight.detach().double().mean().item()
    assert moved["nearest"] == 0.0 < moved["float32"]
    # As for the other optimizers: every step has noise of at most half a bfloat16 step below one.
    standard_error = steps**0.5 * 2**-9 / math.prod(shape) ** 0.5
    assert moved["float32"] > 5 * standard_error
    assert abs(moved["sr"] - moved["float32"]) < 5 * standard_error


def test_a_stack_is_rounded_with_the_noise_of_its_elements() -> None:
    shape, lr = (3, 16, 24), 1e-3
    before = start(shape).bfloat16()
    signs = torch.randn(shape, generator=torch.Generator().manual_seed(1)).sign()  # already balanced
    other, weight = nn.Parameter(torch.ones(1)), nn.Parameter(before.clone())
    optimizer = SinkGD([other, weight], lr=lr, seed=7)
    weight.grad, optimizer.tokens_per_step = signs.bfloat16(), 1
    optimizer.step()
    expected = stochastic_round(before.float() - signs * torch.tensor(lr), noise(7, 0, 1, shape))
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("kind", [Muon, SinkGD, RowAdafactor])
def test_one_bad_matrix_keeps_its_whole_stack(kind: type[TokenOptimizer]) -> None:
    weight = nn.Parameter(start((3, 8, 9)))
    optimizer = kind([weight], lr=0.1)
    for bad in (False, True):
        weight.grad, optimizer.tokens_per_step = torch.ones(3, 8, 9), 1
        before, state = weight.detach().clone(), {name: v.clone() for name, v in optimizer.state[weight].items()}
        if bad:
            weight.grad[1, 2, 3] = math.inf
        optimizer.step()
    assert torch.equal(weight, before) and not torch.equal(weight, start((3, 8, 9)))
    assert all(torch.equal(optimizer.state[weight][name], value) for name, value in state.items())
    assert optimizer.nonfinite_gradients == 1


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_the_head_are_no_matrices(tied: bool) -> None:
    model = tiny_model("llama", tied=tied)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    head = model.get_output_embeddings().weight
    groups = matrix_groups(model, [head])
    names = {parameter: name for name, parameter in model.named_parameters()}
    first, rest = ([names[parameter] for parameter in group["params"]] for group in groups)
    assert rest == (["model.embed_tokens.weight"] if tied else ["model.embed_tokens.weight", "lm_head.weight"])
    assert "model.layers.0.mlp.up_proj.weight" not in first and len(first) + len(rest) == len(names) - 1
    assert [group["matrices"] for group in groups] == [True, False]


def test_kernels_of_convolutions_are_no_matrices() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 5), nn.Linear(4, 4))
    matrices, rest = matrix_groups(model)
    assert [*rest["params"]] == [*model[0].parameters()] and [*matrices["params"]] == [*model[1].parameters()]
    assert len(matrix_groups(nn.Linear(2, 2))) == 1


def test_the_small_ones_have_no_more_state_than_adafactor() -> None:
    sizes = {}
    for kind, settings in [(Adafactor, {}), (Muon, {}), (Muon, {"momentum": 0.0, "rest_optimizer": "adafactor"}),
                           (SinkGD, {}), (RowAdafactor, {})]:  # fmt: skip
        model = tiny_model("llama", hidden=128, tied=False)
        groups = matrix_groups(model, [model.lm_head.weight])
        optimizer = kind(groups if kind in (Muon, SinkGD) else model.parameters(), **settings)
        optimizer.tokens_per_step = 1
        for parameter in model.parameters():
            optimizer.initialize_state(parameter)
        sizes[kind.__name__ + "".join(settings)] = state_bytes(optimizer)
    spectral = "Muonmomentumrest_optimizer"
    assert 0 < sizes["SinkGD"] == sizes[spectral] < sizes["Adafactor"] < sizes["Muon"]
    assert 0 < sizes["RowAdafactor"] < 0.75 * sizes["Adafactor"]


# Adafactor by rows


@pytest.mark.parametrize("shape", [(1,), (30,), (64, 48), (1, 7), (3, 40, 24)], ids=str)
@pytest.mark.parametrize("relative_step", [True, False])
def test_adafactor_by_rows_agrees_with_float64(shape: tuple[int, ...], relative_step: bool) -> None:
    lr, weight_decay, half_life = 1e-2, 0.1, 300.0
    weight, average, mass = start(shape).double().numpy(), 0.0, 0.0
    ours = nn.Parameter(start(shape))
    optimizer = RowAdafactor(
        [ours], lr=lr, relative_step=relative_step, second_moment_half_life=half_life, weight_decay=weight_decay
    )
    for step, gradient in enumerate(gradients(shape, STEPS)):
        g = gradient.double().numpy()
        square = g**2 + 1e-30
        if len(shape) > 1:
            square = square.mean(axis=-1, keepdims=True)
        beta = 2.0 ** (-tokens(step) / half_life)
        average, mass = beta * average + (1 - beta) * square, beta * mass + (1 - beta)
        update = g / np.sqrt(average / mass)
        update /= max(1.0, np.sqrt((update**2).mean()))
        if relative_step:
            update *= max(1e-3, np.sqrt((weight**2).mean()))
        weight = weight * (1 - lr * weight_decay) - lr * update
        ours.grad, optimizer.tokens_per_step = gradient.clone(), tokens(step)
        optimizer.step()
    np.testing.assert_allclose(ours.detach().double().numpy(), weight, **FLOAT32)


def test_pieces_of_a_large_matrix_are_rounded_with_the_noise_of_their_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for elements in (1 << 20, 100):
        monkeypatch.setattr("sbft.optim.row_adafactor._PIECE_ELEMENTS", elements)
        weight = nn.Parameter(start((40, 24)).bfloat16())
        optimizer = RowAdafactor([weight], lr=1e-2)
        for gradient in gradients((40, 24), 3):
            weight.grad, optimizer.tokens_per_step = gradient.bfloat16(), 5
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_muons_momentum_can_be_switched_off_and_on() -> None:
    weight = nn.Parameter(start((8, 8)))
    optimizer = Muon([weight], momentum=0.0)
    for momentum in (0.0, 0.9):
        optimizer.param_groups[0]["momentum"] = momentum
        weight.grad, optimizer.tokens_per_step = torch.eye(8), 1
        optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["momentum"], 0.1 * torch.eye(8))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["method=muon", "distributed.fsdp_size=2"], "distributed is given, but method muon works on whole matrices"),
        (
            ["method=sinkgd", "optimizer.beta1=0.9"],
            "optimizer.beta1 is given, but optimizer.rest_optimizer is adafactor",
        ),
        (
            ["method=sbft", "optimizer.nesterov=true"],
            "optimizer.nesterov has no effect .* choose a method that uses it: muon",
        ),
    ],
)
def test_recipes_that_an_optimizer_cannot_serve_are_refused(settings: list[str], told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        load_recipe(None, settings, model="m", data="d.jsonl")
    spectral = ["method=muon", "optimizer.momentum=0", "optimizer.rest_optimizer=adafactor"]
    assert load_recipe(None, spectral, model="m", data="d.jsonl").optimizer.momentum == 0
