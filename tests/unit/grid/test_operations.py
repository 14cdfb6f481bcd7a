"""Operations on a weight on a grid return, bit for bit, the same as on a bfloat16 weight of the same values."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sbft.grid import operations
from sbft.grid.tensor import GridTensor
from tests.unit.grid.cases import FORMATS, pair

Use = Callable[[Tensor, Tensor], Tensor]
OFFSETS = torch.tensor([2, 2, 5, 6], dtype=torch.int32)  # the second expert has no rows
BIAS = torch.linspace(-1, 1, 96, dtype=torch.bfloat16)

MATRIX: dict[str, tuple[tuple[int, ...], Use]] = {
    "linear": ((5, 64), lambda w, x: F.linear(x, w)),
    "linear with bias": ((2, 5, 64), lambda w, x: F.linear(x, w, BIAS)),
    "linear of a vector": ((64,), lambda w, x: F.linear(x, w)),
    "linear of no rows": ((1, 0, 64), lambda w, x: F.linear(x, w, BIAS)),
    "linear of one row": ((1, 1, 64), lambda w, x: F.linear(x, w, BIAS)),
    "linear, strided": ((64, 7), lambda w, x: F.linear(x.T, w)),
    "addmm": ((5, 96), lambda w, x: torch.addmm(BIAS[:64], x, w)),
    "mm from the left": ((64, 5), lambda w, x: w @ x),
    "matmul, transposed": ((3, 5, 64), lambda w, x: torch.matmul(x, w.T)),
    "rows": ((5, 64), lambda w, x: F.linear(x, w[30:70])),
    "rows of the transposed": ((5, 64), lambda w, x: x @ w.t()[:, 30:70]),
    "pieces": ((5, 64), lambda w, x: torch.cat([F.linear(x, part) for part in w.split(40)], -1)),
    "used twice": ((5, 64), lambda w, x: F.linear(x, w) @ w),
    "with itself": ((5, 96), lambda w, x: x @ (w @ w.T)),
    "one row": ((64,), lambda w, x: w[3] * x),
}
EXPERTS: dict[str, tuple[tuple[int, ...], Use]] = {
    "expert": ((6, 64), lambda w, x: F.linear(x, w[2])),
    "expert by tensor": ((6, 64), lambda w, x: F.linear(x, w[torch.tensor(1)])),
    "experts by tensor": ((3, 64, 1), lambda w, x: torch.bmm(w[torch.tensor([0, -1, 1])], x)),
    "grouped": ((6, 64), lambda w, x: F.grouped_mm(x, w.transpose(-2, -1), offs=OFFSETS)),
    "grouped, not swapped": ((6, 96), lambda w, x: F.grouped_mm(x, w, offs=OFFSETS)),
    "batched": ((4, 6, 64), lambda w, x: torch.bmm(x, w.mT)),
    "broadcast": ((6, 64), lambda w, x: torch.matmul(x, w.mT)),
    "half of each": ((6, 64), lambda w, x: F.linear(x, w[:, 48:][3])),
    "chunks": ((6, 64), lambda w, x: F.linear(x, w.chunk(2, dim=1)[1][0])),
    "unbound": ((6, 64), lambda w, x: F.linear(x, w.unbind(0)[3])),
    "as one matrix": ((6, 64), lambda w, x: F.linear(x, w.view(-1, 64))),
}
CASES = [((96, 64), *case) for case in MATRIX.items()] + [((4, 96, 64), *case) for case in EXPERTS.items()]


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_warned", set())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(("shape", "name", "case"), CASES, ids=[name for _, name, _ in CASES])
def test_equals_bfloat16_forward_and_backward(
    form: str, shape: tuple[int, ...], name: str, case: tuple[tuple[int, ...], Use]
) -> None:
    weight, plain = pair(shape, form)
    size, use = case
    results = []
    for parameter in (weight, plain):
        x = torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        result = use(parameter, x)
        assert type(result) is Tensor
        torch.manual_seed(2)
        result.backward(torch.randn_like(result))
        results.append((result, x.grad, parameter.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None and type(ours) is Tensor
        assert torch.equal(ours, theirs)
        assert ours.stride() == theirs.stride()


@pytest.mark.parametrize("name", MATRIX)
def test_products_copy_no_weight_without_a_buffer(name: str, warned: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if name == "one row":
            pytest.skip("multiplies elements, which does copy")
        size, use = MATRIX[name]
        use(pair()[0], torch.randn(size).bfloat16().requires_grad_()).sum().backward()


@pytest.mark.parametrize("settings", [{}, {"padding_idx": 5}, {"scale_grad_by_freq": True}, {"sparse": True}])
@pytest.mark.parametrize("form", FORMATS)
def test_embedding_equals_bfloat16(form: str, settings: dict[str, int]) -> None:
    weight, plain = pair(form=form)
    ids = torch.tensor([[3, 5, 3], [0, 95, 1]])
    gradient = torch.randn(2, 3, 64).bfloat16()
    for parameter in (weight, plain):
        F.embedding(ids, parameter, **settings).backward(gradient)
    assert torch.equal(F.embedding(ids, weight), F.embedding(ids, plain))
    assert weight.grad is not None and plain.grad is not None
    assert weight.grad.layout == plain.grad.layout
    assert torch.equal(weight.grad.to_dense(), plain.grad.to_dense())


def test_embedding_refuses_a_token_beyond_the_vocabulary() -> None:
    for token in (96, -1):
        with pytest.raises(IndexError):
            F.embedding(torch.tensor([token]), pair()[0])


def test_embedding_renormalizes_in_place_as_bfloat16_does(warned: None) -> None:
    weight, plain = pair()
    with pytest.warns(UserWarning, match="aten::embedding_renorm_.*nearest value on the grid"):
        F.embedding(torch.tensor([3]), weight, max_norm=1.0)
    F.embedding(torch.tensor([3]), plain, max_norm=1.0)
    spacing = plain[3].abs().max() / 127
    assert (weight.dequantize()[3] - plain[3]).abs().max() <= spacing
    assert weight.dequantize()[3].float().norm() < 1.1
    assert torch.equal(weight.dequantize()[4], plain[4])


def test_inference_mode_gives_the_same() -> None:
    weight, plain = pair()
    x, ids = torch.randn(2, 3, 64).bfloat16(), torch.tensor([4, 4, 0])
    with torch.inference_mode():
        assert torch.equal(F.linear(x, weight, BIAS), F.linear(x, plain, BIAS))
        assert torch.equal(F.embedding(ids, weight), F.embedding(ids, plain))
    result = F.linear(x, weight, BIAS)  # uses the buffer that was made there
    result.sum().backward()
    assert torch.equal(result, F.linear(x, plain, BIAS))


def test_what_is_not_known_is_done_on_copies_with_one_warning(warned: None) -> None:
    weight, plain = pair()
    with pytest.warns(UserWarning, match="aten::mul.Tensor has no implementation for weights on a grid") as said:
        first = (weight * 2).sum()
        second = (weight * 3).sum()
    assert len([one for one in said if "aten::mul.Tensor" in str(one.message)]) == 1
    (first + second).backward()
    ((plain * 2).sum() + (plain * 3).sum()).backward()
    assert weight.grad is not None and plain.grad is not None
    assert torch.equal(weight.grad, plain.grad)


def test_a_change_in_place_that_is_not_known_is_rounded_to_the_grid(warned: None) -> None:
    weight, plain = pair(form="int12")
    version = weight._version
    with torch.no_grad(), pytest.warns(UserWarning, match="aten::add_.Tensor.*nearest value on the grid"):
        weight.add_(torch.ones(96, 64), alpha=0.5)
        plain.add_(torch.ones(96, 64), alpha=0.5)
    assert weight._version == version + 1
    scale = weight.scales.float().repeat_interleave(64, -1)
    assert ((weight.dequantize(torch.float32) - plain.float()).abs() <= scale / 2).all()


def test_a_list_of_weights_is_changed_in_place(warned: None) -> None:
    weight, plain = pair(form="int12")
    with torch.no_grad(), pytest.warns(UserWarning, match="aten::_foreach_mul_"):
        torch._foreach_mul_([weight], 2.0)
    scale = weight.scales.float().repeat_interleave(64, -1)
    assert ((weight.dequantize(torch.float32) - 2 * plain.float()).abs() <= scale / 2).all()


def test_a_copy_in_place_of_a_view_says_that_it_is_one(warned: None) -> None:
    weight, _ = pair()
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="aten::view.*changing it in place does not change the weight"),
    ):
        weight.view(-1)


def test_views_of_rows_share_codes() -> None:
    weight, plain = pair(form="int12")
    with torch.no_grad():
        rows = weight[2:4]
        assert isinstance(rows, GridTensor)
        rows.copy_(torch.ones(2, 64))
        weight.t()[:, 5:6].copy_(torch.full((64, 1), 2.0))
    expected = plain.detach().clone()
    expected[2:4], expected[5] = 1.0, 2.0
    assert torch.equal(weight.dequantize(), expected)


def test_values_are_assigned_to_rows_and_elements() -> None:
    weight, plain = pair(form="int12")
    with torch.no_grad():
        weight[3] = 1.0
        weight[4:6] = torch.full((2, 64), 2.0)
        weight[:, 0] = 0.0
    dense = weight.dequantize()
    assert torch.equal(dense[3, 1:], torch.ones(63).bfloat16())
    assert torch.equal(dense[4:6, 1:], torch.full((2, 63), 2.0).bfloat16())
    assert not dense[:, 0].any() and dense[7:, 1:].any()
    with pytest.raises(RuntimeError, match="torch.no_grad"):
        weight[3] = 1.0


@pytest.mark.parametrize("operation", ["zeros_like", "ones_like", "empty_like", "randn_like"])
def test_what_is_made_alike_is_plain(operation: str) -> None:
    weight, plain = pair()
    for ours, theirs in ((weight, plain), (weight.t(), plain.t())):
        made, expected = getattr(torch, operation)(ours), getattr(torch, operation)(theirs)
        assert type(made) is Tensor
        assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert type(weight.new_zeros(3)) is Tensor and not weight.new_zeros(3).any()


def test_threads_do_not_share_the_buffer() -> None:
    pairs = [pair((256 + 32 * i, 128), seed=i) for i in range(4)]
    differences: list[int] = []

    def work(number: int) -> None:
        weight, plain = pairs[number]
        x = torch.randn(8, 128, generator=torch.Generator().manual_seed(number)).bfloat16()
        expected = F.linear(x, plain)
        differences.extend(i for i in range(200) if not torch.equal(F.linear(x, weight), expected))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differences == []


def test_a_product_with_no_rows_reads_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = pair()
    read: list[object] = []
    monkeypatch.setattr(operations, "borrow", read.append)
    rows = torch.empty(1, 0, 64, dtype=torch.bfloat16, requires_grad=True)
    F.linear(rows, weight).sum().backward()
    assert rows.grad is not None and not read
