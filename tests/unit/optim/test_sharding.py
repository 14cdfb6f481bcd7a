"""Updates of parameters that are sharded over several ranks, against the update of the whole parameter."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement

from sbft.optim import SGD, Adafactor, AdamW, Muon, RowAdafactor, SinkGD
from sbft.optim.base import TokenOptimizer
from sbft.optim.kernels import cpu, reference
from sbft.optim.sharding import Shard, is_sharded, whole
from sbft.rounding import noise_key

KEY = noise_key(1, 2, 3)
BACKENDS = {"reference": reference, "cpu": cpu}
ADAFACTOR = {"average_weight": 0.3, "relative_step": True, "clip_threshold": 1.0, "eps": 1e-30}
COMMON = {"lr": 1e-2, "weight_decay": 0.1}
# Rows that do not divide by the ranks, fewer rows than ranks (if factored), stacks of matrices, and vectors.
SHAPES = [(130, 129), (513, 200), (128, 300), (3, 128, 130), (70_001,), (5,), (3, 4, 5)]


class Ranks:
    """Ranks as threads, which meet to add up tensors."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._barrier = threading.Barrier(count, timeout=30)
        self._here: list[Tensor] = [torch.empty(0)] * count
        self.messages = 0

    def all_reduce(self, rank: int) -> Callable[[Tensor], None]:
        def add(tensor: Tensor) -> None:
            self._here[rank] = tensor.clone()
            self._barrier.wait()
            assert len({(one.shape, one.dtype) for one in self._here}) == 1
            total = torch.stack(self._here).sum(0)
            self._barrier.wait()
            tensor.copy_(total)
            if rank == 0:
                self.messages += 1

        return add

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        """The results of `work(rank)` on all ranks."""
        results: list[Any] = [None] * self.count

        def one(rank: int) -> None:
            try:
                results[rank] = work(rank)
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error
        return results


def update(kernels: Any, rule: str, weight: Tensor, grad: Tensor, shard: Shard | None, whole: torch.Size) -> Tensor:
    """Update `weight` twice, in place; returns the sum of the squared gradient."""
    settings: dict[str, Any] = {**COMMON, "key": KEY, "shard": shard}
    mass, total = torch.zeros(()), torch.zeros(())
    factored = rule == "adafactor" and len(whole) > 1 and min(whole[-2:]) >= 128
    state = [torch.zeros(weight.shape), torch.zeros(weight.shape)]
    if factored:
        state = [torch.zeros(weight.shape[:-1]), torch.zeros(weight.shape[:-2] + weight.shape[-1:])]
    known = None
    for _ in range(2):
        if factored:
            total, known = kernels.adafactor_factored(weight, grad, *state, mass, known, **ADAFACTOR, **settings)
        elif rule == "adafactor":
            total, known = kernels.adafactor_full(weight, grad, state[0], mass, known, **ADAFACTOR, **settings)
        elif rule == "adamw":
            second_mass = torch.zeros(()) + mass
            total = kernels.adamw(
                weight, grad, *state, mass, second_mass, first_weight=0.1, second_weight=0.02, eps=1e-8, **settings
            )
        else:
            total = kernels.sgd(weight, grad, None, None, momentum_weight=1.0, **settings)
    return torch.as_tensor(float(total))


def pieces(size: int, ranks: int) -> list[slice]:
    """Slices as torch cuts them: equal chunks, the last ones shorter or empty."""
    each = -(-size // ranks)
    return [slice(min(rank * each, size), min((rank + 1) * each, size)) for rank in range(ranks)]


def on_ranks(
    kernels: list[Any], rule: str, weight: Tensor, grad: Tensor, columns: int = 1
) -> tuple[Tensor, list[Tensor], int]:
    """The weight after its updates, the sums on all ranks, and the number of messages; `columns` ranks share each row."""
    ranks, rows = Ranks(len(kernels)), len(kernels) // columns
    row_groups, column_groups = [Ranks(columns) for _ in range(rows)], [Ranks(rows) for _ in range(columns)]
    cuts = [
        (here, ..., there) if weight.ndim > 1 else (here,)
        for here in pieces(weight.shape[0], rows)
        for there in pieces(weight.shape[-1], columns)
    ]
    weights = [weight[cut].clone(memory_format=torch.contiguous_format) for cut in cuts]
    grads = [grad[cut].clone(memory_format=torch.contiguous_format) for cut in cuts]

    def work(rank: int) -> Tensor:
        torch.set_num_threads(1)
        i, j = divmod(rank, columns)
        offset = cuts[rank][0].start * weight[:1].numel() + (cuts[rank][-1].start if columns > 1 else 0)
        over_columns = row_groups[i].all_reduce(j) if columns > 1 else None
        over_rows = column_groups[j].all_reduce(i) if columns > 1 and rows > 1 else None
        shard = Shard(offset, weight.shape, ranks.all_reduce(rank), over_columns, over_rows)
        return update(kernels[rank], rule, weights[rank], grads[rank], shard, weight.shape)

    totals = ranks.run(work)
    result = torch.empty_like(weight)
    for cut, part in zip(cuts, weights, strict=True):
        result[cut] = part
    return result, totals, ranks.messages


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rule", ["adafactor", "adamw", "sgd"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("ranks", "columns"), [(2, 1), (4, 1), (2, 2), (4, 4), (4, 2)])
def test_ranks_together_make_the_update_of_the_whole(
    backend: str, rule: str, shape: tuple[int, ...], ranks: int, columns: int
) -> None:
    if columns > 1 and len(shape) == 1:
        pytest.skip("a vector has no columns")
    generator = torch.Generator().manual_seed(sum(shape))
    weight, grad = (torch.randn(shape, generator=generator) for _ in range(2))
    kernels = BACKENDS[backend]
    for dtype in (torch.float32, torch.bfloat16):
        expected = weight.to(dtype, copy=True)
        total = update(kernels, rule, expected, grad.to(dtype), None, expected.shape)
        found, totals, _ = on_ranks([kernels] * ranks, rule, weight.to(dtype), grad.to(dtype), columns)
        assert all(torch.equal(one, totals[0]) for one in totals)
        torch.testing.assert_close(totals[0], total, rtol=1e-5, atol=0)
        if rule == "adafactor" and dtype == torch.float32:
            # Sums in a different order: a few float32 steps of the update, which is a hundredth of the weight.
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        elif rule == "adafactor":
            # Rounded up or down by the same noise, except for numbers very close to the threshold.
            different = found != expected
            assert different.float().mean() < 1e-3
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)
        else:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("rule", ["adafactor", "adamw", "sgd"])
def test_parts_of_rows_may_be_longer_than_what_a_thread_takes_at_a_time(rule: str) -> None:
    weight, grad = torch.randn(2, 3 * 2**15), torch.randn(2, 3 * 2**15)
    expected = weight.clone()
    total = update(cpu, rule, expected, grad, None, weight.shape)
    found, totals, _ = on_ranks([cpu, cpu], rule, weight, grad, columns=2)
    torch.testing.assert_close(totals[0], total, rtol=1e-5, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_backends_may_be_mixed_for_one_that_has_no_rows_uses_the_reference() -> None:
    weight, grad = torch.randn(130, 140), torch.randn(130, 140)
    whole = weight.clone()
    update(cpu, "adafactor", whole, grad, None, weight.shape)
    found, _, messages = on_ranks([cpu, reference], "adafactor", weight, grad)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-7)
    assert messages == 2 * 3  # in each update: column sums, row means, and the sums for the step
    whole_rows, _, messages = on_ranks([cpu, reference], "adafactor", weight, grad, columns=2)
    torch.testing.assert_close(whole_rows, whole, rtol=1e-6, atol=1e-7)
    assert messages == 2 * 2  # each rank computes the mean over all rows itself


def test_a_gradient_that_is_not_finite_on_one_rank_changes_nothing_on_any() -> None:
    weight, grad = torch.randn(130, 140), torch.randn(130, 140)
    grad[129, 3] = torch.inf
    for rule in ("adafactor", "adamw", "sgd"):
        for kernels in BACKENDS.values():
            found, totals, _ = on_ranks([kernels] * 2, rule, weight, grad)
            assert torch.equal(found, weight) and not any(torch.isfinite(total) for total in totals)


def test_an_error_between_ranks_is_raised_and_not_lost_in_compiled_code() -> None:
    def fail(tensor: Tensor) -> None:
        raise RuntimeError("the other rank is gone")

    weight = torch.randn(130, 140)
    with pytest.raises(RuntimeError, match="the other rank is gone"):
        update(cpu, "adafactor", weight[:65].clone(), weight[:65], Shard(0, weight.shape, fail), weight.shape)


# Parameters that torch has cut


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A process group of this process alone: each shard is the whole tensor, and everything else is as with more processes."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


MAKERS: dict[str, Callable[[Any], TokenOptimizer]] = {
    "adafactor": lambda params: Adafactor(params, lr=1e-2),
    "adamw": lambda params: AdamW(params, lr=1e-2),
    "sgd": lambda params: SGD(params, lr=1e-2, momentum=0.5),
    "row-adafactor": lambda params: RowAdafactor(params, lr=1e-2),
}


def parameters(mesh: DeviceMesh | None) -> list[nn.Parameter]:
    made = []
    for shape in [(140, 130), (140, 140), (2, 130, 128), (9,)]:
        value = torch.randn(shape, generator=torch.Generator().manual_seed(len(made)))
        made.append(nn.Parameter(value if mesh is None else distribute_tensor(value, mesh, [ShardPlacement(0)])))
    return made


def step(optimizer: TokenOptimizer, seed: int) -> None:
    optimizer.tokens_per_step = 50
    for i, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(100 * seed + i))
        shard = parameter.detach()
        if isinstance(shard, DTensor):
            grad = distribute_tensor(grad, shard.device_mesh, shard.placements)
        parameter.grad = grad
    optimizer.step()


@pytest.mark.parametrize("rule", MAKERS)
def test_a_state_goes_from_sharded_to_plain_parameters_and_back(rule: str, mesh: DeviceMesh) -> None:
    cut, plain = parameters(mesh), parameters(None)
    one, other = MAKERS[rule](cut), MAKERS[rule](plain)
    step(one, 1)
    assert all(is_sharded(value) for parameter in cut for value in one.state[parameter].values() if value.ndim)
    other.load_state_dict(one.whole_state_dict())
    assert not any(is_sharded(value) for parameter in plain for value in other.state[parameter].values())
    back = MAKERS[rule](cut)
    back.load_state_dict(other.state_dict())
    for parameter in cut:
        for name, value in one.state[parameter].items():
            found = back.state[parameter][name]
            assert is_sharded(found) == is_sharded(value) and torch.equal(whole(found), whole(value))
            if isinstance(value, DTensor):
                assert isinstance(found, DTensor) and found.placements == value.placements


@pytest.mark.parametrize("rule", MAKERS)
def test_sharded_parameters_are_updated_as_plain_ones(rule: str, mesh: DeviceMesh) -> None:
    cut, plain = parameters(mesh), parameters(None)
    one, other = MAKERS[rule](cut), MAKERS[rule](plain)
    for seed in range(3):
        step(one, seed)
        step(other, seed)
    assert one.grad_norm is not None and other.grad_norm is not None
    torch.testing.assert_close(one.grad_norm, other.grad_norm)
    for sharded, expected in zip(cut, plain, strict=True):
        torch.testing.assert_close(whole(sharded.detach()), expected.detach(), rtol=1e-6, atol=1e-7)


def test_columns_are_updated_and_another_cut_is_refused_by_name(mesh: DeviceMesh) -> None:
    value = torch.randn(140, 130)
    columns, plain = nn.Parameter(distribute_tensor(value, mesh, [ShardPlacement(1)])), nn.Parameter(value.clone())
    for parameter in (columns, plain):
        optimizer = Adafactor([parameter])
        step(optimizer, 0)
        if parameter is columns:
            placements = [optimizer.state[columns][name].placements for name in ("row", "column")]
            assert placements == [(Replicate(),), (ShardPlacement(0),)]
    torch.testing.assert_close(whole(columns.detach()), plain.detach(), rtol=1e-6, atol=1e-7)
    middle = nn.Parameter(distribute_tensor(torch.randn(3, 140, 130), mesh, [ShardPlacement(1)]))
    with pytest.raises(TypeError, match=r"shape \(3, 140, 130\).*Shard\(dim=1\).*first dimension"):
        step(Adafactor([middle]), 0)


def test_a_gradient_that_is_cut_otherwise_is_cut_as_its_parameter(mesh: DeviceMesh) -> None:
    value, grad = torch.randn(140, 130), torch.randn(140, 130)
    parameter, plain = nn.Parameter(distribute_tensor(value, mesh, [ShardPlacement(0)])), nn.Parameter(value.clone())
    for one, its in ((parameter, distribute_tensor(grad, mesh, [Replicate()])), (plain, grad)):
        one.grad = its
        optimizer = Adafactor([one])
        optimizer.tokens_per_step = 1
        optimizer.step()
    torch.testing.assert_close(whole(parameter.detach()), plain.detach(), rtol=1e-6, atol=1e-7)


def test_sharded_parameters_are_released_and_those_held_are_not(mesh: DeviceMesh) -> None:
    first, second = parameters(mesh)[:2]
    optimizer = Adafactor([first, second])
    with optimizer.release_gradients(held=[second]):
        optimizer.tokens_per_step = 5
        (first.to_local().square().sum() + second.to_local().square().sum()).backward()
        assert first.grad is None and second.grad is not None
        before = whole(second.detach()).clone()
        optimizer.step()
    assert not torch.equal(whole(second.detach()), before)


@pytest.mark.parametrize("kind", [Muon, SinkGD])
def test_optimizers_of_whole_matrices_refuse_sharded_ones(kind: type[TokenOptimizer], mesh: DeviceMesh) -> None:
    cut = parameters(mesh)
    with pytest.raises(ValueError, match=f"{kind.__name__} works on whole matrices.*140, 130.*one process.*Adafactor"):
        kind(cut)
    kind([{"params": cut, "matrices": False}])


def test_a_tensor_is_cut_by_the_dimensions_of_the_mesh_along_which_its_parts_differ() -> None:
    """In a process of its own, which pretends, with torch's fake backend, to be the first of four."""
    work = """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate, Shard
        from torch.testing._internal.distributed.fake_pg import FakeStore
        from sbft.optim.sharding import cut_by, parts_of_rows

        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
        mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp_replicate", "fsdp", "tp"))
        nameless = init_device_mesh("cpu", (4,))
        for over, placements, names, parts in (
            (mesh, [Replicate(), Shard(0), Shard(0)], {"fsdp", "tp"}, 4),
            (mesh, [Replicate(), Shard(0), Shard(1)], {"fsdp", "tp"}, 2),
            (mesh, [Replicate(), Shard(0), Replicate()], {"fsdp"}, 2),
            (mesh, [Shard(0), Replicate(), Shard(0)], {"tp"}, 2),
            (nameless, [Shard(0)], {None}, 4),
        ):
            tensor = DTensor.from_local(torch.zeros(3, 3), over, placements, run_check=False)
            assert (cut_by(tensor), parts_of_rows(tensor)) == (names, parts), placements
        assert (cut_by(torch.zeros(3)), parts_of_rows(torch.zeros(3))) == (set(), 1)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(work)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
