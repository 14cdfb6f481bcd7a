"""The optimizers against independent oracles: optax's Adafactor, torch's own AdamW and SGD, and float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sbft.optim import SGD, Adafactor, AdamW

STEPS = 50
SHAPES = [(1,), (300,), (64, 48), (128, 128), (150, 257), (127, 400), (3, 130, 140)]
# float32 rounding over 50 steps: each adds a relative error of a few units in the last place to the update.
FLOAT32 = {"rtol": 2e-5, "atol": 1e-6}


def gradients(shape: tuple[int, ...], steps: int = STEPS) -> list[Tensor]:
    """Gradients whose size changes over time and over rows, as real ones do."""
    generator = torch.Generator().manual_seed(len(shape) * 1000 + shape[-1])
    scale = torch.logspace(-3, 1, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    return [torch.randn(shape, generator=generator) * scale * (1 + step % 7) for step in range(steps)]


def start(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05


def run(optimizer_class, shape, tokens=lambda step: 40, **settings) -> tuple[Tensor, torch.optim.Optimizer]:
    weight = torch.nn.Parameter(start(shape))
    optimizer = optimizer_class([weight], **settings)
    for step, gradient in enumerate(gradients(shape)):
        optimizer.tokens_per_step = tokens(step)
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize(
    ("shape", "smallest"),
    [*((shape, 128) for shape in SHAPES), ((64, 48), 32), ((64, 48), 49), ((2, 3), 1), ((4, 40, 33), 33)],
    ids=str,
)
@pytest.mark.parametrize("relative_step", [True, False])
def test_adafactor_with_the_power_schedule_agrees_with_optax(shape, smallest, relative_step):
    jax = pytest.importorskip("jax")
    optax = pytest.importorskip("optax")
    pieces = [
        optax.scale_by_factored_rms(decay_rate=0.8, min_dim_size_to_factor=smallest, epsilon=1e-30),
        optax.clip_by_block_rms(1.0),
    ]
    if relative_step:
        pieces.append(optax.scale_by_param_block_rms(min_scale=1e-3))
    transform = optax.chain(*pieces, optax.scale(-0.01))
    weight = jax.numpy.asarray(start(shape).numpy())
    state = transform.init(weight)
    update = jax.jit(transform.update)
    for gradient in gradients(shape):
        change, state = update(jax.numpy.asarray(gradient.numpy()), state, weight)
        weight = optax.apply_updates(weight, change)
    ours, optimizer = run(
        Adafactor, shape, lr=0.01, schedule="power", relative_step=relative_step, min_dim_size_to_factor=smallest
    )
    assert ("row" in next(iter(optimizer.state.values()))) == (len(shape) > 1 and min(shape[-2:]) >= smallest)
    np.testing.assert_allclose(ours.numpy(), np.asarray(weight), **FLOAT32)


def adafactor_float64(shape, tokens, half_life, lr, weight_decay=0.0) -> np.ndarray:
    """Adafactor from its formulas: averages over tokens with bias correction, whole-tensor clipping and scale."""
    weight = start(shape).double().numpy()
    factored = len(shape) >= 2 and min(shape[-2:]) >= 128
    row = column = full = 0.0
    mass = 0.0
    for step, gradient in enumerate(gradients(shape)):
        g = gradient.double().numpy()
        square = g**2 + 1e-30
        beta = 2.0 ** (-tokens(step) / half_life)
        mass = beta * mass + (1 - beta)
        if factored:
            row = beta * row + (1 - beta) * square.mean(axis=-1)
            column = beta * column + (1 - beta) * square.mean(axis=-2)
            r, c = row / mass, column / mass
            v = r[..., :, None] * c[..., None, :] / r.mean(axis=-1)[..., None, None]
        else:
            full = beta * full + (1 - beta) * square
            v = full / mass
        update = g / np.sqrt(v)
        update /= max(1.0, np.sqrt((update**2).mean()))
        scale = max(1e-3, np.sqrt((weight**2).mean()))
        weight = weight * (1 - lr * weight_decay) - lr * scale * update
    return weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adafactor_with_a_half_life_agrees_with_float64_for_steps_of_any_length(shape):
    def tokens(step: int) -> int:
        return 1 + 97 * (step % 5)

    ours, _ = run(Adafactor, shape, tokens, lr=0.01, second_moment_half_life=2000.0, weight_decay=0.1)
    expected = adafactor_float64(shape, tokens, 2000.0, 0.01, weight_decay=0.1)
    np.testing.assert_allclose(ours.double().numpy(), expected, **FLOAT32)


@pytest.mark.parametrize("kernels", ["", "reference"])
@pytest.mark.parametrize("size", [1e10, 1e16])
def test_adafactor_with_huge_gradients_leaves_rows_without_gradient_as_they_are(size, kernels, monkeypatch):
    monkeypatch.setenv("SBFT_KERNELS", kernels)
    weight = torch.nn.Parameter(start((150, 130)))
    gradient = torch.randn(150, 130, generator=torch.Generator().manual_seed(0)) * size
    gradient[7:] = 0.0  # as in an embedding
    optimizer = Adafactor([weight], lr=0.01)
    optimizer.tokens_per_step, weight.grad = 40, gradient.clone()
    optimizer.step()

    w, g = start((150, 130)).double().numpy(), gradient.double().numpy()
    row, column = (g**2 + 1e-30).mean(axis=1), (g**2 + 1e-30).mean(axis=0)
    update = g / np.sqrt(row[:, None] * column / row.mean())
    update /= max(1.0, np.sqrt((update**2).mean()))
    expected = w - 0.01 * np.sqrt((w**2).mean()) * update
    np.testing.assert_allclose(weight.detach().double().numpy(), expected, **FLOAT32)
    assert torch.equal(weight[7:], start((150, 130))[7:]) and not torch.equal(weight[:7], start((150, 130))[:7])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adamw_with_fixed_betas_is_torchs(shape):
    weight = torch.nn.Parameter(start(shape))
    theirs = torch.optim.AdamW([weight], lr=1e-3, betas=(0.9, 0.97), weight_decay=0.05)
    for gradient in gradients(shape):
        weight.grad = gradient.clone()
        theirs.step()
    ours, _ = run(AdamW, shape, lr=1e-3, beta1=0.9, beta2=0.97, weight_decay=0.05)
    torch.testing.assert_close(ours, weight.detach(), **FLOAT32)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_adamw_measures_its_second_moment_in_tokens(beta1):
    shape, half_life, lr = (20, 30), 1500.0, 1e-3
    weight, m, v, mass1, mass2 = start(shape).double().numpy(), 0.0, 0.0, 0.0, 0.0
    for step, gradient in enumerate(gradients(shape)):
        g, beta2 = gradient.double().numpy(), 2.0 ** (-(10 + 30 * (step % 3)) / half_life)
        m, mass1 = beta1 * m + (1 - beta1) * g, beta1 * mass1 + 1 - beta1
        v, mass2 = beta2 * v + (1 - beta2) * g**2, beta2 * mass2 + 1 - beta2
        weight -= lr * (m / mass1) / (np.sqrt(v / mass2) + 1e-8)
    ours, optimizer = run(
        AdamW, shape, lambda step: 10 + 30 * (step % 3), lr=lr, beta1=beta1, second_moment_half_life=half_life
    )
    np.testing.assert_allclose(ours.double().numpy(), weight, **FLOAT32)
    (state,) = optimizer.state.values()
    assert ("first_moment" in state) == (beta1 > 0)


def test_sgd_without_momentum_is_torchs_and_keeps_no_state():
    shape = (30, 40)
    weight = torch.nn.Parameter(start(shape))
    theirs = torch.optim.SGD([weight], lr=0.01)
    for gradient in gradients(shape):
        weight.grad = gradient.clone()
        theirs.step()
    ours, optimizer = run(SGD, shape, lr=0.01)
    torch.testing.assert_close(ours, weight.detach(), **FLOAT32)
    assert not any(optimizer.state.values())


def test_sgd_averages_the_gradient_over_tokens():
    shape, half_life = (30, 40), 100.0
    weight, m, mass = start(shape).double().numpy(), 0.0, 0.0
    for step, gradient in enumerate(gradients(shape)):
        beta = 2.0 ** (-(5 + step) / half_life)
        m, mass = beta * m + (1 - beta) * gradient.double().numpy(), beta * mass + 1 - beta
        weight = weight * (1 - 0.01 * 0.2) - 0.01 * m / mass
    ours, _ = run(SGD, shape, lambda step: 5 + step, lr=0.01, momentum_half_life=half_life, weight_decay=0.2)
    np.testing.assert_allclose(ours.double().numpy(), weight, **FLOAT32)


def test_bfloat16_weights_follow_float32_weights_in_the_mean():
    """With tiny steps, rounding to nearest stands still; stochastic rounding moves as far as float32 on average."""
    steps, lr, count = 200, 1e-5, 128 * 256
    gradient = torch.ones(128, 256)
    moved = {}
    for name, dtype, stochastic in [("float32", torch.float32, False), ("sr", torch.bfloat16, True),
                                    ("nearest", torch.bfloat16, False)]:  # fmt: skip
        weight = torch.nn.Parameter(torch.ones(128, 256, dtype=dtype))
        optimizer = SGD([weight], lr=lr, stochastic_rounding=stochastic)
        for _ in range(steps):
            optimizer.tokens_per_step = 1
            weight.grad = gradient.to(dtype)
            optimizer.step()
        moved[name] = 1.0 - weight.detach().double().mean().item()
    assert moved["float32"] == pytest.approx(steps * lr, rel=1e-2)
    assert moved["nearest"] == 0.0
    # Below one, a bfloat16 step is 2 ** -8; its rounding noise has a standard deviation of at most half of that per update.
    standard_error = steps**0.5 * 2**-9 / count**0.5
    assert abs(moved["sr"] - steps * lr) < 5 * standard_error


def test_adafactor_factors_the_last_two_dimensions_where_optax_takes_the_largest_two():
    weight = torch.nn.Parameter(start((130, 4, 140)))
    optimizer = Adafactor([weight], lr=0.01)
    optimizer.tokens_per_step = 1
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert optimizer.state[weight]["second_moment"].shape == weight.shape  # 4 is below 128
    optax = pytest.importorskip("optax")
    jax = pytest.importorskip("jax")
    state = optax.scale_by_factored_rms(min_dim_size_to_factor=128).init(jax.numpy.zeros((130, 4, 140)))
    assert {state.v_row.shape, state.v_col.shape} == {(130, 4), (4, 140)}
