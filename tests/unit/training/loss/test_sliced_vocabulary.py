"""Training without a gradient of the vocabulary's size gives the same bits as training with one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from sbft.optim.vocabulary import OuterProduct
from sbft.training.loss.cross_entropy import Receiver, linear_cross_entropy
from sbft.training.loss.sliced_vocabulary import most_rows
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import tiny_model
from tests.unit.training import test_trainer

VOCABULARY, HIDDEN = 4099, 128


def make(tmp_path: Path, model: Any, *, sliced_vocabulary: bool | None = True, **arguments: Any) -> SmallBatchTrainer:
    return test_trainer.make(tmp_path, model, sliced_vocabulary=sliced_vocabulary, **arguments)


def trained(tmp_path: Path, model: Any = None, **arguments: Any) -> SmallBatchTrainer:
    if model is None:
        model = tiny_model(tied=arguments.pop("tied"), vocab=VOCABULARY, hidden=HIDDEN)
    trainer = make(tmp_path, model, learning_rate=1e-3, **arguments)
    trainer.train()
    return trainer


def values(trainer: SmallBatchTrainer) -> dict[str, torch.Tensor]:
    return {name: p.dequantize() if hasattr(p, "grid") else p.detach() for name, p in trainer.model.named_parameters()}


def assert_equal(found: SmallBatchTrainer, expected: SmallBatchTrainer) -> None:
    for name, value in values(expected).items():
        assert torch.equal(values(found)[name], value), name


@pytest.fixture
def largest_gradients(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the dense gradients that reach optimizers."""
    from sbft.optim.base import TokenOptimizer

    sizes: list[int] = []
    update = TokenOptimizer._update_parameter

    def look(self: TokenOptimizer, param: torch.Tensor, **settings: Any) -> None:
        if param.grad is not None:
            sizes.append(param.grad.numel())
        update(self, param, **settings)

    monkeypatch.setattr(TokenOptimizer, "_update_parameter", look)
    return sizes


@pytest.mark.parametrize("kind", ["adafactor", "sgd"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", [None, "int8", "int4"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_weights_are_the_same_bit_for_bit(
    tmp_path: Path, largest_gradients: list[int], kind: str, tied: bool, weights: str | None, decay: float
) -> None:
    settings = {"token_optimizer": kind, "tied": tied, "weights": weights, "weight_decay": decay}
    whole = trained(tmp_path, sliced_vocabulary=False, **settings)
    assert max(largest_gradients) == VOCABULARY * HIDDEN
    largest_gradients.clear()
    sliced = trained(tmp_path, sliced_vocabulary=True, **settings)
    assert max(largest_gradients) < VOCABULARY * HIDDEN
    assert_equal(sliced, whole)
    norms = [
        [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log] for trainer in (sliced, whole)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=2e-6 if kind == "sgd" else 1e-7) and len(norms[0]) == 6
    assert not sliced.model.get_input_embeddings().sparse


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"per_device_train_batch_size": 2}])
def test_so_they_are_with_other_settings(tmp_path: Path, tied: bool, settings: dict[str, Any]) -> None:
    ends = [trained(tmp_path, tied=tied, sliced_vocabulary=sliced, **settings) for sliced in (True, False)]
    assert_equal(*ends)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sliced", [True, False])
def test_no_tensor_of_the_vocabulary_times_the_hidden_size_is_made(tmp_path: Path, tied: bool, sliced: bool) -> None:
    model = tiny_model(tied=tied, vocab=VOCABULARY, hidden=HIDDEN)
    trainer = make(tmp_path, model, max_steps=2, sliced_vocabulary=sliced)
    tables: list[str] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.layout == torch.strided and out.numel() >= VOCABULARY * HIDDEN:
                tables.extend([] if func.is_view or "detach" in str(func) else [str(func)])
            return out

    step = trainer.training_step

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        with Watch():
            return step(*args, **kwargs)

    trainer._find_head()  # its trial makes gradients of its own
    trainer.training_step = watched
    trainer.train()
    assert bool(tables) == (not sliced), tables


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_resumed_run_ends_in_the_same_bits(tmp_path: Path, tied: bool, weights: str | None) -> None:
    settings: dict[str, Any] = {"tied": tied, "weights": weights, "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", **settings)
    resumed = make(
        tmp_path / "resumed",
        tiny_model(tied=tied, vocab=VOCABULARY, hidden=HIDDEN),
        learning_rate=1e-3,
        weights=weights,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_equal(resumed, whole)


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_a_frozen_table_stays_and_the_other_is_sliced(tmp_path: Path, largest_gradients: list[int], part: str) -> None:
    def frozen() -> Any:
        model = tiny_model(tied=False, vocab=VOCABULARY, hidden=HIDDEN)
        next(p for name, p in model.named_parameters() if part in name).requires_grad_(False)
        return model

    sliced = trained(tmp_path, frozen())
    assert 0 < max(largest_gradients) < VOCABULARY * HIDDEN
    assert_equal(sliced, trained(tmp_path, frozen(), sliced_vocabulary=False))


def test_a_loss_that_is_not_finite_leaves_the_step_out(tmp_path: Path) -> None:
    trainer = make(tmp_path, tiny_model(tied=True, vocab=VOCABULARY, hidden=HIDDEN), learning_rate=1e-3)
    before = {name: value.clone() for name, value in values(trainer).items()}
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(torch.nan)
    trainer.train()
    assert trainer.skipped_steps == 6
    for name, value in values(trainer).items():
        assert "model.norm" in name or torch.equal(value, before[name]), name


@pytest.mark.parametrize("other", ["adamw", "muon"])
def test_other_optimizers_keep_plain_gradients(tmp_path: Path, largest_gradients: list[int], other: str) -> None:
    trained(tmp_path, tied=False, token_optimizer=other)
    assert max(largest_gradients) == VOCABULARY * HIDDEN


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_that_are_kept_are_plain(tmp_path: Path, largest_gradients: list[int], tied: bool) -> None:
    trained(tmp_path, tied=tied, gradient_release=False)
    assert max(largest_gradients) == VOCABULARY * HIDDEN


@pytest.mark.parametrize("tied", [True, False])
def test_on_a_cpu_few_labels_are_sliced_by_default(tmp_path: Path, largest_gradients: list[int], tied: bool) -> None:
    trained(tmp_path, tied=tied, sliced_vocabulary=None)  # at most 9 labels for 128 columns
    assert max(largest_gradients) < VOCABULARY * HIDDEN


def test_a_head_is_sliced_up_to_a_share_of_its_columns() -> None:
    assert [most_rows(setting, 128, "cpu") for setting in (None, True, False)] == [16, 64, 0]
    assert [most_rows(setting, 128, "cuda") for setting in (None, True, False)] == [0, 64, 0]


def test_more_labels_make_the_whole_gradient_of_a_head(tmp_path: Path, largest_gradients: list[int]) -> None:
    # 3 x 12 tokens, less the first two of each row, are more than an eighth of the columns.
    settings = {"tied": False, "per_device_train_batch_size": 3}
    default = trained(tmp_path, sliced_vocabulary=None, **settings)
    assert max(largest_gradients) == VOCABULARY * HIDDEN
    assert_equal(default, trained(tmp_path, sliced_vocabulary=False, **settings))


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_hook_on_a_gradient_gets_the_plain_one(tmp_path: Path, when: str) -> None:
    shapes: list[tuple[torch.Size, bool]] = []

    def look(grad: torch.Tensor) -> None:
        shapes.append((grad.shape, grad.is_sparse))

    class Hooks(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
            if (state.global_step == 0) == (when == "before") and not shapes:
                for module in (model.get_input_embeddings(), model.get_output_embeddings()):
                    module.weight.register_hook(look)

    ends = []
    for callbacks in ([Hooks()], []):
        model = tiny_model(tied=False, vocab=VOCABULARY, hidden=HIDDEN)
        ends.append(trained(tmp_path, model, callbacks=callbacks))
    steps = 6 if when == "before" else 5
    assert shapes == [(torch.Size((VOCABULARY, HIDDEN)), False)] * 2 * steps
    assert_equal(*ends)


def test_a_weight_hooked_before_training_has_a_plain_gradient(tmp_path: Path, largest_gradients: list[int]) -> None:
    model = tiny_model(tied=True, vocab=VOCABULARY, hidden=HIDDEN)
    calls: list[bool] = []
    model.lm_head.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad is not None))
    hooked = trained(tmp_path, model)
    assert max(largest_gradients) == VOCABULARY * HIDDEN and calls == [True] * 6
    assert_equal(hooked, trained(tmp_path, tied=True))


def test_modules_that_peft_saves_are_trained_to_the_same_bits(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head", "embed_tokens"])
        return peft.get_peft_model(tiny_model(tied=False, vocab=VOCABULARY, hidden=HIDDEN), config)

    assert_equal(*(trained(tmp_path, adapted(), sliced_vocabulary=setting) for setting in (None, False)))


@pytest.mark.parametrize("pieces", ["one piece", "slices"])
@pytest.mark.parametrize("settings", [{}, {"scale": 0.5, "softcap": 5.0}])
def test_the_product_is_the_gradient_of_the_head(pieces: str, settings: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary, width, tokens = 1001, 64, 32
    hidden = torch.randn(tokens, width, generator=generator, requires_grad=True)
    weight = (0.3 * torch.randn(vocabulary, width, generator=generator)).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    more = {**settings, "piece_elements": 2**24 if pieces == "one piece" else 300 * tokens}
    linear_cross_entropy(hidden, weight, labels, **more).backward()
    expected, of_hidden = weight.grad, hidden.grad
    weight.grad = hidden.grad = None
    received: list[OuterProduct] = []
    receiver = Receiver(received.append, most_rows=width // 2)
    linear_cross_entropy(hidden, weight, labels, receiver=receiver, **more).backward()
    assert weight.grad is None and torch.equal(hidden.grad, of_hidden)
    (product,) = received
    torch.testing.assert_close(product.left @ product.right, expected, rtol=1e-5, atol=1e-7)
    received.clear()
    twice = torch.cat((hidden.detach(), hidden.detach()[:1]))  # factors hardly smaller than the gradient
    linear_cross_entropy(twice, weight, torch.cat((labels, labels[:1])), receiver=receiver, **more).backward()
    assert not received and weight.grad is not None
