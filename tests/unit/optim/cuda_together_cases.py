"""Updates that share launches against the same ones launched one by one; `test_kernels_cuda` runs this.

With `TRITON_INTERPRET=1` in the environment on CPU tensors, else on the GPU.
"""

from __future__ import annotations

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from tests.unit.optim import cuda_interpreter  # noqa: F401

import copy  # noqa: E402
import weakref  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from sbft.grid.codes import Quantized, quantize  # noqa: E402
from sbft.grid.formats import INT4, INT12  # noqa: E402
from sbft.optim import SGD, Adafactor, AdamW, Muon, RowAdafactor, base  # noqa: E402
from sbft.optim.base import TokenOptimizer  # noqa: E402
from sbft.optim.capture import CapturedUpdates  # noqa: E402
from sbft.optim.kernels import cuda, cuda_launch, cuda_members, cuda_plans  # noqa: E402
from sbft.optim.kernels.cuda_waiting import WaitingUpdates  # noqa: E402
from sbft.optim.waiting import limit_for  # noqa: E402
from sbft.rounding import noise_key  # noqa: E402
from tests.unit.optim.updates import ADAFACTOR, ADAMW  # noqa: E402
from tests.unit.optim.updates import SGD as SGD_SETTINGS  # noqa: E402

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
BF16, F32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.filterwarnings("ignore")  # NumPy warns where the hash wraps around, as intended


@pytest.fixture(autouse=True)
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small tiles, so that small tensors have several, and the GPU backend on every device."""
    if INTERPRETED:
        monkeypatch.setattr(base, "backend_for", lambda device: cuda)
        for name, value in {
            "TILE_COLUMNS": 64,
            "SUM_ROWS": 16,
            "APPLY_ROWS": 16,
            "BLOCK": 512,
            "ALONE_BLOCKS": 1,
        }.items():
            monkeypatch.setattr(cuda_plans, name, value)
    forget()


def forget() -> None:
    """Forget what was made for other tile sizes."""
    for cached in (
        cuda_plans.factored_plan, cuda_plans.factored_launches, cuda_plans.line_launches, cuda_members.launches_of,
    ):  # fmt: skip
        cached.cache_clear()


class Launches:
    """Records the names of the programs that are launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.programs: list[str] = []
        call = cuda_launch.Launch.__call__

        def counted(launch: Any, *arguments: Any) -> None:
            self.programs.append(launch.program.__name__)
            call(launch, *arguments)

        monkeypatch.setattr(cuda_launch.Launch, "__call__", counted)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    return Launches(monkeypatch)


class Layer(nn.Module):
    """A layer with weights of several shapes, through which gradients flow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.Parameter(1 + 0.1 * torch.randn(width))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)
        self.odd = nn.Linear(width, 33, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.norm
        return x + self.down(torch.tanh(self.up(x))) + self.odd(x).square().mean(-1, keepdim=True)


OPTIMIZERS: dict[str, Callable[[Any], TokenOptimizer]] = {
    "adafactor": lambda params: Adafactor(params, lr=0.01, min_dim_size_to_factor=16, weight_decay=0.1),
    "adafactor, absolute": lambda params: Adafactor(
        params, lr=0.01, relative_step=False, min_dim_size_to_factor=40, stochastic_rounding=False
    ),
    "adamw": lambda params: AdamW(params, lr=0.01, weight_decay=0.1),
    "adamw, beta1": lambda params: AdamW(params, lr=0.01, beta1=0.9),
    "sgd": lambda params: SGD(params, lr=0.1),
    "sgd, momentum": lambda params: SGD(params, lr=0.1, momentum_half_life=100),
    "muon": lambda params: Muon(params, lr=0.01),
    "row adafactor": lambda params: RowAdafactor(params, lr=0.01),
}


class Training:
    """A small model whose gradients are released; with `most_bytes=0` its updates are launched one by one."""

    def __init__(self, name: str, dtype: torch.dtype = BF16, most_bytes: int | None = None, layers: int = 2) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*(Layer(32) for _ in range(layers))).to(DEVICE, dtype)
        self.optimizer = OPTIMIZERS[name](self.model.parameters())
        self.optimizer.most_waiting_bytes = most_bytes
        self.release = self.optimizer.release_gradients()

    def loss(self, step: int) -> Tensor:
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(step)).to(DEVICE, self.model[0].norm.dtype)
        self.optimizer.tokens_per_step = 50 + step
        self.optimizer.param_groups[0]["lr"] = 0.01 / (1 + step)
        return self.model(x).float().square().mean()

    def train(self, steps: int, first: int = 0) -> None:
        for step in range(first, first + steps):
            self.loss(step).backward()
            self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        states = [self.optimizer.state.get(param, {}) for param in self.model.parameters()]
        state = [state[name] for state in states for name in sorted(state)]
        return [tensor.detach().clone() for tensor in (*self.model.parameters(), *state)]


def assert_same(ours: Training, theirs: Training) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours.tensors(), theirs.tensors(), strict=True))
    assert torch.equal(ours.optimizer.grad_norm, theirs.optimizer.grad_norm)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, BF16) for name in OPTIMIZERS), ("adafactor", F32), ("adamw", F32)]
)
def test_updates_that_share_launches_have_the_bits_of_single_ones(
    name: str, dtype: torch.dtype, launches: Launches
) -> None:
    single, together = Training(name, dtype, most_bytes=0), Training(name, dtype)
    counts = []
    for training in (single, together):
        training.train(1)
        launches.programs.clear()
        training.train(1, first=1)
        counts.append(len(launches.programs))
        if training is together and name not in ("muon", "row adafactor"):  # their matrices come in parts
            assert all("together" in program for program in launches.programs)
    assert_same(together, single)
    assert counts[1] < counts[0]


@pytest.mark.parametrize("name", ["adafactor", "adamw", "sgd, momentum"])
def test_a_resumed_run_goes_on_with_the_same_bits(name: str) -> None:
    whole = Training(name)
    whole.train(1)
    saved = copy.deepcopy((whole.model.state_dict(), whole.optimizer.state_dict()))
    whole.train(1, first=1)
    for most_bytes in (None, 0):
        resumed = Training(name, most_bytes=most_bytes)
        resumed.model.load_state_dict(saved[0])
        resumed.optimizer.load_state_dict(saved[1])
        resumed.train(1, first=1)
        assert_same(resumed, whole)


def test_the_limit_changes_no_bit_and_is_never_exceeded(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, seen = Training("adafactor", most_bytes=0), []
    expected.train(2)
    wait = WaitingUpdates._wait

    def watched(waiting: WaitingUpdates, *arguments: Any) -> None:
        wait(waiting, *arguments)
        alive = sum(update.grad.nbytes for updates in waiting._waiting.values() for update in updates)
        assert alive <= waiting.waiting_bytes <= waiting.most_bytes
        seen.append(len(waiting))

    monkeypatch.setattr(WaitingUpdates, "_wait", watched)
    most_at_once = []
    for most_bytes in (6_000, 13_000, None):
        training = Training("adafactor", most_bytes=most_bytes)
        seen.clear()
        training.train(2)
        most_at_once.append(max(seen))
        assert_same(training, expected)
    assert most_at_once == sorted(set(most_at_once)) and most_at_once[-1] == 10


def test_the_order_of_release_changes_nothing() -> None:
    states = []
    for seed in range(2):
        training = Training("adafactor", most_bytes=13_000)
        training.release.remove()
        for step in range(2):
            training.loss(step).backward()
            params = list(training.model.parameters())
            for i in torch.randperm(len(params), generator=torch.Generator().manual_seed(seed)).tolist():
                training.optimizer.release_parameter(params[i])
                params[i].grad = None
            training.optimizer.step()
        states.append(training.tensors())
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


# When waiting updates are launched


def test_after_backward_nothing_waits_and_no_gradient_is_alive() -> None:
    single, together = Training("adafactor", most_bytes=0), Training("adafactor")
    gradients, waited = [], []

    def note(param: Tensor) -> None:  # called before the release hook, which removes the gradient
        gradients.append(weakref.ref(param.grad))
        waited.append(together.optimizer.has_waiting)

    together.release.remove()
    for param in together.model.parameters():
        param.register_post_accumulate_grad_hook(note)
    together.optimizer.release_gradients()
    for training in (single, together):
        training.loss(0).backward()
    assert len(gradients) == 10 and any(waited)
    assert not together.optimizer.has_waiting
    assert all(gradient() is None for gradient in gradients)
    assert all(torch.equal(a, b) for a, b in zip(together.tensors(), single.tensors(), strict=True))


class Failure(Exception):
    """Raised within backward."""


@pytest.mark.parametrize(
    "end", ["discard_step", "skip_step", "state_dict", "remove", "pickle", "load_state_dict", "step"]
)
def test_what_waits_after_a_backward_that_failed_is_launched_in_time(end: str) -> None:
    results = []
    for most_bytes in (0, None):
        training = Training("adafactor", most_bytes=most_bytes)
        optimizer = training.optimizer

        def fail(param: Tensor) -> None:
            raise Failure

        training.model[0].norm.register_hook(fail)
        with pytest.raises(Failure):
            training.loss(0).backward()
        assert optimizer.has_waiting is (most_bytes is None)
        if end == "remove":
            training.release.remove()
        elif end == "pickle":
            copy.deepcopy(optimizer)
        elif end == "load_state_dict":
            optimizer.load_state_dict(Training("adafactor").optimizer.state_dict())
        else:
            getattr(optimizer, end)()
        assert not optimizer.has_waiting
        results.append([param.detach().clone() for param in training.model.parameters()])
    start = [param.detach() for param in Training("adafactor").model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert sum(torch.equal(a, b) for a, b in zip(results[0], start, strict=True)) < len(start) / 2


def test_a_state_that_is_read_within_backward_is_that_of_single_updates() -> None:
    states = []
    for most_bytes in (0, None):
        training = Training("adafactor", most_bytes=most_bytes)
        read: list[Any] = []
        training.model[0].up.weight.register_hook(
            lambda grad, training=training, read=read: read.append(
                copy.deepcopy(training.optimizer.state_dict()["state"])
            )
        )
        training.train(1)
        states.append(read[0])
    assert len(states[0]) > 5
    assert states[0].keys() == states[1].keys()
    for i, state in states[0].items():
        assert all(torch.equal(value, states[1][i][name]) for name, value in state.items())


def test_a_second_backward_before_the_step_is_refused_as_ever() -> None:
    training = Training("adafactor")
    training.loss(0).backward()
    with pytest.raises(RuntimeError, match="second backward ran before step"):
        training.loss(1).backward()


def test_a_weight_that_is_used_twice_waits_once_with_its_whole_gradient() -> None:
    def tied(most_bytes: int | None) -> Training:
        training = Training("adafactor", most_bytes=most_bytes)
        training.release.remove()
        training.model[1].up, training.model[1].norm = training.model[0].up, training.model[0].norm
        training.optimizer = OPTIMIZERS["adafactor"](training.model.parameters())
        training.optimizer.most_waiting_bytes = most_bytes
        training.optimizer.release_gradients()
        training.train(2)
        return training

    assert_same(tied(None), tied(0))


def test_updates_that_a_graph_may_hold_do_not_wait(launches: Launches) -> None:
    training = Training("adafactor")
    training.train(1)
    updates = CapturedUpdates(training.optimizer)
    loss = training.loss(1)
    launches.programs.clear()
    with updates.within():
        loss.backward()
    assert launches.programs and not any("together" in program for program in launches.programs)
    single = Training("adafactor", most_bytes=0)
    single.train(2)
    training.optimizer.step()
    assert_same(training, single)


def test_a_gradient_that_is_not_finite_changes_only_its_own_weight_not() -> None:
    single, together = Training("adafactor", most_bytes=0), Training("adafactor")
    for training in (single, together):
        training.train(1)
        bad = training.model[1].down.weight
        before = bad.detach().clone()
        handle = bad.register_hook(lambda grad: grad * torch.nan)
        training.train(1, first=1)
        handle.remove()
        assert torch.equal(bad, before)
        assert training.optimizer.nonfinite_gradients == 1
        training.train(1, first=2)
        assert not torch.equal(bad, before)
    assert all(torch.equal(a, b) for a, b in zip(together.tensors(), single.tensors(), strict=True))


def test_limits() -> None:
    optimizer = SGD([nn.Parameter(torch.zeros(1 << 20, dtype=BF16, device=DEVICE))])
    assert limit_for(optimizer.param_groups[0]["params"], optimizer.param_groups[0]["params"][0].device) == 4 << 20
    many = [nn.Parameter(torch.empty(1 << 29, dtype=BF16, device="meta")) for _ in range(2)]
    assert limit_for(many, torch.device("meta")) == int(0.01 * 4 * (1 << 29))
    with pytest.raises(ValueError, match="at least 0"):
        optimizer.most_waiting_bytes = -1


# Functions and launches

STORED: dict[str, Callable[[Tensor], Any]] = {
    "bfloat16": lambda values: values.to(BF16),
    "int4": lambda values: quantize(values, INT4),
    "int12": lambda values: quantize(values, INT12),
}
RULES: dict[str, Callable[[torch.Size], list[Any]]] = {
    "adafactor_factored": lambda s: [s[:-1], s[:-2] + s[-1:], ()],
    "adafactor_full": lambda s: [s, ()],
    "adamw": lambda s: [s, s, (), ()],
    "sgd": lambda s: [s, ()],
}
SETTINGS = {"adafactor_factored": ADAFACTOR, "adafactor_full": ADAFACTOR, "adamw": ADAMW, "sgd": SGD_SETTINGS}


@pytest.mark.parametrize("most_programs", [1024, 2])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stored", STORED)
def test_updates_of_two_weights_of_other_shapes(
    stored: str, rule: str, most_programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is a stack. With few programs, the first has several tiles, and does not wait if it is a matrix on a grid."""
    monkeypatch.setattr(cuda_plans, "MAX_PROGRAMS", most_programs)
    forget()
    waiting = WaitingUpdates(DEVICE, 1 << 30)
    results = []
    for backend in (cuda, waiting):
        generator, made = torch.Generator().manual_seed(3), []
        for i, shape in enumerate((torch.Size((80, 32)), torch.Size((2, 16, 96)))):
            values, grad = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(2))
            weight = STORED[stored](values)
            state = [torch.rand(size, generator=generator).to(DEVICE) + 0.1 for size in RULES[rule](shape)]
            carried = [None] if rule.startswith("adafactor") else []
            settings = {**SETTINGS[rule], "key": noise_key(1, 2, i)}
            sums = getattr(backend, rule)(weight, grad.to(BF16), *state, *carried, **settings)
            tensors = list(weight.tensors.values()) if isinstance(weight, Quantized) else [weight]
            made += [*tensors, *state, *(sums if isinstance(sums, tuple) else [sums])]
        results.append(made)
    several_tiles = rule == "adafactor_factored" and stored != "bfloat16" and most_programs == 2
    assert len(waiting) == (1 if several_tiles else 2)
    waiting.launch()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="there is no device to wait for")
def test_no_shared_launch_waits_for_the_device() -> None:
    training = Training("adafactor")
    training.train(1)
    training.loss(1).backward()
    training.optimizer.step()
    loss = training.loss(2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


SMOLLM2 = [
    (49152, 576),
    *[(576,), (576, 1536), (1536, 576), (1536, 576), (576,), (576, 576), (192, 576), (192, 576), (576, 576)] * 30,
    (576,),
]
"""The weights of SmolLM2-135M; those of a layer in reverse order of the forward pass."""


@pytest.mark.skipif(not INTERPRETED, reason="nothing is run")
@pytest.mark.parametrize(("optimizer_class", "single", "together"), [(Adafactor, 905, 245), (SGD, 483, 123)])
def test_launches_of_a_step_of_smollm2(
    optimizer_class: Any, single: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(base, "backend_for", lambda device: cuda)
    monkeypatch.setattr(base, "_norm", lambda square_sums: (torch.zeros(()), 0))
    counted: list[str] = []
    monkeypatch.setattr(cuda_launch.Launch, "__call__", lambda launch, *_: counted.append(launch.program.__name__))
    forget()
    params = [nn.Parameter(torch.empty(shape, dtype=BF16)) for shape in SMOLLM2]
    for most_bytes, expected in ((0, single), (None, together)):
        optimizer = optimizer_class(params)
        optimizer.most_waiting_bytes = most_bytes
        for _ in range(2):  # the first step also measures the weights
            optimizer.tokens_per_step = 64
            counted.clear()
            for param in reversed(params):
                param.grad = torch.empty_like(param)
                optimizer.release_parameter(param)
                param.grad = None
            optimizer.step()
        assert len(counted) == expected
