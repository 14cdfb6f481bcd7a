"""Token clock, groups, state and guards, the same for every optimizer."""

from __future__ import annotations

import copy
import io
import math
import pickle
import sys

import pytest
import torch
from torch import nn

from sbft.grid.convert import put_on_grids
from sbft.optim import SGD, Adafactor, AdamW, Muon, RowAdafactor, SinkGD

OPTIMIZERS = [
    pytest.param(Adafactor, {}, id="adafactor"),
    pytest.param(Adafactor, {"schedule": "power"}, id="adafactor-power"),
    pytest.param(AdamW, {}, id="adamw"),
    pytest.param(AdamW, {"beta1": 0.0}, id="adamw-no-momentum"),
    pytest.param(SGD, {}, id="sgd"),
    pytest.param(SGD, {"momentum_half_life": 1000.0}, id="sgd-momentum"),
    pytest.param(Muon, {"newton_schulz_dtype": "float32"}, id="muon"),
    pytest.param(Muon, {"momentum": 0.0, "rest_optimizer": "adafactor"}, id="spectral-descent"),
    pytest.param(SinkGD, {"rest_lr_ratio": 1.0}, id="sinkgd"),
    pytest.param(RowAdafactor, {}, id="row-adafactor"),
]


def network(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 200), nn.ReLU(), nn.Linear(200, 150), nn.LayerNorm(150)).to(dtype)


def train(model: nn.Module, optimizer, steps: int, first: int = 0, scheduler=None) -> None:
    for step in range(first, first + steps):
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        optimizer.tokens_per_step = 10 + step % 4
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_and_loaded_run_ends_with_the_same_bits(optimizer_class, settings, dtype):
    whole = network(dtype)
    train(whole, optimizer_class(whole.parameters(), lr=1e-2, **settings), 12)

    first = network(dtype)
    optimizer = optimizer_class(first.parameters(), lr=1e-2, **settings)
    train(first, optimizer, 5)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = network(dtype)
    second.load_state_dict(saved["model"])
    resumed = optimizer_class(second.parameters(), lr=1.0, seed=99, **settings)
    resumed.load_state_dict(saved["optimizer"])
    assert (resumed.steps, resumed.tokens_seen, resumed.seed) == (5, optimizer.tokens_seen, 0)
    assert all(v.dtype == torch.float32 for state in resumed.state.values() for v in state.values())
    train(second, resumed, 7, first=5)
    assert_same_weights(whole, second)


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
def test_loading_copies_the_state(optimizer_class, settings):
    model, other = network(), network()
    optimizer = optimizer_class(model.parameters(), **settings)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    loaded = optimizer_class(other.parameters(), **settings)
    loaded.load_state_dict(optimizer.state_dict())
    train(other, loaded, 2)
    for a, b in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_state_of_another_kind_is_refused():
    model = network()
    theirs = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="token clock"):
        AdamW(model.parameters()).load_state_dict(theirs.state_dict())
    for saving in (Adafactor, AdamW, SGD, Muon, SinkGD, RowAdafactor):
        for loading in {Adafactor, AdamW, SGD, Muon, SinkGD, RowAdafactor} - {saving}:
            optimizer = loading(model.parameters())
            before = copy.deepcopy(optimizer.state_dict())
            with pytest.raises(ValueError, match=f"saved by {saving.__name__}, .* of {loading.__name__}"):
                optimizer.load_state_dict(saving(model.parameters()).state_dict())
            assert optimizer.state_dict() == before


@pytest.mark.parametrize("named", [True, False], ids=["named", "before-names"])
def test_states_of_before_the_clock_was_in_the_groups_are_loaded(named):
    whole = network()
    train(whole, AdamW(whole.parameters(), lr=1e-2), 5)

    model = network()
    optimizer = AdamW(model.parameters(), lr=1e-2, seed=0)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["clock"]
    saved["clock"] = {"steps": 3, "tokens_seen": 33, "skipped_steps": 0, "seed": 0}
    if named:
        saved["optimizer"] = "AdamW"
        with pytest.raises(ValueError, match="saved by AdamW"):
            SGD(model.parameters()).load_state_dict(saved)
    resumed = AdamW(model.parameters(), lr=0.5, seed=7)
    resumed.load_state_dict(saved)
    assert (resumed.steps, resumed.tokens_seen, resumed.seed) == (3, 33, 0)
    train(model, resumed, 2, first=3)
    assert_same_weights(whole, model)
    assert resumed.state_dict()["param_groups"][0]["clock"]["steps"] == 5


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
def test_optimizers_can_be_pickled(optimizer_class, settings):
    model = network()
    optimizer = optimizer_class(model.parameters(), **settings)
    train(model, optimizer, 2)
    again = pickle.loads(pickle.dumps((model, optimizer)))
    assert again[1].clock == optimizer.clock
    train(model, optimizer, 2, first=2)
    train(again[0], again[1], 2, first=2)
    assert_same_weights(model, again[0])


def test_tokens_must_be_said_before_every_step():
    model = network()
    optimizer = SGD(model.parameters(), momentum_half_life=100.0)
    model(torch.ones(1, 40, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(RuntimeError, match="tokens_per_step is not set"):
        optimizer.step()
    optimizer.tokens_per_step = 7
    optimizer.step()
    assert optimizer.tokens_seen == 7
    with pytest.raises(RuntimeError, match="tokens_per_step is not set"):
        optimizer.step()


@pytest.mark.parametrize("tokens", [0, -1, 1.5])
def test_tokens_must_be_a_positive_whole_number(tokens):
    with pytest.raises(ValueError, match=str(tokens)):
        SGD(network().parameters()).tokens_per_step = tokens


def test_a_closure_is_evaluated_once_with_gradients():
    model = network()
    optimizer = Adafactor(model.parameters())
    calls = []

    def closure():
        calls.append(1)
        loss = model(torch.ones(1, 40, dtype=torch.bfloat16)).square().mean()
        loss.backward()
        return loss

    optimizer.tokens_per_step = 1
    assert optimizer.step(closure).item() > 0
    assert len(calls) == 1


def test_a_scheduler_sets_the_rate():
    model = network(torch.float32)
    optimizer = SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1e-3)
    train(model, optimizer, 2, scheduler=scheduler)
    before = copy.deepcopy(model)
    train(model, optimizer, 3, first=2, scheduler=scheduler)
    assert_same_weights(before, model)


def test_groups_have_their_own_settings_and_can_be_added():
    weights = [nn.Parameter(torch.ones(4)) for _ in range(3)]
    optimizer = AdamW([{"params": [weights[0]]}, {"params": [weights[1]], "lr": 0.0}], lr=0.1)
    optimizer.add_param_group({"params": [weights[2]], "beta2": 0.5})
    assert optimizer.param_groups[2]["second_moment_half_life"] is None
    assert optimizer.param_groups[0]["second_moment_half_life"] == pytest.approx(221_404, abs=1)
    for weight in weights:
        weight.grad = torch.ones(4)
    optimizer.tokens_per_step = 1
    optimizer.step()
    assert [w[0].item() != 1.0 for w in weights] == [True, False, True]


def test_only_parameters_with_a_gradient_move():
    weights = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = Adafactor(weights, lr=0.1)
    weights[0].grad = torch.ones(4)
    optimizer.tokens_per_step = 1
    optimizer.step()
    assert weights[0][0].item() != 1.0
    assert weights[1][0].item() == 1.0
    assert not optimizer.state.get(weights[1])


BAD_SETTINGS = [
    (Adafactor, {"lr": -1.0}, "lr.*-1.0"),
    (AdamW, {"lr": math.nan}, "lr.*nan"),
    (SGD, {"weight_decay": -0.1}, "weight_decay.*-0.1"),
    (Adafactor, {"second_moment_half_life": 10.0, "beta2": 0.9}, "both"),
    (AdamW, {"first_moment_half_life": 10.0, "beta1": 0.9}, "both"),
    (SGD, {"momentum_half_life": 10.0, "momentum": 0.9}, "both"),
    (Adafactor, {"beta2": 1.0}, "beta2.*1.0"),
    (Adafactor, {"second_moment_half_life": 0.0}, "second_moment_half_life.*0.0"),
    (Adafactor, {"schedule": "cosine"}, "cosine"),
    (Adafactor, {"schedule": "power", "second_moment_half_life": 5.0}, "no half-life"),
    (Adafactor, {"clip_threshold": 0.0}, "clip_threshold.*0.0"),
    (Adafactor, {"eps": -1.0}, "eps.*-1.0"),
    (Adafactor, {"min_dim_size_to_factor": 0}, "min_dim_size_to_factor.*0"),
    (AdamW, {"eps": 0.0}, "eps.*0.0"),
    (Muon, {"momentum_half_life": 10.0, "momentum": 0.9}, "both"),
    (Muon, {"adjust_lr_fn": "spectral"}, "match_rms_adamw.*spectral"),
    (Muon, {"newton_schulz_dtype": "float16"}, "bfloat16.*float16"),
    (Muon, {"rest_optimizer": "sgd"}, "adafactor.*'sgd'"),
    (Muon, {"rest_optimizer": "adafactor", "beta1": 0.5}, "beta1 has no effect"),
    (Muon, {"rest_lr_ratio": 0.0}, "rest_lr_ratio.*0.0"),
    (SinkGD, {"sinkhorn_iterations": 0}, "sinkhorn_iterations.*0"),
    (SinkGD, {"eps": -1.0}, "eps.*-1.0"),
]


@pytest.mark.parametrize(("optimizer_class", "settings", "message"), BAD_SETTINGS)
def test_settings_out_of_their_domain_are_named(optimizer_class, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class([nn.Parameter(torch.ones(3))], **settings)


def test_float16_is_refused_with_the_reason():
    with pytest.raises(TypeError, match="loss scaler"):
        Adafactor(nn.Linear(3, 3).half().parameters())
    with pytest.raises(TypeError, match="float64"):
        Adafactor(nn.Linear(3, 3).double().parameters())


def test_a_grad_scaler_is_refused():
    model = network(torch.float32)
    optimizer = SGD(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    optimizer.tokens_per_step = 1
    scaler.scale(model(torch.ones(1, 40)).sum()).backward()
    with pytest.raises(RuntimeError, match="no GradScaler"):
        scaler.step(optimizer)
    optimizer.step()  # the refusal has no lasting effect


def test_sparse_gradients_are_refused():
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = SGD(table.parameters())
    optimizer.tokens_per_step = 1
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(7,), (130, 140)], ids=str)
def test_a_nonfinite_gradient_leaves_weight_and_state_untouched(optimizer_class, settings, bad, shape):
    weights = [nn.Parameter(torch.ones(shape).bfloat16()) for _ in range(2)]
    optimizer = optimizer_class(weights, lr=0.1, **settings)

    def step(last: float) -> None:
        for weight in weights:
            weight.grad = torch.ones(shape).bfloat16()
        weights[0].grad.view(-1)[-1] = last
        optimizer.tokens_per_step = 5
        optimizer.step()

    step(1.0)
    weight, state = weights[0].detach().clone(), copy.deepcopy(optimizer.state[weights[0]])
    other = weights[1].detach().clone()
    step(bad)
    assert torch.equal(weights[0], weight)
    assert all(torch.equal(optimizer.state[weights[0]][name], state[name]) for name in state)
    assert not torch.equal(weights[1], other)
    assert optimizer.nonfinite_gradients == 1
    assert not math.isfinite(optimizer.grad_norm.item())
    step(1.0)
    assert not torch.equal(weights[0], weight)
    assert optimizer.nonfinite_gradients == 1


def test_the_gradient_norm_is_that_of_all_gradients():
    model = network(torch.float32)
    optimizer = Adafactor(model.parameters())
    model(torch.ones(2, 40)).square().sum().backward()
    expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    optimizer.tokens_per_step = 1
    assert optimizer.grad_norm is None
    optimizer.step()
    assert optimizer.grad_norm.dtype == torch.float32
    assert optimizer.grad_norm.item() == pytest.approx(expected, rel=1e-5)


def test_a_skipped_step_leaves_everything_but_its_count():
    model, other = network(), network()
    skipping, plain = Adafactor(model.parameters()), Adafactor(other.parameters())
    train(model, skipping, 2)
    skipping.tokens_per_step = 100
    skipping.skip_step()
    assert (skipping.steps, skipping.skipped_steps, skipping.tokens_per_step) == (2, 1, None)
    train(model, skipping, 2, first=2)
    train(other, plain, 4)
    assert_same_weights(model, other)


@pytest.mark.parametrize("replaced", [False, True])
def test_weights_changed_from_outside_get_their_own_scale(replaced):
    """The carried sum of squares must not outlive the weights it was taken from."""
    carried, fresh = (nn.Parameter(torch.full((130, 140), 1.0)) for _ in range(2))
    first, second = Adafactor([carried], lr=0.1), Adafactor([fresh], lr=0.1)
    for step in range(2):
        for weight, optimizer in ((carried, first), (fresh, second)):
            weight.grad = torch.ones(130, 140)
            optimizer.tokens_per_step = 1
            optimizer.step()
        if step == 0:
            with torch.no_grad():
                if replaced:
                    carried.data = carried.data * 100.0  # as model.to() and the like do: the version does not change
                else:
                    carried.mul_(100.0)
                fresh.copy_(carried)
            second._weight_square_sums.clear()
    assert torch.equal(carried, fresh)


def test_an_update_is_seen_by_autograd():
    """A weight that backward still needs must not change unnoticed."""
    weight = nn.Parameter(torch.ones(130, 140))
    loss = (weight * weight).sum()
    weight.grad = torch.ones(130, 140)
    optimizer = Adafactor([weight])
    optimizer.tokens_per_step = 1
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_momentum_switched_on_later_is_averaged_from_then_on():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = AdamW([weight], lr=0.1, beta1=0.0)
    for step in range(3):
        optimizer.param_groups[0]["beta1"] = 0.9 if step else 0.0
        weight.grad = torch.tensor([1.0, -1.0, 2.0, 0.5])
        optimizer.tokens_per_step = 1
        optimizer.step()
    state = optimizer.state[weight]
    assert state["first_mass"].item() == pytest.approx(1 - 0.9**2)
    torch.testing.assert_close(state["first_moment"] / state["first_mass"], weight.grad)


def test_gradients_of_convolutions_may_be_channels_last():
    weight = nn.Parameter(torch.ones(4, 3, 5, 5))
    optimizer = SGD([weight], lr=1.0)
    gradient = torch.randn(4, 3, 5, 5)
    weight.grad = gradient.to(memory_format=torch.channels_last)
    optimizer.tokens_per_step = 1
    optimizer.step()
    torch.testing.assert_close(weight.detach(), 1.0 - gradient, rtol=0, atol=0)


@pytest.mark.parametrize("on_grid", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("optimizer_class, settings", OPTIMIZERS)
def test_the_work_for_one_parameter_does_not_grow_with_their_number(optimizer_class, settings, on_grid):
    def calls(parameters: int) -> int:
        model = nn.ParameterList(torch.ones(32, 32, dtype=torch.bfloat16) for _ in range(parameters))
        if on_grid:
            put_on_grids(model, "int8", smallest_elements=1)
        optimizer = optimizer_class(model.parameters(), lr=1e-3, **settings)
        counted = 0

        def count(frame, event, argument):
            nonlocal counted
            counted += event in ("call", "c_call")

        for _ in range(2):  # the first step creates the state
            optimizer.tokens_per_step = 10
            for parameter in model:
                parameter.grad = torch.ones(32, 32, dtype=torch.bfloat16)
            counted = 0
            sys.setprofile(count)
            try:
                optimizer.step()
            finally:
                sys.setprofile(None)
        return counted

    assert calls(80) < 8 * 1.2 * calls(10)
