"""What a streamed model can do besides training: adapters, evaluation, generation, checkpoints; and how it fails."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from sbft.errors import ModelError, TrainingError
from sbft.grid.weight import GridWeight
from sbft.models.load import load_model
from sbft.optim import Adafactor
from sbft.recipe.offload import Offload
from sbft.training.offload.link import OffloadError
from sbft.training.offload.stand_in import StandIn
from sbft.training.offload.streamed import StreamedModel, streamed
from tests.tiny import save_tiny, tiny_model
from tests.unit.training.offload.runs import assert_same, on_links, outcome, train, train_watched, trainer_of

INPUTS = torch.tensor([[5, 6, 7, 8, 9]])


def with_adapter(dropout: float = 0.0, **config: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    return get_peft_model(tiny_model(**config), settings)


@pytest.mark.parametrize(
    "arguments",
    [
        {"token_optimizer": None, "optim": "adamw_torch", "gradient_accumulation_steps": 2},
        {"token_optimizer": "adafactor", "gradient_checkpointing": True},
    ],
    ids=["adamw accumulated", "sbft's checkpointed"],
)
def test_under_an_adapter_the_base_is_only_read(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident = train(tmp_path, with_adapter(0.1, layers=4), **arguments)
    trainer = train_watched(tmp_path, with_adapter(0.1, layers=4), monkeypatch, **arguments)
    assert_same(resident, trainer)
    assert trainer.streamed is not None
    link: Any = trainer.streamed.link
    assert link.copied_out == 0 and link.copied_in > 0 and len(trainer.streamed.schedule.slots) == 2
    assert not any("lora" in name for name, p in trainer.model.named_parameters() if p in trainer.streamed.parameters)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_an_adapter_the_base_may_be_in_4_bits(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model

    save_tiny(tmp_path / "base", layers=4, hidden=128)

    def adapted() -> Any:
        base = load_model(str(tmp_path / "base"), dtype=torch.bfloat16, quantization="nf4")
        torch.manual_seed(0)
        return get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))

    arguments = {"token_optimizer": None, "optim": "adamw_torch", "gradient_checkpointing": checkpointing}
    resident = train(tmp_path, adapted(), **arguments)
    trainer = train_watched(tmp_path, adapted(), monkeypatch, **arguments)
    assert_same(resident, trainer)
    assert trainer.streamed is not None
    assert sum(p.dtype == torch.uint8 for p in trainer.streamed.parameters) == 28
    trainer.stop_offloading()
    assert not any("forward" in vars(module) for module in trainer.model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_weights_are_streamed_and_not_written_back(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen() -> Any:
        model = tiny_model(layers=4)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("q_proj" in name or ".layers.1.mlp" in name)
        return model

    arguments = {"gradient_checkpointing": checkpointing}
    resident = train(tmp_path, frozen(), **arguments)
    trainer = train_watched(tmp_path, frozen(), monkeypatch, **arguments)
    assert_same(resident, trainer)
    assert trainer.streamed is not None
    link: Any = trainer.streamed.link
    trained = sum(p.nbytes for p in trainer.model.parameters() if p.requires_grad)
    assert link.copied_out == 4 * trained


def in_another_order(model: Any, order: list[int]) -> Any:
    """Make the decoder, which takes a slice of its layers, call them in this order."""
    layers = model.model.layers

    class Order(type(layers)):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Any:
            if isinstance(index, slice):
                modules = list(self._modules.values())
                return [modules[number] for number in order]
            return super().__getitem__(index)

    layers.__class__ = Order
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_may_be_skipped_repeated_and_out_of_order(
    checkpointing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [3, 0, 0, 1, 0]
    arguments = {"gradient_checkpointing": checkpointing, "max_steps": 2}
    resident = train(tmp_path, in_another_order(tiny_model(layers=4), order), **arguments)
    streamed = train_watched(tmp_path, in_another_order(tiny_model(layers=4), order), monkeypatch, **arguments)
    assert_same(resident, streamed)


def test_evaluation_between_steps_and_generation_are_those_of_a_resident_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluating = {"eval_strategy": "steps", "eval_steps": 1, "gradient_checkpointing": True}
    resident = train(tmp_path, tiny_model(layers=4), **evaluating)
    trainer = train_watched(tmp_path, tiny_model(layers=4), monkeypatch, **evaluating)
    assert_same(resident, trainer)
    assert len(outcome(trainer)["losses"]) == 9
    asked = {"max_new_tokens": 5, "do_sample": False}
    for inference in (torch.no_grad, torch.inference_mode):
        with inference():
            assert torch.equal(resident.model.generate(INPUTS, **asked), trainer.model.generate(INPUTS, **asked))
    assert resident.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("arguments", [{}, {"weights": "int8"}], ids=["bfloat16", "int8"])
def test_a_resumed_run_ends_in_the_same_bits_whether_streamed_or_not(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_links(monkeypatch)
    whole = train(tmp_path / "whole", tiny_model(layers=4, hidden=128), **arguments)
    for first, second in ((None, "layers"), ("layers", None), ("layers", "layers")):
        folder = tmp_path / f"{first}-{second}"
        saving = {"save_strategy": "steps", "save_steps": 2, **arguments}
        train(folder, tiny_model(layers=4, hidden=128), **{**saving, "max_steps": 2, "offload": first})
        other = tiny_model(layers=4, hidden=128, seed=9)
        resumed = train(folder, other, True, **{**saving, "offload": second})
        expected, found = outcome(whole), outcome(resumed)
        assert all(torch.equal(value, found[name]) for name, value in expected.items() if name != "losses")


def test_a_saved_model_has_the_weights_and_costs_no_second_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_links(monkeypatch)
    trainer = train(tmp_path, tiny_model(layers=4), offload="layers")
    cloned: list[int] = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, *a, **k: cloned.append(self.nbytes) or clone(self, *a, **k))
    trainer.save_model(str(tmp_path / "model"))
    assert sum(cloned) == 0
    monkeypatch.undo()
    saved = load_file(tmp_path / "model" / "model.safetensors")
    state = trainer.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in saved.items()) and len(saved) > 30
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model")


class Fails(TrainerCallback):
    """Makes layer 1 raise in step 2, in forward or in backward."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layer = kwargs["model"].model.layers[1]
        if state.global_step == 1:
            if self.where == "forward":
                layer.register_forward_pre_hook(self._fail)
            else:
                layer.mlp.down_proj.weight.register_hook(self._fail)

    def _fail(self, *args: Any) -> None:
        raise ZeroDivisionError("made on purpose")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_error_the_model_is_whole_and_as_a_resident_one_would_be(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_links(monkeypatch)
    models = []
    for offload in (None, "layers"):
        trainer = trainer_of(tmp_path, tiny_model(layers=4), offload=offload)
        trainer.add_callback(Fails(where))
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        models.append(trainer.model)
    resident, streamed_one = (model.state_dict() for model in models)
    assert all(torch.equal(value, streamed_one[name]) for name, value in resident.items())
    initial = tiny_model(layers=4).state_dict()
    assert any(not torch.equal(value, initial[name]) for name, value in resident.items())
    if where == "backward":
        with torch.no_grad():
            assert torch.equal(*(model(input_ids=INPUTS).logits for model in models))


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    on_links(monkeypatch)
    trainer = trainer_of(tmp_path, tiny_model(layers=4), offload="layers")
    handle = trainer.model.model.layers[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    handle.remove()
    trainer.train()
    assert_same(train(tmp_path, tiny_model(layers=4)), trainer)


def test_a_trainer_that_stops_offloading_leaves_a_plain_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_links(monkeypatch)
    trainer = train(tmp_path, tiny_model(layers=4), offload="layers")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        logits = trainer.model(input_ids=INPUTS).logits
    trainer.stop_offloading()
    assert trainer.streamed is None
    for module in trainer.model.modules():
        assert not module._forward_pre_hooks or "_CastInputs" in str(module._forward_pre_hooks)
        assert not module._forward_hooks
    copied = copy.deepcopy(trainer.model)
    for model in (trainer.model, copied):
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(input_ids=INPUTS).logits, logits)
    resident = train(tmp_path, trainer.model, offload=None)
    assert resident.state.global_step == 4


def test_weights_on_a_grid_are_moved_as_codes() -> None:
    from tests.unit.grid.cases import grid_model

    model, resident = (grid_model("llama", layers=4, hidden=128) for _ in range(2))
    link = StandIn()
    with streamed(model, Offload(), link) as made:
        on_grid = [p for p in made.parameters if isinstance(p, GridWeight)]
        assert link.host_bytes < 0.6 * sum(p.numel() * 2 for p in made.parameters) and len(on_grid) == 28
        with torch.no_grad():
            assert torch.equal(model(input_ids=INPUTS).logits, resident(input_ids=INPUTS).logits)


def test_two_forwards_before_one_backward_give_the_gradients_of_a_resident_model() -> None:
    """As in preference optimization. No gradient is released here, so that only frozen weights are streamed."""
    models = [tiny_model(layers=4, dtype=torch.float32) for _ in range(2)]
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name)
    with streamed(models[1], Offload(), StandIn(), releases=False):
        for model in models:
            chosen, rejected = model(input_ids=INPUTS).logits, model(input_ids=INPUTS.flip(1)).logits
            (chosen.logsumexp(-1).sum() - rejected.square().mean()).backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert one.grad is None if not one.requires_grad else torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_state_that_was_loaded_follows_the_updates_to_the_device() -> None:
    model = tiny_model(layers=3)
    optimizer = Adafactor(model.parameters(), lr=1e-3)
    with streamed(model, Offload(), StandIn()) as made:
        for parameter in model.parameters():
            optimizer.state[parameter] = optimizer.new_state(parameter)
        made.link.device = torch.device("meta")
        made.place_state(optimizer)
        for parameter, state in optimizer.state.items():
            on_device = {value.device.type == "meta" for value in state.values()}
            assert on_device == {parameter in made.parameters}


# What is refused


def test_a_model_without_layers_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.few = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])

    with pytest.raises(ModelError, match="Flat has no list of modules that holds most of its weights"):
        StreamedModel(Flat(), Offload(), StandIn())


def test_a_model_of_which_all_is_trained_at_once_is_refused() -> None:
    with pytest.raises(ModelError, match="no weight that could leave the device"):
        StreamedModel(tiny_model(), Offload(), StandIn(), releases=False)


def test_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this run's device is cpu, which computes in the host's memory"):
        trainer_of(tmp_path, tiny_model(), offload="layers")


def test_memory_that_cannot_be_pinned_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Any:
        raise OffloadError("no pinned memory")

    on_links(monkeypatch, none)
    with pytest.raises(ValueError, match="no pinned memory"):
        trainer_of(tmp_path, tiny_model(), offload="layers")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"offload": "layer"}, "expected layers, or keys such as"),
        ({"offload": {"layers": 0}}, "expected layers, or keys such as"),
        ({"offload": {"layers": True}}, "expected layers, or keys such as"),
        ({"gradient_release": False}, "needs gradient_release=True"),
        ({"cuda_graphs": True}, "cuda_graphs=True, whose graphs hold addresses"),
        ({"bf16_full_eval": True, "use_cpu": True}, "moves the whole model to the device"),
        ({"torch_compile": True}, "torch_compile=True, which traces no hooks"),
        ({"offload": {"activations": True}}, "Set gradient_checkpointing=True"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_links(monkeypatch)
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, tiny_model(), **{"offload": "layers", **arguments})


def test_a_weight_that_was_replaced_is_not_lost_in_silence() -> None:
    model = tiny_model(layers=3)
    with streamed(model, Offload(), StandIn()):
        weight = model.model.layers[0].mlp.up_proj.weight
        at_rest = weight.data
        weight.data = torch.zeros_like(weight)
        with pytest.raises(TrainingError, match="A weight of layer 0, .* was replaced while the layer was offloaded"):
            model(input_ids=INPUTS)
        weight.data = at_rest
        assert model(input_ids=INPUTS).logits.isfinite().all()


def test_a_layer_that_is_called_alone_with_gradients_is_refused() -> None:
    model = tiny_model(layers=3)
    outside = pytest.raises(RuntimeError, match="layer 1 is offloaded, and was called outside of the forward")
    with streamed(model, Offload(), StandIn()), outside:
        model.model.layers[1](torch.zeros(1, 2, 64))
