"""The Triton kernels against the reference; `test_kernels_cuda` runs this in processes of its own.

With `TRITON_INTERPRET=1` in the environment on CPU tensors, else on the GPU.
"""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests.unit.optim import cuda_interpreter  # noqa: F401

from collections.abc import Callable, Iterator  # noqa: E402
from types import ModuleType  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from torch import Tensor  # noqa: E402

from sbft.optim.kernels import cuda, cuda_elementwise, cuda_plans, cuda_programs, reference  # noqa: E402
from sbft.optim.sharding import Shard  # noqa: E402
from sbft.rounding import noise_from_key, noise_key, signed_32, stochastic_round  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
KEY = noise_key(seed=11, step=5, parameter=3)
BF16, F32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.filterwarnings("ignore")  # NumPy warns where the hash wraps around, as intended


Shape = tuple[int, ...]


def randn(shape: Shape, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def transposed(gradient: Tensor) -> Tensor:
    return gradient.mT.contiguous().mT


def every_other_column(gradient: Tensor) -> Tensor:
    return torch.stack((gradient, torch.full_like(gradient, torch.nan)), dim=-1).flatten(-2)[..., ::2]


def first_row_everywhere(gradient: Tensor) -> Tensor:
    return gradient[..., :1, :].expand(gradient.shape)


LAYOUTS: list[Callable[[Tensor], Tensor]] = [transposed, every_other_column, first_row_everywhere]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[None]:
    """In the interpreter, time grows with the size of a tile; with smaller tiles, small tensors have several."""
    if INTERPRETED and not request.node.name.startswith("test_plan"):
        change(monkeypatch, TILE_COLUMNS=128, SUM_ROWS=32, APPLY_ROWS=16, BLOCK=512)
    yield
    forget()


def change(monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """Change values of the module, and forget what was made with the old ones."""
    for name, value in values.items():
        monkeypatch.setattr(cuda_plans, name, value)
    forget()


def forget() -> None:
    for cached in (cuda_plans.factored_plan, cuda_plans.factored_launches, cuda_plans.line_launches):
        cached.cache_clear()


class Update(NamedTuple):
    """A function of both backends, the shapes of its state (None: absent), and its settings."""

    function: str
    state: Callable[[Shape], list[Shape | None]]
    settings: dict[str, Any]
    carries: bool = False  # takes and returns the weight's sum of squares


COMMON = {"lr": 0.02, "weight_decay": 0.1, "key": KEY}
ADAFACTOR = {**COMMON, "average_weight": 0.25, "relative_step": True, "clip_threshold": 1.0, "eps": 1e-30}
ADAMW = {**COMMON, "first_weight": 0.1, "second_weight": 0.25, "eps": 1e-8}
FACTORED = Update("adafactor_factored", lambda s: [s[:-1], s[:-2] + s[-1:], ()], ADAFACTOR, carries=True)
FULL = Update("adafactor_full", lambda s: [s, ()], ADAFACTOR, carries=True)
ELEMENTWISE = {
    "adamw": Update("adamw", lambda s: [s, s, (), ()], ADAMW),
    "adamw, beta1 = 0": Update("adamw", lambda s: [None, s, (), ()], {**ADAMW, "first_weight": 1.0}),
    "sgd": Update("sgd", lambda s: [None, None], {**COMMON, "momentum_weight": 1.0}),
    "sgd, momentum": Update("sgd", lambda s: [s, ()], {**COMMON, "momentum_weight": 0.1}),
}
UPDATES = {"factored": FACTORED, "full": FULL, **ELEMENTWISE}


class Run:
    """One parameter and its update: on the backend under test, or on the reference, which stays on the CPU."""

    def __init__(self, backend: ModuleType, update: Update, shape: Shape, dtype: torch.dtype, **changes: Any) -> None:
        self.device = DEVICE if backend is cuda else torch.device("cpu")
        self.function, self.carries = getattr(backend, update.function), update.carries
        self.settings = {**update.settings, **changes}
        self.weight = randn(shape, dtype).to(self.device)
        self.state = [None if s is None else torch.zeros(s, device=self.device) for s in update.state(shape)]
        self.known: Tensor | None = None

    def step(self, grad: Tensor) -> Tensor:
        """Update with `grad`, whose strides are kept; returns the sum of its squares."""
        if grad.device != self.device:
            flat = torch.empty(
                grad.untyped_storage().size() // grad.element_size(), dtype=grad.dtype, device=self.device
            )
            flat.copy_(grad.as_strided(flat.shape, (1,), 0))
            grad = flat.as_strided(grad.shape, grad.stride(), grad.storage_offset())
        if not self.carries:
            return self.function(self.weight, grad, *self.state, **self.settings).cpu()
        total, self.known = self.function(self.weight, grad, *self.state, self.known, **self.settings)
        return total.cpu()

    def tensors(self) -> list[Tensor]:
        return [t.detach().cpu().clone() for t in (self.weight, *self.state) if t is not None]


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Assert equality except for the order of sums: within one step of bfloat16, or a few of float32."""
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2.0**-7 if ours.dtype == BF16 else 3e-6, atol=1e-7)
    if ours.dtype == BF16:  # sums make only a few values round differently
        assert (ours != theirs).sum() <= 1 + 0.01 * ours.numel()


def compare(
    update: Update, shape: Shape, dtype: torch.dtype, layout: Any = None, steps: int = 2, **changes: Any
) -> None:
    ours, theirs = (Run(backend, update, shape, dtype, **changes) for backend in (cuda, reference))
    for step in range(steps):
        grad = randn(shape, dtype, seed=step + 1)
        grad = grad if layout is None else layout(grad)
        torch.testing.assert_close(ours.step(grad), theirs.step(grad), rtol=2e-6, atol=0.0)
    for a, b in zip(ours.tensors(), theirs.tensors(), strict=True):
        assert_close(a, b)
    if theirs.known is None:
        assert ours.known is None
    else:
        torch.testing.assert_close(ours.known.cpu(), theirs.known, rtol=1e-5, atol=0.0)


def compare_bits(update: Update, shape: Shape, dtype: torch.dtype, grads: list[Tensor], **changes: Any) -> None:
    """Like `compare`, where sums are exact or have no influence: all bits must be equal."""
    ours, theirs = (Run(backend, update, shape, dtype, **changes) for backend in (cuda, reference))
    for grad in grads:
        theirs.known = theirs.weight.float().square().sum() if update.carries else None
        ours.known = None if theirs.known is None else theirs.known.to(DEVICE)
        ours.step(grad)
        theirs.step(grad)
        assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))


# Rounding


@triton.jit
def write_noise(out, base, key_0, key_1, SIZE: tl.constexpr, ALIGNED: tl.constexpr, INDEX: tl.constexpr):
    lane = tl.arange(0, SIZE)
    noise = cuda_programs.noise_bits(base.to(INDEX), lane, key_0, key_1, ALIGNED)
    tl.store(out + lane, noise.to(tl.int32))


@pytest.mark.parametrize("offset", [32, 7, 2**31 - 64, 2**31 - 3, 2**33 - 64, 2**33 - 5, 2**36 + 32, 2**36 + 9])
def test_noise_is_that_of_the_definition_at_every_offset(offset: int) -> None:
    out = torch.empty(128, dtype=torch.int32, device=DEVICE)
    index = tl.int32 if offset < 1 << 30 else tl.int64
    write_noise[(1,)](out, offset, *map(signed_32, KEY), SIZE=128, ALIGNED=offset % 32 == 0, INDEX=index)
    assert torch.equal(out.cpu(), noise_from_key(KEY, 128, offset))


@triton.jit
def write_rounded(out, values, noise, SIZE: tl.constexpr, STOCHASTIC: tl.constexpr):
    lane = tl.arange(0, SIZE)
    bits = cuda_programs.bfloat16_bits(tl.load(values + lane), tl.load(noise + lane).to(tl.uint32), STOCHASTIC)
    tl.store(out + lane, bits.to(tl.bfloat16, bitcast=True))


@pytest.mark.parametrize("stochastic", [True, False])
def test_rounding_of_any_bits(stochastic: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=generator, dtype=torch.int64).to(torch.int32)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4028e38, -3.4028e38, 1e-40, 1.00390625, 1.01171875]
    values = torch.cat((torch.tensor(special), bits.view(F32)))[:4096].contiguous()
    values[100], values[101] = torch.tensor([0x7F800001, -1], dtype=torch.int32).view(F32)  # NaN that a carry breaks
    noise = torch.randint(0, 65536, (4096,), generator=generator, dtype=torch.int32)
    out = torch.empty(4096, dtype=BF16, device=DEVICE)
    write_rounded[(1,)](out, values.to(DEVICE), noise.to(DEVICE), SIZE=4096, STOCHASTIC=stochastic)
    expected = stochastic_round(values, noise) if stochastic else values.to(BF16)
    assert torch.equal(out.cpu().isnan(), expected.isnan())
    number = ~expected.isnan()
    assert torch.equal(out.cpu()[number].view(torch.int16), expected[number].view(torch.int16))


# Against the reference


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("shape", [(1, 1), (33, 257), (64, 96), (2, 40, 130), (2, 2, 17, 32)])
def test_factored(shape: Shape, dtype: torch.dtype) -> None:
    compare(FACTORED, shape, dtype)


def test_factored_like_an_embedding() -> None:
    compare(FACTORED, (300, 32), BF16, steps=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_factored_with_gradients_of_any_strides(layout: Callable[[Tensor], Tensor]) -> None:
    compare(FACTORED, (2, 40, 64), BF16, layout)


def test_factored_with_rows_without_gradient_beside_huge_ones() -> None:
    def few_rows(gradient: Tensor) -> Tensor:
        return torch.where(torch.arange(len(gradient))[:, None] < 7, gradient * 1e16, 0.0)

    for dtype in (BF16, F32):
        compare(FACTORED, (40, 64), dtype, few_rows)


@pytest.mark.parametrize("update", [FACTORED, FULL])
@pytest.mark.parametrize("changes", [{"key": None}, {"relative_step": False}, {"clip_threshold": 0.1}])
def test_settings_of_adafactor(update: Update, changes: dict[str, Any]) -> None:
    compare(update, (40, 100), BF16, **changes)


def test_factored_with_several_tiles_and_rounds_of_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, MAX_PROGRAMS=2)
    compare(FACTORED, (100, 270), BF16, steps=1)
    compare(FACTORED, (1, 128 * 33), BF16, steps=1)  # more partial row sums than are added at once


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("key", [KEY, None])
def test_factored_has_equal_bits_where_sums_are_exact(dtype: torch.dtype, key: Any) -> None:
    grads = [randn((128, 256), F32, seed=seed).round().to(dtype) for seed in (1, 2)]  # whole numbers
    compare_bits(FACTORED, (128, 256), dtype, grads, average_weight=0.5, clip_threshold=1e9, key=key)


ELEMENTWISE_CASES = {"full": FULL, **ELEMENTWISE}


@pytest.mark.parametrize("name", ELEMENTWISE_CASES)
@pytest.mark.parametrize("shape", [(1,), (5, 7, 9), (3000,)])
def test_elementwise_updates_have_equal_bits(name: str, shape: Shape) -> None:
    update = ELEMENTWISE_CASES[name]
    changes = {"clip_threshold": 1e9} if update.carries else {}  # never clipped, so that no sum has an influence
    for dtype in (BF16, F32):
        compare_bits(update, shape, dtype, [randn(shape, dtype, seed=seed) for seed in (1, 2)], **changes)


@pytest.mark.parametrize("name", ELEMENTWISE_CASES)
def test_elementwise_updates_with_gradients_of_any_strides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for alone in (8, 0):
        change(monkeypatch, ALONE_BLOCKS=alone)
        for layout in LAYOUTS:
            compare(ELEMENTWISE_CASES[name], (3, 40, 20), BF16, layout)


@pytest.mark.parametrize("name", ELEMENTWISE_CASES)
def test_elementwise_updates_shared_by_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, ALONE_BLOCKS=0)
    change(monkeypatch, MAX_PROGRAMS=3)
    compare(ELEMENTWISE_CASES[name], (3000,), BF16)


@pytest.mark.parametrize("name", UPDATES)
def test_offsets_of_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, index_type=lambda *sizes: tl.int64)
    compare(UPDATES[name], (40, 70), BF16)
    compare(UPDATES[name], (40, 64), BF16, transposed)


def test_offsets_have_64_bits_where_32_do_not_reach() -> None:
    assert cuda_plans.index_type((1, 70000, 70000), (1, 70000, 1), 0) == tl.int64
    assert (
        cuda_plans.index_type((1, 8, 8), (0, 1 << 28, 1), 0) == tl.int64
    )  # a gradient that is a view of something large
    assert cuda_plans.index_type((1, 8, 8), (64, 8, 1), 0) == tl.int32
    assert (
        cuda_plans.index_type((1, 8, 8), (64, 8, 1), 1 << 30) == tl.int64
    )  # the noise of a shard depends on the global index


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("alone", [8, 0])
def test_numbers_on_the_device_make_the_same_update(name: str, alone: int, monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch, ALONE_BLOCKS=alone)
    there = torch.tensor([0, *map(signed_32, KEY)], dtype=torch.int32, device=DEVICE)
    weights = [setting for setting in UPDATES[name].settings if setting.endswith("_weight")]
    given = (0.0123, *(0.07 + 0.01 * i for i in range(len(weights))))
    lr, *others = torch.tensor([0.0, *given], dtype=torch.float64, device=DEVICE)[1:].unbind()
    numbers, numbers_there = dict(zip(weights, given[1:], strict=True)), dict(zip(weights, others, strict=True))
    for dtype, key, key_there in ((BF16, KEY, (there[1], there[2])), (F32, None, None)):
        plain = Run(cuda, UPDATES[name], (40, 70), dtype, lr=0.0123, key=key, **numbers)
        captured = Run(cuda, UPDATES[name], (40, 70), dtype, lr=lr, key=key_there, **numbers_there)
        for seed in range(3):
            grad = randn((40, 70), dtype, seed=seed)
            assert torch.equal(plain.step(grad), captured.step(grad))
        assert all(torch.equal(a, b) for a, b in zip(plain.tensors(), captured.tensors(), strict=True))


# What every update guarantees


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("shape", [(33, 257), (2, 32, 128), (3000,)])
def test_a_shard_is_updated_as_the_reference_updates_it(
    name: str, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two ranks with the same gradients: sums over both are twice those of one."""
    if name == "factored" and len(shape) == 1:
        pytest.skip("has no rows and columns")
    whole = torch.Size([2 * shape[0], *shape[1:]])
    shard = Shard(whole.numel() // 2, whole, lambda message: message.mul_(2))
    compare(UPDATES[name], shape, BF16, shard=shard)


@pytest.mark.parametrize("name", UPDATES)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for alone in (8, 0):
        change(monkeypatch, ALONE_BLOCKS=alone)
        run = Run(cuda, UPDATES[name], (40, 64), BF16)
        good, grad = randn((40, 64), BF16, seed=1), randn((40, 64), BF16, seed=2)
        grad[39, 63] = bad
        for last in (False, True):  # before the first update, and after it
            before, known = run.tensors(), run.known
            assert not torch.isfinite(run.step(grad))
            assert all(torch.equal(a, b) for a, b in zip(run.tensors(), before, strict=True))
            if known is not None:
                assert run.known is not None and torch.equal(run.known, known)
            if not last:
                run.step(good)


@pytest.mark.parametrize("name", ["factored", "full"])
def test_a_measured_sum_of_squares_has_the_bits_of_the_carried_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for alone in (8, 0):
        change(monkeypatch, ALONE_BLOCKS=alone)
        runs = [Run(cuda, UPDATES[name], (33, 70), BF16) for _ in range(2)]
        for seed in range(2):
            for run in runs:
                run.step(randn((33, 70), BF16, seed=seed))
            runs[1].known = None  # as after a resume
        for run in runs:
            run.step(randn((33, 70), BF16, seed=3))
        assert runs[0].known is not None and runs[1].known is not None
        assert torch.equal(runs[0].known, runs[1].known)
        assert all(torch.equal(a, b) for a, b in zip(runs[0].tensors(), runs[1].tensors(), strict=True))


def test_weights_that_are_not_contiguous_are_updated_too() -> None:
    for name, update in UPDATES.items():
        ours, theirs = (Run(backend, update, (20, 30), BF16) for backend in (cuda, reference))
        ours.weight = transposed(ours.weight)
        grad = randn((20, 30), BF16, seed=1)
        ours.step(grad), theirs.step(grad)
        assert_close(ours.weight.cpu(), theirs.weight), name


MODEL_SHAPES = [
    (1, 1, 1), (1, 128, 128), (1, 576, 1536), (1, 2048, 2048), (1, 4096, 4096), (1, 4096, 11008), (1, 11008, 4096),
    (1, 4096, 14336), (1, 14336, 4096), (1, 128256, 4096), (1, 128256, 2048), (1, 49152, 576), (1, 262144, 640),
    (1, 640, 262144), (1, 3_000_000, 128), (64, 1024, 4096), (128, 128, 128), (1, 128, 3_000_000),
]  # fmt: skip


@pytest.mark.parametrize("shape", MODEL_SHAPES)
@pytest.mark.parametrize("element_size", [2, 4])
def test_plan_needs_little_memory(shape: tuple[int, int, int], element_size: int) -> None:
    stack, rows, columns = shape
    plan = cuda_plans.factored_plan(*shape, element_size)
    tensor = stack * rows * columns * element_size
    assert 4 * plan.scratch + 512 <= max(1 << 20, 0.01 * tensor + 4 * stack * (rows + columns))
    assert (
        plan.row_groups * plan.tiles * cuda_plans.SUM_ROWS >= rows
        and plan.column_groups * cuda_plans.TILE_COLUMNS >= columns
    )
    assert plan.apply_groups * plan.apply_tiles * cuda_plans.APPLY_ROWS >= rows


def test_plan_of_an_elementwise_update_needs_little_memory() -> None:
    line = cuda_plans.LineLaunches((1, 1, 1 << 33), None, None, cuda_elementwise.apply_full, {"CAPTURED": False})
    assert line.section * 3 * 4 <= 1 << 20


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
@pytest.mark.parametrize("name", UPDATES)
def test_launches_that_repeat_have_the_bits_of_the_first(name: str) -> None:
    """From the second update of a kind of weight on, Triton no longer inspects the arguments; this also holds for tensors
    with another alignment than those it was compiled for."""
    if UPDATES[name] is FACTORED:
        shape: Shape = (40, 70)
    else:
        shape = (3, 50, 130)
    for first_offset, offset in ((0, 0), (0, 1), (1, 0)):
        forget()
        results = []
        for shift in (first_offset, offset, offset):
            run = Run(cuda, UPDATES[name], shape, BF16)
            moved = torch.empty(run.weight.numel() + shift, dtype=BF16, device=DEVICE)[shift:].view(shape)
            run.weight = moved.copy_(run.weight)
            for seed in range(2):
                run.step(randn(shape, BF16, seed=seed))
            results.append(run.tensors())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="there is no device to wait for")
def test_no_update_waits_for_the_device() -> None:
    runs = [Run(cuda, update, (200, 300), BF16) for update in UPDATES.values()]
    grad = randn((200, 300), BF16, seed=1).to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run in runs:
            arguments = (run.known,) if run.carries else ()
            run.function(run.weight, grad, *run.state, *arguments, **run.settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
