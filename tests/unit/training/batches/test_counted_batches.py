"""Batches of other things than token ids: pixels, sound, embeddings; and inputs in the dtype that weights were cast to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from sbft import SmallBatchTrainer, SmallBatchTrainingArguments
from sbft.training.model_weights import cast_inputs
from tests.tiny import tiny_model

EXAMPLES = 8


def arguments(folder: Path, **settings: Any) -> SmallBatchTrainingArguments:
    basic = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return SmallBatchTrainingArguments(str(folder), **{**basic, "max_steps": 4, **settings})


def picture(side: int) -> Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(side))


def vit(labels: int = 3) -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8, num_labels=labels))


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], num_labels=3)
    )


def wav2vec2() -> nn.Module:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForCTC(
        Wav2Vec2Config(vocab_size=20, ctc_loss_reduction="mean", **shape, **convolutions, **positions)
    )


class Bare(nn.Module):
    """A model that is not from transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.linear(x).squeeze(-1)
        return {"logits": y} if labels is None else {"loss": (y - labels).square().mean(), "logits": y}


KINDS: dict[str, Any] = {
    "vit": (vit, lambda n: {"pixel_values": picture(16), "labels": n % 3}),
    "regression-of-pixels": (lambda: vit(1), lambda n: {"pixel_values": picture(16), "labels": 3.14159 + n}),
    "resnet": (resnet, lambda n: {"pixel_values": picture(32), "labels": n % 3}),
    "wav2vec2": (wav2vec2, lambda n: {"input_values": torch.randn(400), "labels": torch.tensor([1, 2, 3])}),
    "bare": (Bare, lambda n: {"x": torch.ones(4), "labels": torch.tensor(1.0)}),
}


def _takes_mixed_dtypes() -> bool:
    output = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    try:
        nn.functional.mse_loss(output, torch.zeros(2)).backward()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_than_tokens_train_and_count_examples(kind, tmp_path, caplog):
    torch.manual_seed(0)
    if kind == "regression-of-pixels" and not _takes_mixed_dtypes():
        pytest.skip("this torch's mean squared error fails for outputs in bfloat16 and targets in float32")
    make, row = KINDS[kind]
    rows = [row(n) for n in range(EXAMPLES)]
    model = make()
    args = arguments(tmp_path, learning_rate=1e-2, per_device_train_batch_size=2, max_steps=8)
    trainer = SmallBatchTrainer(model, args, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.tokens_seen == 16 and trainer._token_optimizer.tokens_seen == 16
    assert [record.message.count("half-lives are in examples") for record in caplog.records].count(1) == 1
    if kind != "bare":
        assert next(model.parameters()).dtype == torch.bfloat16
    batch_norms = {module.weight.dtype for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    assert batch_norms == ({torch.float32} if kind == "resnet" else set())


def test_embeddings_are_counted_in_tokens_without_padding(tmp_path, caplog):
    mask = torch.tensor([1, 1, 1, 0])
    rows = [{"inputs_embeds": torch.randn(4, 64), "attention_mask": mask, "labels": torch.tensor([5, 6, 7, -100])}] * 4
    trainer = SmallBatchTrainer(
        tiny_model("llama", dtype=torch.float32), arguments(tmp_path), train_dataset=rows, eval_dataset=rows
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.tokens_seen == 4 * 3 and trainer.evaluate()["eval_loss"] < before
    assert not any("in examples" in record.message for record in caplog.records)


def test_nothing_is_said_of_half_lives_where_there_are_none(tmp_path, caplog):
    rows = [{"x": torch.ones(4), "labels": torch.tensor(1.0)}] * EXAMPLES
    SmallBatchTrainer(Bare(), arguments(tmp_path, token_optimizer="sgd"), train_dataset=rows).train()
    assert not any("in examples" in record.message for record in caplog.records)


@pytest.mark.parametrize("batch_type", ["list", "tuple"])
def test_a_loss_of_ones_own_takes_batches_that_are_no_dictionaries(batch_type, tmp_path):
    class Mine(SmallBatchTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            x, y = inputs
            return model(x, y)["loss"]

    kind = {"list": list, "tuple": tuple}[batch_type]
    rows = [(torch.ones(4), torch.tensor(1.0))] * EXAMPLES
    args = arguments(tmp_path, per_device_train_batch_size=4, max_steps=2, remove_unused_columns=False)
    trainer = Mine(Bare(), args, lambda rows: kind(map(torch.stack, zip(*rows, strict=True))), rows)
    trainer.train()
    assert trainer.tokens_seen == 8


def test_labels_and_counts_keep_their_precision():
    seen: dict[str, Any] = {}

    class Model(nn.Module):
        def forward(self, **inputs: Any) -> None:
            seen.update(inputs)

    model = Model()
    cast_inputs(model, torch.bfloat16, ["start_values"])
    cast_inputs(model, torch.bfloat16)  # one hook is enough
    assert len(model._forward_pre_hooks) == 1
    kept = {"labels": torch.rand(2, 3), "future_values": torch.rand(2, 3), "start_values": torch.rand(2, 3)}
    kept |= {"num_items_in_batch": torch.tensor(257.0), "weights": torch.rand(3), "input_ids": torch.ones(2, 3).long()}
    model(**kept, pixel_values=[torch.rand(3, 4)], input_features=torch.rand(2, 3))
    assert all(seen[name] is value for name, value in kept.items())
    assert seen["pixel_values"][0].dtype == seen["input_features"].dtype == torch.bfloat16


def test_a_mask_of_lowest_numbers_is_not_made_infinite():
    seen: dict[str, Any] = {}

    class Model(nn.Module):
        def forward(self, **inputs: Any) -> None:
            seen.update(inputs)

    model = Model()
    cast_inputs(model, torch.bfloat16)
    model(attention_mask=torch.full((1, 1, 2, 2), torch.finfo(torch.float32).min), pixel_values=torch.tensor([[torch.inf]]))
    assert seen["attention_mask"].dtype == torch.bfloat16
    # In a row of masked positions alone, all count equally, as in float32.
    assert seen["attention_mask"].softmax(-1).eq(0.5).all()
    assert seen["pixel_values"].isinf().all()


def test_a_regression_in_bfloat16_has_the_loss_of_its_float32_labels(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=1, **shape))
    rows = [{"input_ids": torch.arange(6), "labels": 1000.5}]
    trainer = SmallBatchTrainer(model, arguments(tmp_path), train_dataset=rows, eval_dataset=rows)
    with torch.no_grad():
        predicted = float(model.eval()(torch.arange(6)[None]).logits)
    assert trainer.evaluate()["eval_loss"] == pytest.approx((predicted - 1000.5) ** 2, rel=1e-5)
