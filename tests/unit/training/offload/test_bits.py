"""Streamed layers train to the same bits as resident ones, and no order of memory accesses is left to chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sbft.optim.base import TokenOptimizer
from sbft.recipe.offload import Offload
from sbft.training.offload.layers import BUFFERS
from sbft.training.offload.link import Event
from sbft.training.offload.schedule import Schedule
from sbft.training.offload.storage import size_bytes
from sbft.training.offload.streamed import StreamedModel, _InLayer
from tests.tiny import tiny_model
from tests.unit.training.offload.runs import assert_same, train, train_watched
from tests.unit.training.offload.watched import RaceError, WatchedLink

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bfloat16": ({}, {}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "float32, tied": ({"dtype": torch.float32, "tied": True}, {"cast_weights": False}),
    "int8": ({"hidden": 128}, {"weights": "int8", "gradient_checkpointing": True}),
    "int4": ({"hidden": 128, "tied": True}, {"weights": "int4"}),
    "int12 and bfloat16": ({"hidden": 128}, {"weights": {"default": "int12", "*.layers.1.mlp": "bfloat16"}}),
    "batch 2": ({}, {"per_device_train_batch_size": 2, "gradient_checkpointing": True}),
    "three layers of five": ({}, {"offload": {"layers": 3}}),
    "every second layer checkpointed": (
        {},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    ),
    "gpt2": ({"kind": "gpt2"}, {"sliced_vocabulary": True}),
    "gemma3 with muon": ({"kind": "gemma3"}, {"token_optimizer": "muon", "momentum": 0.9}),
    "all layers and their inputs": (
        {"kind": "qwen3"},
        {"gradient_checkpointing": True, "offload": {"layers": "all", "activations": True}},
    ),
    "two layers, inputs of all, every second checkpointed": (
        {},
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"every_n_layers": 2},
            "offload": {"layers": 2, "activations": True},
        },
    ),
    "own loss": ({}, {"logits_free_loss": False, "token_optimizer": "adamw"}),
}


@pytest.mark.parametrize("case", CASES)
def test_streamed_layers_train_to_the_same_bits(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, arguments = CASES[case]
    config = {"layers": 5, **config}
    resident = train(tmp_path, tiny_model(**config), **{**arguments, "offload": None})
    streamed = train_watched(tmp_path, tiny_model(**config), monkeypatch, **arguments)
    assert_same(resident, streamed)
    assert streamed.streamed is not None
    link: Any = streamed.streamed.link
    layers = streamed.streamed.schedule.layers
    assert len(layers) == {"three": 3, "two": 2}.get(case.split()[0], 5)
    largest = max(size_bytes(layer.parameters) for layer in layers)
    assert link.device_bytes == min(BUFFERS, len(layers)) * largest
    of_layers = 4 * sum(layer.trained_part(layer.host()).nbytes for layer in layers)
    of_inputs = link.copied_out - of_layers
    if "inputs" not in case:
        assert of_inputs == 0 and link.host_bytes == sum(layer.size_bytes for layer in layers)
    else:
        tokens = int(streamed.state.log_history[-2]["tokens_seen"])
        trials = 24  # two batches of 12 tokens, which check that the head's loss is the model's own
        assert of_inputs == (3 if "second" in case else 5) * (tokens + trials) * 64 * 2


def test_copies_may_run_as_early_as_they_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = train(tmp_path, tiny_model(layers=5))
    assert_same(resident, train_watched(tmp_path, tiny_model(layers=5), monkeypatch, eager=True))


def test_each_layer_comes_twice_in_a_step_and_goes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for layers that are still there when backward begins."""
    trainer = train_watched(tmp_path, tiny_model(layers=8), monkeypatch, gradient_checkpointing=True, max_steps=1)
    assert trainer.streamed is not None
    link: Any = trainer.streamed.link
    size = trainer.streamed.schedule.layers[0].size_bytes
    trials = 3  # the search for the head and a look at attention run forwards, too
    before = link.copied_in
    with torch.no_grad():
        trainer.model(input_ids=torch.tensor([[1, 2, 3]]))
    assert link.copied_in - before == 8 * size
    assert before >= (2 * 8 - BUFFERS) * size and before <= (2 * 8 - BUFFERS + (trials + 1) * 8) * size


# Without one of the waits


def without_mark(self: WatchedLink) -> Event:
    return type(self).__mro__[1].mark(self)  # the stand-in's own, which does not track time


def released_early(self: WatchedLink, memory: torch.Tensor) -> Event:
    moment = WatchedLink_release(self, memory)
    del vars(moment)["clock"]
    return moment


WatchedLink_release = WatchedLink.release


def no_wait(self: WatchedLink, event: Event) -> None:
    pass


def drop_written(self: Schedule, layer: Any, keep: Any = None) -> Any:
    layer.written = None
    return bring(self, layer, keep)


bring = Schedule._bring


def vacate_without_written(self: Schedule, slot: Any) -> None:
    vacate(self, slot)
    slot.busy = slot.busy[:1]


vacate = Schedule._vacate
WAITS = {
    "the arithmetic for a layer": ((WatchedLink, "wait", no_wait), "before what it is to hold has arrived"),
    "the way back for the update": ((WatchedLink, "mark", without_mark), "is written back while arithmetic"),
    "a slot for its last use": ((WatchedLink, "release", released_early), "is copied over while arithmetic"),
    "a slot for its way back": (
        (Schedule, "_vacate", vacate_without_written),
        "another that is still being written back",
    ),
    "the host at the end of a step": ((WatchedLink, "finish", no_wait), "while a layer is being written back to it"),
}


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("eager", [False, True])
def test_without_a_wait_the_stand_in_raises(
    wait: str, eager: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (owner, name, broken), words = WAITS[wait]
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(RaceError, match=words):
        train_watched(tmp_path, tiny_model(layers=5), monkeypatch, eager=eager, max_steps=2)


def test_a_checkpointed_layer_is_brought_before_its_forward_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's hooks do not run when its forward is repeated."""
    unpack = StreamedModel._unpack

    def without_its_layer(self: StreamedModel, packed: Any) -> torch.Tensor:
        return unpack(self, packed.saved if isinstance(packed, _InLayer) else packed)

    monkeypatch.setattr(StreamedModel, "_unpack", without_its_layer)
    with pytest.raises(RaceError, match="computes with a weight that is in the host's memory"):
        train_watched(tmp_path, tiny_model(layers=5), monkeypatch, gradient_checkpointing=True)


@pytest.mark.parametrize("launched", [True, False])
def test_updates_that_wait_are_launched_before_their_layer_leaves(
    launched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, small updates wait to share a launch; here, all wait until something launches them."""
    resident = train(tmp_path, tiny_model(layers=5))
    waiting: list[tuple[nn.Parameter, torch.Tensor | None]] = []

    def launch(self: TokenOptimizer) -> None:
        while waiting:
            param, param.grad = waiting.pop(0)
            self.update_parameter(param)
            param.grad = None

    monkeypatch.setattr(TokenOptimizer, "has_waiting", property(lambda self: bool(waiting)))
    monkeypatch.setattr(TokenOptimizer, "release_parameter", lambda self, param: waiting.append((param, param.grad)))
    monkeypatch.setattr(TokenOptimizer, "launch_waiting", launch)
    if launched:
        assert_same(resident, train_watched(tmp_path, tiny_model(layers=5), monkeypatch))
        return
    monkeypatch.setattr(
        Schedule, "launch_updates", property(lambda self: lambda: None, lambda self, launch: None), raising=False
    )
    with pytest.raises(RaceError, match="an update"):
        train_watched(tmp_path, tiny_model(layers=5), monkeypatch)


def test_a_layer_is_not_brought_before_it_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a step no layer comes back after its update, unless something unexpected needs it."""

    def run() -> None:
        link = WatchedLink()
        from sbft.training.offload.storage import StreamedLayer

        layers = [StreamedLayer(n, [nn.Parameter(torch.full((64,), float(n)))], link) for n in range(3)]
        schedule = Schedule(layers, 2, link)
        schedule.need(layers[2])
        with torch.no_grad():
            layers[2].parameters[0].add_(1)
        schedule.note_update(layers[2].parameters[0])
        schedule.need(layers[1])
        schedule.need(layers[0])
        schedule.need(layers[2])
        assert layers[2].parameters[0].tolist() == [3.0] * 64

    run()
    monkeypatch.setattr(Schedule, "_bring", drop_written)
    with pytest.raises(RaceError, match="before it has arrived in the host's memory"):
        run()


def test_layers_are_spread_evenly() -> None:
    assert Offload(3).streamed(8) == [0, 2, 5] and Offload("auto").streamed(3) == [0, 1, 2] == Offload(9).streamed(3)
