"""The loss without logits replaces no other: if a model's or a trainer's own loss is different, that one is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    DataCollatorForSeq2Seq,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    XLMConfig,
    XLMWithLMHeadModel,
)

from sbft.data.collate import Collator
from sbft.errors import ModelError, TrainingError
from sbft.training.arguments import ArgumentError, SmallBatchArguments, SmallBatchTrainingArguments
from sbft.training.loss.cross_entropy import linear_cross_entropy
from sbft.training.loss.head import UnknownHead
from sbft.training.loss.head_trial import check_batch, find_head
from sbft.training.trainer import SmallBatchMixin, SmallBatchTrainer
from tests.tiny import tiny_model, tiny_tokenizer

ROW = {"input_ids": [3, 4, 5, 6, 7, 8], "labels": [-100, -100, 5, 6, 7, 8]}
SETTINGS: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_steps": 2, "cast_weights": False,
    "remove_unused_columns": False,
}  # fmt: skip


def make(folder: Path, model: Any, kind: type[Any] = SmallBatchTrainer, **settings: Any) -> Any:
    given = {name: settings.pop(name) for name in ("model_init", "optimizers", "eval_dataset") if name in settings}
    args = SmallBatchTrainingArguments(output_dir=str(folder), **{**SETTINGS, **settings})
    return kind(model=model, args=args, train_dataset=[ROW] * 4, data_collator=Collator(2), **given)


def batch(rows: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (rows, 9), generator=generator)
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels}


LLAMA = type(tiny_model())


class WithAuxiliary(LLAMA):  # type: ignore[misc,valid-type]
    """Adds a loss term from a second head: always, only in training, or of zero, as `how` says."""

    how = "always"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.second = nn.Linear(config.hidden_size, 2)
        nn.init.normal_(self.second.weight)

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, labels=labels, output_hidden_states=True, **kwargs)
        if labels is not None and (self.how != "in training" or self.training):
            term = self.second(out.hidden_states[-1]).square().mean()
            out.loss = out.loss + (0.0 if self.how == "of zero" else 1e-2) * term
        return out


class OfInputs(LLAMA):  # type: ignore[misc,valid-type]
    """Feeds its labels to its layers."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        seen = input_ids if labels is None else input_ids.where(labels == -100, labels)
        return super().forward(seen, labels=labels, **kwargs)


class TwiceThroughItsHead(LLAMA):  # type: ignore[misc,valid-type]
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, labels=labels, output_hidden_states=True, **kwargs)
        if labels is not None:
            out.loss = out.loss + 0.0 * self.lm_head(out.hidden_states[0]).sum()
        return out


class WithoutThePad(LLAMA):  # type: ignore[misc,valid-type]
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        return super().forward(*args, labels=None if labels is None else labels.masked_fill(labels == 2, -100), **kwargs)


class MeanOfRows(LLAMA):  # type: ignore[misc,valid-type]
    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            rows = zip(out.logits[:, :-1].float(), labels[:, 1:], strict=True)
            out.loss = torch.stack([F.cross_entropy(logits, row) for logits, row in rows]).mean()
        return out


class WithAFactor(LLAMA):  # type: ignore[misc,valid-type]
    """Has a factor on the logits that is in its config, and that is trained."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.factor = nn.Parameter(torch.tensor(0.5))
        config.logit_scale = 0.5

    def forward(self, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        items = kwargs.pop("num_items_in_batch", None)
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * self.factor
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, self.config.vocab_size, num_items_in_batch=items)
        return out


class Weighted(LLAMA):  # type: ignore[misc,valid-type]
    """Accepts weights for tokens."""

    def forward(self, *args: Any, labels: Any = None, token_weights: Any = None, **kwargs: Any) -> Any:
        out = super().forward(*args, labels=labels, **kwargs)
        if labels is not None and token_weights is not None:
            losses = F.cross_entropy(out.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
            out.loss = (losses * token_weights[:, 1:]).sum() / (labels[:, 1:] != -100).sum()
        return out


def of_class(kind: type[Any], **attributes: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(tiny_model(vocab=64).config).float().eval()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


BART: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
    "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1, "dropout": 0.0,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.0,
    "decoder_start_token_id": 2, "pad_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
OTHER_LOSSES: dict[str, tuple[Callable[[], Any], str]] = {
    "a term": (lambda: of_class(WithAuxiliary), "is not the cross entropy of next tokens"),
    "a term in training": (lambda: of_class(WithAuxiliary, how="in training"), "is not the cross entropy of next tokens"),
    "a term of zero": (lambda: of_class(WithAuxiliary, how="of zero"), "also trains second.weight and 1 more"),
    "labels as inputs": (lambda: of_class(OfInputs), "depends on the labels"),
    "two uses of the head": (lambda: of_class(TwiceThroughItsHead), "2 uses"),
    "no loss of padding": (lambda: of_class(WithoutThePad), "is not the cross entropy of next tokens"),
    "a mean of means": (lambda: of_class(MeanOfRows), "is not the cross entropy of next tokens"),
    "a factor that is trained": (lambda: of_class(WithAFactor), "also trains factor"),
    "masked, not shifted": (
        lambda: XLMWithLMHeadModel(XLMConfig(vocab_size=64, emb_dim=32, n_layers=1, n_heads=4, pad_index=0)),
        "is not the cross entropy of next tokens",
    ),
    "shifted by the caller": (
        lambda: BartForCausalLM(BartConfig(**BART, is_decoder=True, is_encoder_decoder=False)),
        "is not the cross entropy of next tokens",
    ),
    "BART": (lambda: BartForConditionalGeneration(BartConfig(**BART)), "encoder-decoder"),
    "T5": (lambda: T5ForConditionalGeneration(T5Config(**T5)), "encoder-decoder"),
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_a_model_with_another_loss_trains_on_it_after_one_warning(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, reason = OTHER_LOSSES[name]
    model = build().eval()
    trainer = make(tmp_path, model)
    inputs = batch()
    with torch.no_grad():
        for mode in (True, False):
            model.train(mode)
            torch.manual_seed(0)
            own = model(**inputs).loss
            torch.manual_seed(0)
            assert torch.equal(trainer.compute_loss(model, dict(inputs)), own)
    assert caplog.text.count("is taken from the logits of all tokens, which costs memory") == 1 and reason in caplog.text


@pytest.mark.parametrize("how", ["of zero", "always"])
def test_all_of_such_a_model_is_trained(tmp_path: Path, how: str) -> None:
    model = of_class(WithAuxiliary, how=how)
    before = model.second.weight.detach().clone()
    make(tmp_path, model, learning_rate=1e-2).train()
    assert torch.equal(model.second.weight, before) == (how == "of zero")


def test_a_loss_that_ignores_the_number_it_is_given_is_not_replaced() -> None:
    model = of_class(MeanOfRows)
    with pytest.raises(UnknownHead, match="is not the cross entropy"):
        find_head(model)

    class MeanOfAll(LLAMA):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = of_class(MeanOfAll)
    find_head(model)
    with pytest.raises(UnknownHead, match="does not divide its loss by it"):
        find_head(model, with_num_items=True)


def test_a_trial_leaves_no_trace() -> None:
    model = of_class(LLAMA)
    model.model.layers[0].self_attn.add_module("noise", nn.Dropout(0.5))
    model.model.norm.add_module("batch_norm", nn.BatchNorm1d(64))
    model.model.norm.register_forward_hook(
        lambda module, args, out: module.batch_norm(out.flatten(0, 1)).view_as(out) if len(out) > 1 else out
    )
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.random.get_rng_state()
    find_head(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), numbers)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_does_not_hide_that_a_loss_is_the_usual_one() -> None:
    model = tiny_model("gpt2", dtype=torch.float32, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    assert find_head(model.train()).linear is model.lm_head


# Trainers


def test_a_trainer_keeps_its_own_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, return_outputs, **kwargs)
            return (loss[0] + 100, loss[1]) if return_outputs else loss + 100

    class Beneath(SmallBatchMixin, Own):
        pass

    class Before(Own, SmallBatchTrainer):
        pass

    model = of_class(LLAMA)
    inputs = batch()
    own = float(model(**inputs).loss) + 100
    for kind, replaced in ((Beneath, False), (Before, True)):
        trainer = make(tmp_path, model, kind, logging_steps=1)
        assert float(trainer.compute_loss(model, dict(inputs))) == pytest.approx(own, rel=1e-5)
        assert float(trainer.prediction_step(model, inputs, True)[0]) == pytest.approx(own, rel=1e-5)
        trainer.train()
        assert trainer.state.log_history[0]["loss"] > 100
        assert (trainer._head is not None) == replaced
        reason = trainer._why_not_graphed(trainer._find_head())
        assert reason is not None and "it has another loss" in reason
    assert caplog.text.count("The loss is that of") == 1 and "Own.compute_loss" in caplog.text


def test_a_loss_that_was_put_into_the_trainer_itself_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = of_class(LLAMA)
    trainer = make(tmp_path, model)
    trainer.compute_loss = lambda model, inputs, **kwargs: model(**inputs).loss * 7
    assert "it has another loss" in trainer._why_not_graphed(trainer._find_head())
    usual = Trainer.compute_loss
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, *args, **kwargs: 7 * usual(self, *args, **kwargs))
    patched, inputs = make(tmp_path, model), batch()
    assert float(patched.compute_loss(model, dict(inputs))) == pytest.approx(7 * float(model(**inputs).loss), rel=1e-6)


@dataclass
class Seq2SeqArguments(SmallBatchArguments, Seq2SeqTrainingArguments):
    """As a user would write it."""


class SmallBatchSeq2Seq(SmallBatchMixin, Seq2SeqTrainer):
    """As a user would write it, too."""


@pytest.mark.parametrize("kind", ["BART", "T5"])
def test_an_encoder_decoder_learns_and_generates(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    answer = [10, 11, 12, 1]
    rows = [{"input_ids": [20 + i, 30 + i, 40 + i], "labels": answer} for i in range(8)]
    model = OTHER_LOSSES[kind][0]()
    args = Seq2SeqArguments(
        output_dir=str(tmp_path), learning_rate=5e-2, predict_with_generate=True, generation_max_length=8,
        **{**SETTINGS, "max_steps": 30, "per_device_train_batch_size": 8},
    )  # fmt: skip
    trainer = SmallBatchSeq2Seq(
        model=model, args=args, train_dataset=rows, eval_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer(None), model=model),
        compute_metrics=lambda found: {"right": float((found.predictions[:, 1:5] == answer).mean())},
    )  # fmt: skip
    before = trainer.evaluate()["eval_loss"]
    own = model.eval()(**trainer.data_collator(rows)).loss.item()
    assert before == pytest.approx(own, rel=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before / 2 and after["eval_right"] == 1.0


# A model that changes


def test_a_head_is_sought_again_when_the_model_changes(tmp_path: Path) -> None:
    model = of_class(LLAMA)
    trainer = make(tmp_path, model)
    inputs = batch()

    def is_own() -> bool:
        found = float(trainer.compute_loss(trainer.model, dict(inputs)))
        return found == pytest.approx(float(trainer.model(**inputs).loss), rel=1e-5)

    first = trainer._find_head()
    assert is_own() and trainer._find_head() is first
    model.resize_token_embeddings(80)
    assert is_own() and trainer._find_head().linear.weight.shape[0] == 80
    handle = model.lm_head.register_forward_hook(lambda module, args, out: out + 1.0 * torch.arange(80))
    assert is_own() and trainer._find_head() is None
    handle.remove()
    assert is_own() and trainer._find_head() is not None
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    assert is_own() and trainer._find_head() is None
    trainer.model = of_class(WithAuxiliary)
    assert is_own() and trainer._find_head() is None
    trainer.model = of_class(LLAMA)
    assert is_own() and trainer._find_head().linear is trainer.model.lm_head


def test_a_model_that_takes_the_place_of_another_is_trained(tmp_path: Path) -> None:
    trainer = make(tmp_path, of_class(LLAMA), learning_rate=1e-2, cast_weights=True)
    trainer.train()
    former = [one.detach().clone() for one in trainer.model.parameters()]
    first, trainer.model = trainer.model, of_class(LLAMA)
    before = trainer.model.model.layers[0].mlp.up_proj.weight.detach().bfloat16()
    trainer.train()
    assert not torch.equal(trainer.model.model.layers[0].mlp.up_proj.weight, before)
    assert {one.dtype for one in trainer.model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(one, was) for one, was in zip(first.parameters(), former, strict=True))
    model = of_class(LLAMA)
    given = make(tmp_path, model, optimizers=(torch.optim.SGD(model.parameters(), lr=0.1), None), token_optimizer=None)
    given.model = of_class(LLAMA)
    with pytest.raises(TrainingError, match="updates weights of the previous model"):
        given.train()


def test_models_made_for_each_training_are_cast_as_one_that_is_passed_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(tmp_path, None, model_init=lambda: of_class(LLAMA), cast_weights=True, eval_dataset=[ROW])
    for _ in range(3):
        trainer.train()
        assert {one.dtype for one in trainer.model.parameters()} == {torch.bfloat16}
        assert trainer._find_head().linear is trainer.model.lm_head and trainer.evaluate()["eval_loss"] > 0
        trainer.model = trainer.model_wrapped = None  # as hyperparameter_search leaves it after a trial
    assert caplog.text.count("are cast to bfloat16") == 1


# Batches


def test_weights_of_tokens_in_a_batch_are_not_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = of_class(Weighted)
    trainer = make(tmp_path, model)
    inputs = batch()
    weighted = {**inputs, "token_weights": torch.rand(2, 9)}
    for given in (inputs, weighted, {**inputs, "output_attentions": False}):
        assert float(trainer.compute_loss(model, dict(given))) == pytest.approx(float(model(**given).loss), rel=1e-5)
    assert trainer._batches_tried == {frozenset({"token_weights"}): False, frozenset({"output_attentions"}): True}
    assert caplog.text.count("The loss of batches that hold token_weights is taken from the logits") == 1


@pytest.mark.parametrize("named", ["labels", "shift_labels"])
def test_a_small_part_of_a_batch_is_tried(named: str) -> None:
    model = of_class(LLAMA)
    given = {"input_ids": torch.randint(3, 60, (5, 40)), named: torch.randint(3, 60, (5, 40))}
    given["attention_mask"] = torch.ones(5, 1, 40, 40, dtype=torch.bool).tril()
    seen: list[Any] = []
    handle = model.register_forward_pre_hook(lambda m, args, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True)
    if named == "labels":
        check_batch(model, find_head(model), given, with_num_items=False)
    else:
        with pytest.raises(UnknownHead, match="returns no loss"):  # llama's own loss also needs labels
            check_batch(model, find_head(model), given, with_num_items=False)
    handle.remove()
    assert max(shape.numel() for shape in seen) == 12


def test_labels_that_are_no_tokens_are_left_to_the_model(tmp_path: Path) -> None:
    trainer = make(tmp_path, of_class(LLAMA))
    ids = batch()["input_ids"]
    for labels in (torch.randint(3, 60, (2, 9, 4)), torch.rand(2, 9), torch.zeros(2, dtype=torch.int64), None):
        assert not trainer._takes_logits_free_loss({"input_ids": ids, "labels": labels})
    assert not trainer._takes_logits_free_loss([{"input_ids": ids}])
    assert trainer._takes_logits_free_loss(batch())
    with pytest.raises(ModelError, match="hidden states of shape .* logits_to_keep"):
        trainer._find_head().loss(trainer.model, {**batch(), "position_ids": None, "labels": torch.ones(2, 5).long()})


@pytest.mark.parametrize("piece_elements", [2**24, 700])
@pytest.mark.parametrize("label", [-1, 64])
def test_a_label_outside_the_vocabulary_is_an_error(label: int, piece_elements: int) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(
            torch.ones(4, 8), torch.ones(64, 8), torch.tensor([1, 2, label, 3]), piece_elements=piece_elements
        )


def test_a_model_of_images_and_text_has_its_own_loss_without_logits(tmp_path: Path) -> None:
    config = Gemma3Config(
        text_config={
            "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 4, "num_key_value_heads": 2,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16,
            "patch_size": 8,
        },
        image_token_index=120, mm_tokens_per_image=4,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config).float().train()
    ids = torch.randint(3, 100, (1, 12))
    ids[0, 1:5] = 120
    labels = ids.masked_fill(ids == 120, -100)
    image = {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 120).long()}
    trainer, inputs = make(tmp_path, model), {"input_ids": ids, "labels": labels, **image}
    assert float(trainer.compute_loss(model, dict(inputs))) == pytest.approx(float(model(**inputs).loss), rel=1e-5)
    assert trainer._head is not None and not trainer._batches_tried


# Autocast


def test_under_autocast_the_loss_and_its_gradient_are_the_models(tmp_path: Path) -> None:
    losses = []
    for settings in ({}, {"logits_free_loss": False}):
        torch.manual_seed(0)
        trainer = make(tmp_path, of_class(LLAMA), bf16=True, logging_steps=1, learning_rate=1e-3, **settings)
        trainer.train()
        assert (trainer._head is None) == bool(settings)
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        losses.append([trainer.evaluate([ROW])["eval_loss"]])
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1] == pytest.approx(losses[3], rel=1e-3)  # another attention kernel, in bfloat16


# Adapters


def adapters() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    task = {"task_type": "CAUSAL_LM"}
    return {
        "prompt": peft.PromptTuningConfig(**task, num_virtual_tokens=4),
        "prefix": peft.PrefixTuningConfig(**task, num_virtual_tokens=4),
        "p-tuning": peft.PromptEncoderConfig(**task, num_virtual_tokens=4, encoder_hidden_size=32),
        "ia3": peft.IA3Config(**task, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "loha": peft.LoHaConfig(**task, r=4, target_modules=["q_proj", "v_proj"]),
        "oft": peft.OFTConfig(**task, oft_block_size=8, target_modules=["q_proj", "v_proj"]),
    }


@pytest.mark.parametrize("name", ["prompt", "prefix", "p-tuning", "ia3", "loha", "oft"])
def test_every_kind_of_adapter_trains_on_the_models_loss(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = peft.get_peft_model(of_class(LLAMA), adapters()[name])
    trainer = make(tmp_path, model, learning_rate=3e-2, max_steps=8, logging_steps=1)
    inputs = batch()
    found = trainer.compute_loss(model, dict(inputs))
    own = model(**inputs).loss
    assert float(found) == pytest.approx(float(own), rel=1e-5)
    trained = [one for one in model.parameters() if one.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(found, trained), torch.autograd.grad(own, trained), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    before = [one.detach().clone() for one in trained]
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert losses[-1] < losses[0]
    assert not any(torch.equal(one, was) for one, was in zip(trained, before, strict=True))
    learns_a_prompt = name in ("prompt", "prefix", "p-tuning")
    assert (trainer._head is None) == learns_a_prompt
    assert caplog.text.count("a prompt that is learned puts positions in front of the labels") == learns_a_prompt


def test_prefix_tuning_with_checkpointed_activations_is_refused(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(of_class(LLAMA), adapters()["prefix"])
    with pytest.raises(ArgumentError, match="prefix tuning.*Set gradient_checkpointing=False"):
        make(tmp_path, model, gradient_checkpointing=True)


@pytest.mark.parametrize("name", [None, "ia3"])
def test_reentrant_checkpointing_changes_nothing(tmp_path: Path, name: str | None) -> None:
    ends = []
    for settings in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        model = of_class(LLAMA)
        if name is not None:
            model = pytest.importorskip("peft").get_peft_model(model, adapters()[name])
        trainer = make(tmp_path, model, gradient_release=False, learning_rate=1e-2, **settings)
        trainer.train()
        ends.append([one.detach().clone() for one in model.parameters()])
    for found, expected in zip(*ends, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
