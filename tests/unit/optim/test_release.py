"""Gradient release: the same weights as without it, with memory for two gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sbft.optim import SGD, Adafactor, AdamW, Muon, RowAdafactor, SinkGD
from tests.tiny import KINDS, tiny_model

OPTIMIZERS = [Adafactor, AdamW, SGD, Muon, RowAdafactor, SinkGD]


def batch(step: int, size: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 500, (size, 12), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.tokens_per_step = 24
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_released_and_plain_updates_give_the_same_bits(optimizer_class, kind):
    plain = tiny_model(kind, hidden=128)  # wide enough for factored second moments
    released = copy.deepcopy(plain)
    train(plain, optimizer_class(plain.parameters(), lr=1e-3), 4)
    optimizer = optimizer_class(released.parameters(), lr=1e-3)
    with optimizer.release_gradients():
        train(released, optimizer, 4)
    assert_same_weights(plain, released)
    start = tiny_model(kind, hidden=128)
    assert not any(
        torch.equal(a, b) for a, b in zip(released.parameters(), start.parameters(), strict=True) if a.ndim == 2
    )


def test_gradient_checkpointing_and_release_together_give_the_same_bits():
    plain = tiny_model("llama")
    released = copy.deepcopy(plain)
    train(plain, Adafactor(plain.parameters(), lr=1e-3), 3)
    released.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    released.train()
    optimizer = Adafactor(released.parameters(), lr=1e-3)
    with optimizer.release_gradients():
        train(released, optimizer, 3)
    assert_same_weights(plain, released)


def test_at_most_two_of_the_largest_gradients_are_alive_at_once():
    model = tiny_model("llama", tied=True)
    largest = max(p.numel() * p.element_size() for p in model.parameters())
    params, peak = list(model.parameters()), 0

    def alive_bytes(_: torch.Tensor) -> None:
        nonlocal peak
        peak = max(peak, sum(p.grad.numel() * p.grad.element_size() for p in params if p.grad is not None))

    for p in params:  # before the release hooks, so that each still sees its own gradient
        p.register_post_accumulate_grad_hook(alive_bytes)
    optimizer = Adafactor(model.parameters())
    with optimizer.release_gradients():
        train(model, optimizer, 1)
    assert 0 < peak <= 2 * largest
    assert all(p.grad is None for p in params)
    peak = 0
    train(model, optimizer, 1)  # without release all are alive, so the measurement can tell the difference
    assert peak > 2 * largest


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_updated_once_with_the_whole_gradient(tied):
    model = tiny_model("llama", tied=tied)
    optimizer = SGD(model.parameters(), lr=1e-3)
    updates = []
    original = optimizer._update

    def counting(update):
        updates.append(update.param)
        return original(update)

    optimizer._update = counting
    with optimizer.release_gradients():
        train(model, optimizer, 1)
    assert len(updates) == len(set(updates)) == len(list(model.parameters()))


def test_frozen_parameters_stay_and_unused_ones_stay_put():
    model = tiny_model("llama", tied=False)
    model.model.embed_tokens.weight.requires_grad_(False)
    extra = nn.Parameter(torch.ones(3))
    before = copy.deepcopy(model)
    optimizer = Adafactor([*model.parameters(), extra], lr=1e-2)
    with optimizer.release_gradients():
        train(model, optimizer, 1)
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert torch.equal(extra, torch.ones(3))


def test_removing_restores_everything_and_may_be_repeated():
    model = tiny_model("llama")
    optimizer = Adafactor(model.parameters())
    handle = optimizer.release_gradients()
    assert optimizer.releases_gradients
    handle.remove()
    handle.remove()
    assert not optimizer.releases_gradients
    before = copy.deepcopy(model)
    model(**batch(0)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert_same_weights(before, model)
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    optimizer.release_gradients().remove()  # can be attached again


def test_attaching_twice_is_refused():
    optimizer = SGD(tiny_model("llama").parameters())
    with optimizer.release_gradients(), pytest.raises(RuntimeError, match="already"):
        optimizer.release_gradients()


def test_a_second_backward_before_step_is_refused():
    model = tiny_model("llama")
    optimizer = Adafactor(model.parameters())
    with optimizer.release_gradients():
        optimizer.tokens_per_step = 24
        model(**batch(0)).loss.backward()
        with pytest.raises(RuntimeError, match="second backward ran before step"):
            model(**batch(1)).loss.backward()


def test_a_step_that_failed_half_way_can_be_discarded():
    model = tiny_model("llama")
    optimizer = Adafactor(model.parameters())
    with optimizer.release_gradients():
        optimizer.tokens_per_step = 24
        model(**batch(0)).loss.backward()
        optimizer.discard_step()
        train(model, optimizer, 1)
    assert optimizer.steps == 1


def test_the_gradient_of_an_update_that_failed_is_not_added_to_the_next():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = SGD([weight], lr=1.0, momentum_half_life=1e-3)  # momentum of the last gradient only
    with optimizer.release_gradients():
        with pytest.raises(RuntimeError, match="tokens_per_step"):
            weight.sum().backward()
        optimizer.tokens_per_step = 1
        weight.sum().backward()
        with pytest.raises(RuntimeError, match="second backward"):
            (5 * weight.sum()).backward()
        optimizer.discard_step()
        optimizer.tokens_per_step = 1
        weight.sum().backward()
        optimizer.step()
    assert weight.tolist() == [-2.0] * 4


def test_forgotten_tokens_are_noticed_within_backward():
    model = tiny_model("llama")
    with Adafactor(model.parameters()).release_gradients(), pytest.raises(RuntimeError, match="tokens_per_step"):
        model(**batch(0)).loss.backward()


def test_rates_and_states_changed_after_attaching_are_used():
    plain, released = tiny_model("llama"), tiny_model("llama")
    one = Adafactor(plain.parameters(), lr=1e-3)
    train(plain, one, 3)
    saved = copy.deepcopy((plain.state_dict(), one.state_dict()))
    train(plain, one, 2, first=3)

    other = Adafactor(released.parameters(), lr=1.0)
    with other.release_gradients():
        released.load_state_dict(saved[0])
        other.load_state_dict(saved[1])  # creates new group dictionaries, which the hooks must use
        train(released, other, 2, first=3)
    assert_same_weights(plain, released)

    with other.release_gradients():
        other.param_groups[0]["lr"] = 0.0
        before = copy.deepcopy(released)
        train(released, other, 1, first=5)
    assert_same_weights(before, released)


def test_a_group_added_after_attaching_is_released_too():
    first, second = (nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = SGD([first], lr=0.5)
    with optimizer.release_gradients():
        optimizer.add_param_group({"params": [second]})
        optimizer.tokens_per_step = 1
        (first.sum() + second.sum()).backward()
        assert second.grad is None
        optimizer.step()
    assert second[0].item() == 0.5


def test_the_gradient_norm_is_there_after_the_step():
    plain, released = tiny_model("qwen3"), tiny_model("qwen3")
    one, other = SGD(plain.parameters()), SGD(released.parameters())
    train(plain, one, 1)
    with other.release_gradients():
        train(released, other, 1)
    assert other.grad_norm.item() == one.grad_norm.item() > 0


def _replica(rank: int, port: int, results) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        optimizer = SGD(nn.Linear(2, 2).parameters())
        optimizer.release_gradients()
    except RuntimeError as error:
        results.put(str(error))
    dist.destroy_process_group()


@pytest.mark.long
def test_replicas_of_plain_parameters_are_refused_with_a_way_out():
    import socket

    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_replica, args=(port, results), nprocs=2)
    messages = [results.get() for _ in range(2)]
    assert all("in one process" in m and "without release_gradients" in m for m in messages)
