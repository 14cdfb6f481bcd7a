"""Whole models with weights on a grid train exactly like bfloat16 models of the same values, and hold one dense weight."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sbft.grid import buffer, tensor, values
from sbft.grid.update import apply_
from sbft.grid.weight import GridWeight
from tests.unit.grid.cases import FORMATS, MODELS, dense_copy, grid_model, tokens


def backward(model: PreTrainedModel, ids: Tensor | None = None) -> Any:
    ids = tokens() if ids is None else ids
    torch.manual_seed(0)
    outputs = model(input_ids=ids, labels=ids, use_cache=False)
    outputs.loss.backward()
    return outputs


@contextmanager
def no_warning_of_copies() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*weights on a grid.*")
        yield


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", MODELS)
def test_forward_and_backward_equal_bfloat16(kind: str, form: str, checkpointing: bool) -> None:
    model = grid_model(kind, form).train()
    plain = dense_copy(model)
    if checkpointing:
        for one in (model, plain):
            one.gradient_checkpointing_enable()
    with no_warning_of_copies():
        ours = backward(model)
    theirs = backward(plain)
    assert torch.equal(ours.loss, theirs.loss) and torch.equal(ours.logits, theirs.logits)
    expected = dict(plain.named_parameters())
    on_grid = 0
    for name, parameter in model.named_parameters():
        on_grid += isinstance(parameter, GridWeight)
        gradient = expected[name].grad
        if gradient is None:
            assert parameter.grad is None
        else:
            assert type(parameter.grad) is Tensor and torch.equal(parameter.grad, gradient), name
    assert on_grid >= 10


def test_generates_as_bfloat16_does() -> None:
    model = grid_model("llama", "int4")
    plain = dense_copy(model)
    with no_warning_of_copies():
        ours = model.generate(tokens(), max_new_tokens=8, do_sample=False)
    assert torch.equal(ours, plain.generate(tokens(), max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("kind", ["llama tied", "gpt2", "moe grouped_mm"])
def test_nothing_dense_is_saved_for_backward(kind: str) -> None:
    model = grid_model(kind, vocab=500) if kind != "moe grouped_mm" else grid_model(kind)
    dense = {one.shape for p in model.parameters() if isinstance(p, GridWeight) for one in (p, p.transpose(-2, -1))}
    saved: list[Tensor] = []

    def pack(one: Tensor) -> Tensor:
        saved.append(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        model(input_ids=tokens(11), labels=tokens(11), use_cache=False).loss.backward()
    weights = [one for one in saved if isinstance(one, GridWeight)]
    assert len(weights) >= 8
    assert not [one.shape for one in saved if type(one) is Tensor and one.shape in dense]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "moe grouped_mm"])
def test_one_weight_is_dense_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = grid_model(kind)
    alive: dict[int, int] = {}
    highest = 0
    original = values.dequantize

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal highest
        dense = original(*args, **kwargs)
        storage = dense.untyped_storage()
        if storage._cdata not in alive:
            alive[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, alive.pop, storage._cdata)
        highest = max(highest, sum(alive.values()))
        return dense

    monkeypatch.setattr(buffer, "_kept", [])
    monkeypatch.setattr(values, "dequantize", counted)
    assert buffer.values is tensor.values is values
    backward(model)
    largest = max(
        p.numel() // (p.shape[0] if p.ndim == 3 else 1) for p in model.parameters()
    )  # one expert is dense at a time
    assert highest == 2 * largest
    buffer._kept.clear()
    assert alive == {}


def test_a_buffer_beyond_what_is_kept_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffer, "_kept", [])
    monkeypatch.setattr(buffer, "LARGEST_KEPT_BYTES", 20_000)
    backward(grid_model("llama"))
    assert [one.nbytes for one in buffer._kept] == [2 * 64 * 128]  # for a layer's weight; the head's is larger


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["llama", "llama tied", "moe eager"])
def test_updates_within_backward_equal_those_after_it(kind: str, form: str) -> None:
    released, held = grid_model(kind, form).train(), grid_model(kind, form).train()
    released.gradient_checkpointing_enable()
    updated: list[Tensor] = []

    def update(parameter: Any) -> None:
        if isinstance(parameter, GridWeight):
            apply_(parameter.quantized, parameter.grad, step=0.01, decay=0.001, key=(1, 2))
            parameter.mark_changed()
            updated.append(parameter)
        parameter.grad = None

    for parameter in released.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    for _ in range(2):
        backward(released)
        backward(held)
        for parameter in held.parameters():
            update(parameter)
    assert len(updated) == 4 * len({id(p) for p in released.parameters() if isinstance(p, GridWeight)})
    for ours, theirs in zip(released.parameters(), held.parameters(), strict=True):
        if isinstance(ours, GridWeight):
            assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scales, theirs.scales)
