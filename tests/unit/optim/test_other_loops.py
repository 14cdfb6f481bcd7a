"""The optimizers alone, in loops that do not know sbft: a bare one, accelerate, transformers' Trainer, Lightning; and
torch's own functions for the state in distributed training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from transformers import Trainer, TrainingArguments

from sbft import TokenCountCallback
from sbft.optim import SGD, Adafactor, AdamW, Muon, RowAdafactor, SinkGD, matrix_groups
from sbft.optim.counting import count_of
from sbft.training.arguments import ArgumentError
from tests.tiny import tiny_model

OPTIMIZERS = [
    pytest.param(Adafactor, {}, id="adafactor"),
    pytest.param(AdamW, {}, id="adamw"),
    pytest.param(SGD, {}, id="sgd"),
    pytest.param(SGD, {"momentum_half_life": 50.0}, id="sgd-momentum"),
    pytest.param(Muon, {"newton_schulz_dtype": "float32"}, id="muon"),
    pytest.param(SinkGD, {}, id="sinkgd"),
    pytest.param(RowAdafactor, {}, id="row-adafactor"),
]
# Without padding, 5 + 3 tokens, and 7.
BATCHES: list[dict[str, Tensor]] = [
    {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.tensor([[1] * 5 + [0], [1] * 3 + [0] * 3])},
    {"input_ids": torch.arange(7).reshape(1, 7)},
]


def llama() -> nn.Module:
    return tiny_model("llama", hidden=32, layers=1, dtype=torch.float32).train()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def train(model: nn.Module, optimizer: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(optimizer.steps)
    for _ in range(steps):
        optimizer.tokens_per_step = 3 + optimizer.steps
        model(torch.randn(5, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Optimizers that need no count


@pytest.mark.parametrize(
    "make",
    [
        lambda model: SGD(model.parameters()),
        lambda model: SGD(model.parameters(), momentum=0.9),
        lambda model: AdamW(model.parameters(), beta2=0.99),
        lambda model: Adafactor(model.parameters(), beta2=0.99),
        lambda model: Adafactor(model.parameters(), schedule="power"),
        lambda model: Muon([model[0].weight, model[2].weight]),  # AdamW, which has a half-life, has no parameters
        lambda model: SinkGD([model[0].weight, model[2].weight]),
    ],
)
@pytest.mark.parametrize("released", [False, True])
def test_averages_with_a_decay_factor_per_step_need_no_count(make, released):
    counted, uncounted = network(), network()
    optimizers = [make(counted), make(uncounted)]
    for model, optimizer in zip((counted, uncounted), optimizers, strict=True):
        assert not optimizer.needs_tokens
        if released:
            optimizer.release_gradients()
        for step in range(3):
            if model is counted:
                optimizer.tokens_per_step = 5
            model(torch.ones(2, 6) * step).square().mean().backward()
            optimizer.step()
    assert_same(counted, uncounted)
    assert [one.steps for one in optimizers] == [3, 3] and [one.tokens_seen for one in optimizers] == [15, 0]


def test_whether_a_count_is_needed_follows_the_groups():
    model = network()
    optimizer = AdamW(model[0].parameters(), beta2=0.9)
    model(torch.ones(1, 6)).sum().backward()
    optimizer.step()
    optimizer.add_param_group({"params": list(model[2].parameters()), "second_moment_half_life": 10.0})
    with pytest.raises(RuntimeError, match="count_tokens"):
        optimizer.step()
    assert Muon(matrix_groups(model)).needs_tokens  # for its biases


# Counting a model's inputs


@pytest.mark.parametrize(
    ("batch", "number", "in_tokens"),
    [
        (BATCHES[0], 8, True),
        (BATCHES[1], 7, True),
        ({"input_ids": torch.ones(2, 3, 4), "attention_mask": torch.ones(2, 3, 4).tril()}, 12, True),  # choices
        ({"input_ids": torch.ones(2, 5), "attention_mask": torch.zeros(2, 1, 5, 5)}, 10, True),
        ({"inputs_embeds": torch.ones(2, 5, 8)}, 10, True),
        ({"inputs_embeds": torch.ones(2, 5, 8), "attention_mask": torch.ones(2, 5).tril()}, 3, True),
        ({"a_input_ids": torch.ones(2, 5), "a_attention_mask": torch.ones(2, 5).tril(), "b_input_ids": torch.ones(4)}, 7, True),
        ({"prompt_ids": torch.ones(2, 3), "prompt_mask": torch.eye(2, 3), "completion_ids": torch.ones(2, 4)}, 10, True),
        ({"pixel_values": torch.ones(3, 2, 4, 4), "labels": torch.ones(3)}, 3, False),
        ({"input_values": torch.ones(2, 400), "attention_mask": torch.ones(2, 400)}, 2, False),  # sound
        ({"scale": torch.tensor(1.0), "images": [torch.ones(3, 4, 4)] * 5}, 5, False),
        ([{"prompt": "a"}, {"prompt": "b"}], 2, False),
        ([torch.ones(4, 3), torch.ones(4)], 4, False),
        ((torch.ones(4, 3), torch.ones(4)), 4, False),
        (torch.ones(6, 2), 6, False),
        ({"input_ids": torch.ones(1, 3), "attention_mask": torch.zeros(1, 3)}, 1, True),
        ({}, 1, False),
    ],
)
def test_what_a_batch_holds(batch, number, in_tokens):
    assert count_of(batch) == (number, in_tokens)


def test_tokens_are_counted_as_the_model_is_called_and_add_up_until_the_step():
    model = llama()
    optimizer = Adafactor(model.parameters(), second_moment_half_life=100.0)
    with optimizer.count_tokens(model):
        for batch in BATCHES:
            model(**batch, labels=batch["input_ids"]).loss.backward()
        with torch.no_grad():
            model(**BATCHES[0])
        model.eval()(**BATCHES[0])
        assert optimizer.tokens_per_step == 8 + 7
        optimizer.step()
        model.train()(BATCHES[1]["input_ids"])  # as a positional argument
        assert optimizer.tokens_per_step == 7
        with pytest.raises(RuntimeError, match="counted already"):
            optimizer.count_tokens(model)
    optimizer.discard_step()
    model(**BATCHES[0])
    assert optimizer.tokens_per_step is None and not optimizer.counts_tokens


def test_counted_steps_are_those_with_the_tokens_said():
    said, counted = llama(), llama()
    optimizers = [Adafactor(model.parameters(), lr=1e-2, second_moment_half_life=20.0) for model in (said, counted)]
    with optimizers[1].count_tokens(counted), optimizers[1].release_gradients():
        for batch, tokens in zip(BATCHES * 2, (8, 7, 8, 7), strict=True):
            optimizers[0].tokens_per_step = tokens
            for model, optimizer in zip((said, counted), optimizers, strict=True):
                model(**batch, labels=batch["input_ids"]).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert_same(said, counted)


def test_examples_are_counted_where_there_are_no_tokens_and_that_is_said_once(caplog):
    model = network()
    optimizer = Adafactor(model.parameters())
    with optimizer.count_tokens(model):
        for _ in range(2):
            model(torch.ones(4, 6)).sum().backward()
    assert optimizer.tokens_per_step == 8
    assert [record.message.count("half-lives are in examples") for record in caplog.records] == [1]
    optimizer.discard_step()
    caplog.clear()
    with optimizer.count_tokens(model, lambda x: x.numel()):
        model(torch.ones(4, 6))
    assert optimizer.tokens_per_step == 24 and not caplog.records


def test_a_copy_of_the_model_does_not_count_nor_carry_the_optimizer():
    model = network()
    optimizer = Adafactor(model.parameters())
    optimizer.count_tokens(model)
    copied = copy.deepcopy(model)
    copied(torch.ones(4, 6))
    assert optimizer.tokens_per_step is None
    model(torch.ones(4, 6))
    assert optimizer.tokens_per_step == 4


def test_a_compiled_model_is_counted():
    for wrapped_first in (True, False):
        model = llama()
        compiled: Any = torch.compile(model, backend="eager")
        optimizer = Adafactor(model.parameters())
        with optimizer.count_tokens(compiled if wrapped_first else model):
            compiled(**BATCHES[0])
        assert optimizer.tokens_per_step == 8


# accelerate, Trainer, Lightning


def test_accelerate_accumulates_and_counts():
    from accelerate import Accelerator
    from accelerate.state import GradientState

    GradientState._reset_state()  # one per process, and a trainer of another test may have changed it
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = llama()
    optimizer = Adafactor(model.parameters())
    optimizer.count_tokens(model)
    prepared, stepping = accelerator.prepare(model, optimizer)
    for batch in BATCHES * 2:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch, labels=batch["input_ids"]).loss)
            stepping.step()
            stepping.zero_grad()
    assert optimizer.steps == 2 and optimizer.tokens_seen == 2 * 15


def trainer(model: nn.Module, folder: Any, optimizer: Any, *, callback: bool = True, **settings: Any) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in ([3, 4, 5], [6, 7, 8, 9, 10], [3, 5], [4, 6, 8])]

    def collate(batch: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in batch)
        padded = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in batch]
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
        return {"input_ids": torch.tensor(padded), "labels": torch.tensor(padded), "attention_mask": torch.tensor(mask)}

    basic = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "num_train_epochs": 2}
    return Trainer(
        model,
        TrainingArguments(str(folder), per_device_train_batch_size=2, **{**basic, **settings}),
        collate,
        rows,
        eval_dataset=rows,
        optimizers=(optimizer, None),
        callbacks=[TokenCountCallback()] if callback else None,
    )


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"torch_compile_backend": "eager"}])
def test_the_callback_counts_in_a_plain_trainer(tmp_path, settings):
    model = llama()
    optimizer = Adafactor(model.parameters())
    made = trainer(model, tmp_path, optimizer, eval_strategy="epoch", **settings)
    made.train()
    assert optimizer.tokens_seen == 2 * 13
    assert optimizer.steps == (2 if "gradient_accumulation_steps" in settings else 4)
    assert not optimizer.counts_tokens


def test_the_callback_forgets_a_step_that_an_error_left_half_done(tmp_path):
    model = llama()
    optimizer = Adafactor(model.parameters())
    made = trainer(model, tmp_path, optimizer)
    plain = made.training_step
    made.training_step = lambda *args: plain(*args) and 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        made.train()
    made.training_step = plain  # type: ignore[method-assign]
    model.zero_grad()
    made.train()
    assert (optimizer.tokens_seen, optimizer.steps) == (2 * 13, 4)


def test_without_the_callback_the_error_names_it(tmp_path):
    model = llama()
    with pytest.raises(RuntimeError, match=r"sbft\.TokenCountCallback"):
        trainer(model, tmp_path, Adafactor(model.parameters()), callback=False).train()


def test_the_callback_refuses_what_it_cannot_serve(tmp_path):
    model = llama()
    with pytest.raises(ArgumentError, match="AdamW"):
        trainer(model, tmp_path, torch.optim.AdamW(model.parameters())).train()
    optimizer = Adafactor(model.parameters())
    with optimizer.release_gradients():
        with pytest.raises(ArgumentError, match=r"max_grad_norm=1\.0 would have no effect"):
            trainer(model, tmp_path, optimizer).train()
        trainer(model, tmp_path, optimizer, max_grad_norm=0.0).train()
    assert optimizer.steps == 4


def test_lightning_trains_with_a_counted_optimizer(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def training_step(self, batch: Any, _: int) -> Any:
            return self.model(**batch, labels=batch["input_ids"]).loss

        def configure_optimizers(self) -> Any:
            optimizer = Adafactor(self.model.parameters(), lr=1e-2)
            optimizer.count_tokens(self.model)
            return optimizer

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    settings = {**quiet, "accelerator": "cpu", "accumulate_grad_batches": 2}
    fitting = lightning.Trainer(max_epochs=2, **settings)
    fitting.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))
    optimizer = module.optimizers().optimizer
    assert optimizer.steps == 2 and optimizer.tokens_seen == 2 * 15
    fitting.save_checkpoint(tmp_path / "saved.ckpt")
    again = Module()
    resuming = lightning.Trainer(max_epochs=3, **settings)
    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    resuming.fit(again, loader, ckpt_path=tmp_path / "saved.ckpt", weights_only=False)
    assert again.optimizers().optimizer.steps == 3


# torch's functions for the state


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("begun", [False, True], ids=["new", "begun"])
def test_torchs_checkpoints_of_a_state_resume_to_the_same_bits(optimizer_class, settings, flat, begun, tmp_path):
    model = network()
    optimizer = optimizer_class(model.parameters(), lr=1e-2, seed=3, **settings)
    train(model, optimizer, 3)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    weights, states = get_state_dict(model, optimizer, options=options)
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path, no_dist=True)

    other = network()
    resumed = optimizer_class(other.parameters(), lr=0.5, **settings)
    if begun:
        train(other, resumed, 1)
    clock = copy.copy(resumed.clock)
    weights, states = get_state_dict(other, resumed, options=options)
    assert resumed.clock == clock  # creating the state is not a step
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=states, options=options)
    assert (resumed.steps, resumed.tokens_seen, resumed.seed) == (3, optimizer.tokens_seen, 3)
    train(model, optimizer, 2)
    train(other, resumed, 2)
    assert_same(model, other)


def test_a_step_at_a_rate_of_zero_in_training_still_has_to_be_counted():
    model = network()
    optimizer = Adafactor(model.parameters(), lr=0.0)  # as in the first step of a warm-up
    model(torch.ones(2, 6)).sum().backward()
    with pytest.raises(RuntimeError, match="tokens_per_step is not set"):
        optimizer.step()


def test_torchs_functions_refuse_the_state_of_another_optimizer():
    model = network()
    theirs = torch.optim.AdamW(model.parameters())
    saved = get_optimizer_state_dict(model, theirs)
    with pytest.raises(ValueError, match="no token clock"):
        set_optimizer_state_dict(model, AdamW(model.parameters()), saved)
    other = get_optimizer_state_dict(model, SGD(model.parameters(), momentum=0.9))
    with pytest.raises(ValueError, match="saved by SGD"):
        set_optimizer_state_dict(model, AdamW(model.parameters()), other)


def test_a_saved_state_does_not_change_as_training_goes_on():
    model = network()
    optimizer = SGD(model.parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    train(model, optimizer, 1)
    assert saved["param_groups"][0]["clock"]["steps"] == 1
    assert optimizer.param_groups[0]["clock"]["steps"] == 2


# Hooks of load_state_dict


def test_hooks_of_loading_see_the_state_and_may_change_it():
    model = network()
    optimizer = AdamW(model.parameters())
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    loading = AdamW(network().parameters())
    seen: list[Any] = []

    def before(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(state_dict["state"]))
        halved = {i: {name: value / 2 for name, value in one.items()} for i, one in state_dict["state"].items()}
        return {**state_dict, "state": halved}

    handle = loading.register_load_state_dict_pre_hook(before)
    loading.register_load_state_dict_post_hook(lambda one: seen.append((len(one.state), one.steps)))
    loading.load_state_dict(saved)
    assert seen == [4, (4, 2)]
    for i, param in enumerate(loading.param_groups[0]["params"]):
        for name, value in loading.state[param].items():
            torch.testing.assert_close(value, saved["state"][i][name] / 2, rtol=0, atol=0)
    handle.remove()
    loading.load_state_dict(saved)
    assert seen[2:] == [(4, 2)]
