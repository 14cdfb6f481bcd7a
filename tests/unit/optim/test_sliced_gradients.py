"""An update from slices of a gradient equals that from the whole gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sbft.grid.formats import INT4, INT8, INT12
from sbft.grid.weight import GridWeight
from sbft.native.memory import stored_tensors
from sbft.optim import SGD, Adafactor, AdamW, RowAdafactor
from sbft.optim.kernels.sliced import height_of_compiled_slices
from sbft.optim.vocabulary import OuterProduct, SlicedGradient, TokenRows

VOCABULARY, WIDTH, TOKENS = 3001, 160, 24
SHAPE = torch.Size((VOCABULARY, WIDTH))
FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int12": INT12, "int8": INT8, "int4": INT4}
SOURCES = ("product", "rows", "both")


def make_weight(name: str) -> nn.Parameter:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * 0.02
    storage = FORMATS[name]
    return nn.Parameter(values.to(storage) if isinstance(storage, torch.dtype) else GridWeight.of(values, storage))


def values_of(weight: Tensor) -> Tensor:
    return weight.dequantize(torch.float32) if isinstance(weight, GridWeight) else weight.detach().float().clone()


def make_gradient(source: str, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, SlicedGradient]:
    """The whole gradient, as the backward of loss and embedding makes it, and the same in slices. Some tokens are repeated."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    left, right, values = random(VOCABULARY, TOKENS), random(TOKENS, WIDTH), random(TOKENS, WIDTH)
    index = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    index[[3, 9, 20]] = int(index[0])
    index[5] = VOCABULARY - 1
    whole = left @ right
    if source == "rows":
        whole = torch.ops.aten.embedding_dense_backward(values, index, VOCABULARY, -1, False)
    elif source == "both":
        whole.index_add_(0, index, values)
    sliced = SlicedGradient(SHAPE, None if source == "rows" else OuterProduct(left, right), None)
    if source != "product":
        sliced = sliced.with_rows(torch.sparse_coo_tensor(index[None], values, SHAPE, check_invariants=True))
    return whole, sliced


def step(optimizer: Any, weight: Tensor, gradient: Tensor | SlicedGradient) -> None:
    optimizer.tokens_per_step = TOKENS
    if isinstance(gradient, SlicedGradient):
        optimizer.hand_over(weight, gradient)
    else:
        weight.grad = gradient
    optimizer.step()
    weight.grad = None


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adafactor_ends_in_the_same_bits(format_name: str, source: str, weight_decay: float) -> None:
    plain, sliced = make_weight(format_name), make_weight(format_name)
    optimizers = [Adafactor([w], lr=1e-2, beta2=0.9, weight_decay=weight_decay) for w in (plain, sliced)]
    dtype = torch.float32 if format_name == "float32" else torch.bfloat16
    start = values_of(plain)
    for seed in range(3):
        whole, slices = make_gradient(source, dtype, seed)
        step(optimizers[0], plain, whole)
        step(optimizers[1], sliced, slices)
        assert torch.equal(values_of(plain), values_of(sliced))
        for name, value in optimizers[0].state[plain].items():
            assert torch.equal(value, optimizers[1].state[sliced][name]), name
        assert torch.equal(optimizers[0].grad_norm, optimizers[1].grad_norm)
    assert not torch.equal(start, values_of(plain))


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("source", SOURCES)
def test_sgd_moves_weights_by_the_same_bits(format_name: str, source: str) -> None:
    plain, sliced = make_weight(format_name), make_weight(format_name)
    optimizers = [SGD([w], lr=1e-2, weight_decay=0.1) for w in (plain, sliced)]
    start = values_of(plain)
    whole, slices = make_gradient(source, torch.float32 if format_name == "float32" else torch.bfloat16)
    step(optimizers[0], plain, whole)
    step(optimizers[1], sliced, slices)
    assert torch.equal(values_of(plain), values_of(sliced)) and not torch.equal(start, values_of(plain))
    # Squares are added in a different order: half a million of them, 16 at a time, in float32.
    assert optimizers[1].grad_norm.item() == pytest.approx(optimizers[0].grad_norm.item(), rel=2e-6)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_adafactor_follows_the_formulas_in_float64(source: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """arXiv 1804.04235, algorithm 4, with eps on every element, also in rows without gradient."""
    monkeypatch.setenv("SBFT_KERNELS", "" if backend == "compiled" else "reference")
    weight, lr, eps = make_weight("float32"), 1e-2, 1e-3  # an eps large enough to matter
    optimizer = Adafactor([weight], lr=lr, beta2=0.75, eps=eps, clip_threshold=0.5)
    value, row, column, mass = values_of(weight).double(), torch.zeros(VOCABULARY), torch.zeros(WIDTH), 0.0
    row, column = row.double(), column.double()
    for seed in range(2):
        whole, slices = make_gradient(source, torch.float32, seed)
        step(optimizer, weight, slices)
        square = whole.double().square()
        row += 0.25 * (square.mean(1) + eps - row)
        column += 0.25 * (square.mean(0) + eps - column)
        mass += 0.25 * (1 - mass)
        update = whole.double() / torch.outer(row / row.mean(), column / mass).sqrt()
        clip = max(1.0, update.square().mean().sqrt().item() / 0.5)
        value -= lr * max(value.square().mean().sqrt().item(), 1e-3) / clip * update
        assert optimizer.grad_norm.item() == pytest.approx(square.sum().sqrt().item(), rel=1e-6)
    torch.testing.assert_close(optimizer.state[weight]["row"].double(), row, rtol=1e-5, atol=0)
    torch.testing.assert_close(optimizer.state[weight]["column"].double(), column, rtol=1e-5, atol=0)
    torch.testing.assert_close(values_of(weight).double(), value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("format_name", ["bfloat16", "int8", "int4"])
def test_rows_without_gradient_stay_and_their_average_decays(format_name: str) -> None:
    weight = make_weight(format_name)
    optimizer = Adafactor([weight], lr=1e-1, beta2=0.5)
    _, slices = make_gradient("rows", torch.bfloat16)
    step(optimizer, weight, slices)
    before, average = values_of(weight), optimizer.state[weight]["row"].clone()
    other = torch.tensor([int(i) for i in range(VOCABULARY) if i not in slices.rows.index.tolist()])
    again = SlicedGradient(SHAPE, None, TokenRows(other[:1], torch.ones(1, WIDTH, dtype=torch.bfloat16)))
    step(optimizer, weight, again)
    changed = (values_of(weight) != before).any(1)
    assert changed.nonzero().flatten().tolist() == other[:1].tolist()
    index = slices.rows.index
    torch.testing.assert_close(optimizer.state[weight]["row"][index], average[index] / 2)


@pytest.mark.parametrize("optimizer_class", [Adafactor, SGD])
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("backend", ["compiled", "reference"])
def test_a_gradient_that_is_not_finite_changes_nothing(
    optimizer_class: Any, source: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBFT_KERNELS", "" if backend == "compiled" else "reference")
    weight = make_weight("bfloat16")
    optimizer = optimizer_class([weight], lr=1e-2)
    _, slices = make_gradient(source, torch.bfloat16)
    step(optimizer, weight, slices)
    before, state = values_of(weight), {name: value.clone() for name, value in optimizer.state[weight].items()}
    (slices.rows.values if slices.rows is not None else slices.product.right)[-1, -1] = math.inf
    step(optimizer, weight, slices)
    assert torch.equal(values_of(weight), before) and optimizer.nonfinite_gradients == 1
    assert all(torch.equal(optimizer.state[weight][name], value) for name, value in state.items())


def test_threads_do_not_change_a_bit() -> None:
    ends, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            weight = make_weight("bfloat16")
            step(Adafactor([weight], lr=1e-2), weight, make_gradient("both", torch.bfloat16)[1])
            ends.append(values_of(weight))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*ends)


def test_only_updates_that_need_sums_alone_take_slices() -> None:
    weight, vector = make_weight("bfloat16"), nn.Parameter(torch.zeros(200, dtype=torch.bfloat16))
    assert Adafactor([weight]).takes_slices(weight) and SGD([weight]).takes_slices(weight)
    refused = [
        (Adafactor([vector]), vector),
        (Adafactor([weight], min_dim_size_to_factor=WIDTH + 1), weight),
        (Adafactor([vector]), weight),  # not one of its parameters
        (SGD([weight], momentum=0.9), weight),
        (AdamW([weight]), weight),
        (RowAdafactor([weight]), weight),
    ]
    for optimizer, param in refused:
        assert not optimizer.takes_slices(param)
        with pytest.raises(ValueError, match="takes_slices"):
            optimizer.hand_over(param, make_gradient("rows", torch.bfloat16)[1])


def test_a_step_that_is_skipped_drops_what_was_handed_over() -> None:
    weight = make_weight("bfloat16")
    optimizer = Adafactor([weight], lr=1e-2)
    before = values_of(weight)
    optimizer.hand_over(weight, make_gradient("both", torch.bfloat16)[1])
    optimizer.skip_step()
    optimizer.tokens_per_step = TOKENS
    optimizer.step()
    assert torch.equal(values_of(weight), before)


@pytest.mark.parametrize("format_name", ["bfloat16", "int4"])
@pytest.mark.parametrize("shape", [(VOCABULARY, WIDTH), (260, 128), (4100, 4096)])
def test_the_planner_knows_how_many_rows_a_slice_has(
    format_name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    heights: list[int] = []
    slices = SlicedGradient.slices

    def look(self: SlicedGradient, height: int) -> Any:
        heights.append(height)
        return slices(self, height)

    monkeypatch.setattr(SlicedGradient, "slices", look)
    values, storage = torch.full(shape, 0.02), FORMATS[format_name]
    weight = nn.Parameter(values.to(storage) if isinstance(storage, torch.dtype) else GridWeight.of(values, storage))
    left, right = (torch.full(size, 0.1, dtype=torch.bfloat16) for size in ((shape[0], 2), (2, shape[1])))
    step(Adafactor([weight], beta2=0.9), weight, SlicedGradient(torch.Size(shape), OuterProduct(left, right), None))
    size = sum(tensor.nbytes for tensor in stored_tensors(weight))
    assert heights == [height_of_compiled_slices(*shape, size, torch.get_num_threads())] * 3
