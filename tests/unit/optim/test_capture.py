"""Updates that read their numbers from the device, as a CUDA graph requires: on the CPU, with the reference kernels."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sbft.optim import SGD, Adafactor, AdamW, Muon, RowAdafactor, SinkGD
from sbft.optim.base import TokenOptimizer
from sbft.optim.capture import CapturedUpdates
from sbft.optim.device_numbers import DeviceNumbers
from sbft.rounding import noise_key, noise_keys, signed_32

KINDS: dict[str, Callable[[Any], TokenOptimizer]] = {
    "adafactor": lambda params: Adafactor(params, lr=0.0123, min_dim_size_to_factor=8, weight_decay=0.1),
    "adafactor, absolute": lambda params: Adafactor(params, lr=2.0**-9, relative_step=False),
    "adamw": lambda params: AdamW(params, lr=2.0**-9, weight_decay=0.1),
    "adamw, half-lives": lambda params: AdamW(
        params, lr=2.0**-9, first_moment_half_life=100, second_moment_half_life=900
    ),
    "sgd": lambda params: SGD(params, lr=2.0**-6, momentum_half_life=100),
    "muon": lambda params: Muon(params, lr=2.0**-6, momentum_half_life=300),
    "muon, heavy ball": lambda params: Muon(params, lr=2.0**-6, nesterov=False),
    "sinkgd": lambda params: SinkGD(params, lr=2.0**-6),
    "row adafactor": lambda params: RowAdafactor(params, lr=2.0**-6, weight_decay=0.1),
}


class Trained:
    """A small model, and the rates of its steps."""

    def __init__(self, kind: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10)).to(dtype)
        self.optimizer = KINDS[kind](self.model.parameters())
        self.optimizer.release_gradients()

    def begin(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randn(4, 16, generator=generator).to(self.model[0].weight.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0123 / (1 + step)
        self.optimizer.tokens_per_step = 64 + 7 * step
        return self.model(rows).float().square().mean()

    def state(self) -> list[Tensor]:
        values = [value for state in self.optimizer.state.values() for value in state.values()]
        return [*self.model.parameters(), *values]


@pytest.fixture(autouse=True)
def reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBFT_KERNELS", "reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_on_the_device_make_the_same_updates(kind: str, dtype: torch.dtype) -> None:
    plain, captured = Trained(kind, dtype), Trained(kind, dtype)
    updates = CapturedUpdates(captured.optimizer)
    for step in range(4):
        plain.begin(step).backward()
        plain.optimizer.step()
        loss = captured.begin(step)
        if step == 2:  # a step of another shape in between
            loss.backward()
        else:
            with updates.within():
                loss.backward()
        captured.optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(plain.state(), captured.state(), strict=True))
        assert torch.equal(plain.optimizer.grad_norm, captured.optimizer.grad_norm)  # type: ignore[arg-type]


class Scalars(TorchDispatchMode):
    """Records every operation with its arguments that are not tensors, which a capture would freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def shown(value: Any) -> Any:
            if isinstance(value, Tensor):
                return tuple(value.shape)
            return [shown(one) for one in value] if isinstance(value, (list, tuple)) else value

        self.seen.append(f"{function} {shown(args)} { {name: shown(one) for name, one in (kwargs or {}).items()} }")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_changes_from_step_to_step_is_a_number_of_the_host(kind: str, dtype: torch.dtype) -> None:
    trained = Trained(kind, dtype)
    updates = CapturedUpdates(trained.optimizer)
    seen = []
    for step in range(5):
        loss = trained.begin(step)
        with updates.within(), Scalars() as scalars:
            loss.backward()
        trained.optimizer.step()
        seen.append(scalars.seen)
    assert len(seen[3]) > 50 and seen[3] == seen[4]
    loss = trained.begin(5)
    with Scalars() as scalars:
        loss.backward()
    assert scalars.seen != seen[4]


@pytest.mark.parametrize("kind", ["adamw, half-lives", "sgd", "muon"])
def test_state_is_made_by_what_is_set_and_not_by_a_steps_tokens(kind: str) -> None:
    trained = Trained(kind, torch.float32)
    for tokens in (10**7, 64):  # the first number is so large that nothing is left of earlier averages
        loss = trained.begin(0)
        trained.optimizer.tokens_per_step = tokens
        loss.backward()
        trained.optimizer.step()
        made = [{*state} for state in trained.optimizer.state.values()]
        assert all(state & {"momentum", "first_moment"} for state in made)


def test_what_is_carried_from_step_to_step_stays_where_a_graph_looks_for_it() -> None:
    trained = Trained("adafactor", torch.bfloat16)
    updates = CapturedUpdates(trained.optimizer)
    assert isinstance(trained.optimizer, Adafactor)
    places = []
    for step in range(4):
        loss = trained.begin(step)
        with updates.within():
            loss.backward()
        trained.optimizer.step()
        places.append([kept.data_ptr() for _, kept in trained.optimizer._weight_square_sums.values()])
    assert places[0] == places[1] == places[2] == places[3]


def test_a_replayed_step_leaves_the_optimizer_as_a_step_that_ran() -> None:
    ran, replayed = Trained("adamw", torch.float32), Trained("adamw", torch.float32)
    updates = CapturedUpdates(replayed.optimizer)
    ran.begin(0).backward()
    loss = replayed.begin(0)
    with updates.within():
        loss.backward()  # on a GPU, captured here and not run
    captured = updates.after_capture()
    updates.before_replay()
    captured.after_replay()
    for trained in (ran, replayed):
        trained.optimizer.step()
    assert ran.optimizer.clock == replayed.optimizer.clock
    assert torch.equal(ran.optimizer.grad_norm, replayed.optimizer.grad_norm)  # type: ignore[arg-type]


def test_a_capture_holds_as_long_as_nothing_else_changes() -> None:
    def captured() -> tuple[Trained, CapturedUpdates]:
        trained = Trained("adamw", torch.float32)
        updates = CapturedUpdates(trained.optimizer)
        loss = trained.begin(0)
        with updates.within():
            loss.backward()
        updates.after_capture()
        trained.optimizer.step()
        return trained, updates

    def new_rate(trained: Trained) -> None:
        trained.optimizer.param_groups[0]["lr"] = 0.5

    def more_tokens(trained: Trained) -> None:
        trained.optimizer.tokens_per_step = 65

    def other_setting(trained: Trained) -> None:
        trained.optimizer.param_groups[0]["weight_decay"] = 0.0

    def loaded_state(trained: Trained) -> None:
        trained.optimizer.load_state_dict(trained.optimizer.state_dict())

    def changed_weight(trained: Trained) -> None:
        with torch.no_grad():
            trained.model[0].weight.mul_(2)

    def frozen_weight(trained: Trained) -> None:
        trained.model[0].weight.requires_grad_(False)

    for change, holds in (
        (new_rate, True), (more_tokens, True), (other_setting, False), (loaded_state, False), (changed_weight, False),
        (frozen_weight, False),
    ):  # fmt: skip
        trained, updates = captured()
        before = updates.circumstances()
        assert updates.circumstances() == before
        change(trained)
        assert (updates.circumstances() == before) is holds, change.__name__


def test_a_group_that_is_added_is_updated_too() -> None:
    plain, captured = Trained("adamw", torch.bfloat16), Trained("adamw", torch.bfloat16)
    updates = CapturedUpdates(captured.optimizer)
    for trained in (plain, captured):
        trained.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(8, dtype=torch.bfloat16))]})
        loss = trained.begin(0) + trained.optimizer.param_groups[1]["params"][0].float().sum()
        with updates.within() if trained is captured else nullcontext():
            loss.backward()
        trained.optimizer.step()
    for a, b in zip(plain.optimizer.param_groups, captured.optimizer.param_groups, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(a["params"], b["params"], strict=True))


def test_a_weight_that_was_unfrozen_since_is_updated_after_every_replay() -> None:
    frozen = nn.Parameter(torch.ones(4), requires_grad=False)
    optimizer = SGD([nn.Parameter(torch.ones(4)), frozen], lr=0.5)
    optimizer.release_gradients()
    frozen.requires_grad_()
    updates = CapturedUpdates(optimizer)
    optimizer.tokens_per_step = 1
    with updates.within():
        frozen.sum().backward()  # on a GPU, captured here and not run
    captured = updates.after_capture()
    for expected in (0.5, 0.0, -0.5):
        optimizer.zero_grad()
        optimizer.tokens_per_step = 1
        updates.before_replay()
        captured.after_replay()
        optimizer.step()
        assert frozen.tolist() == [expected] * 4


def test_what_cannot_be_captured_is_refused() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="release_gradients"):
        CapturedUpdates(AdamW(model.parameters()))
    optimizer = Adafactor(model.parameters(), schedule="power")
    optimizer.release_gradients()
    with pytest.raises(ValueError, match="power"):
        CapturedUpdates(optimizer)


def test_keys_of_all_parameters_are_those_of_each() -> None:
    for seed, step in ((0, 0), (7, 3), (-1, 2**40), (2**70, 5)):
        expected = [[signed_32(word) for word in noise_key(seed, step, i)] for i in range(50)]
        assert noise_keys(seed, step, 50).tolist() == expected


def test_numbers_of_a_step() -> None:
    numbers = DeviceNumbers(2, 2, 3, torch.device("cpu"))
    numbers.write([[0.1, 0.05, 1e-3], [1e-5, 0.5, 1.0]], seed=1, step=2)
    assert [float(rate) for rate in numbers.rates] == [0.1, 1e-5]
    assert [[float(weight) for weight in group] for group in numbers.weights] == [[0.05, 1e-3], [0.5, 1.0]]
    assert [int(word) for word in numbers.key(2)] == [signed_32(word) for word in noise_key(1, 2, 2)]
    of_none = DeviceNumbers(1, 0, 1, torch.device("cpu"))
    of_none.write([[0.25]], seed=1, step=0)
    assert float(of_none.rates[0]) == 0.25 and of_none.weights == ((),)
