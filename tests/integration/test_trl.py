"""The mixin on TRL's own trainer: same weights as without TRL, and TRL's metrics on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, TrainingArguments

import sbft
from sbft.training.arguments import ArgumentError, SmallBatchTrainingArguments
from sbft.training.trainer import SmallBatchMixin, SmallBatchTrainer
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

trl = pytest.importorskip("trl")


SmallBatchSFTConfig: Any = sbft.small_batch(trl.SFTConfig)


class SmallBatchSFTTrainer(SmallBatchMixin, trl.SFTTrainer):
    """TRL's trainer with small-batch training in front."""


def _rows() -> Dataset:
    questions = [f"What is {a} plus {a + 1}?" for a in range(8)]
    answers = [f" The answer is {2 * a + 1}." for a in range(8)]
    return Dataset.from_dict({"prompt": questions, "completion": answers})


def _make(tmp_path: Path, dtype: torch.dtype = torch.bfloat16, **arguments: Any) -> SmallBatchSFTTrainer:
    args = SmallBatchSFTConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=8,
        report_to=[],
        gradient_checkpointing=False,
        disable_tqdm=True,
        **{"logging_steps": 1, "save_strategy": "no", "learning_rate": 2e-3, **arguments},
    )
    return SmallBatchSFTTrainer(
        model=tiny_model(dtype=dtype),
        args=args,
        train_dataset=_rows(),
        eval_dataset=_rows(),
        processing_class=tiny_tokenizer(),
    )


def test_arguments_are_ours_where_we_have_an_opinion_and_trls_elsewhere(tmp_path: Path) -> None:
    args = SmallBatchSFTConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (args.per_device_train_batch_size, args.learning_rate, args.bf16) == (1, 1e-4, False)
    assert args.max_length == trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True).max_length


def test_it_trains_to_the_weights_of_the_plain_trainer(tmp_path: Path) -> None:
    theirs = _make(tmp_path)
    theirs.train()
    history = theirs.state.log_history
    assert theirs.tokens_seen > 0 and history[-2]["loss"] < history[0]["loss"]
    assert theirs._token_optimizer is not None and theirs._token_optimizer.steps == 8
    args = SmallBatchTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=8, report_to=[], save_strategy="no", learning_rate=2e-3,
        remove_unused_columns=False,  # older TRL collators make labels from a column that no model takes
    )  # fmt: skip
    ours = SmallBatchTrainer(
        model=tiny_model(), args=args, train_dataset=theirs.train_dataset, data_collator=theirs.data_collator
    )
    ours.train()
    for name, parameter in ours.model.named_parameters():
        assert torch.equal(parameter, dict(theirs.model.named_parameters())[name]), name


def test_trl_logs_what_it_logs_of_its_own_loss(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 2, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 4
    }  # fmt: skip
    # In float32: in bfloat16, rounding differs between processors and changes which token is likeliest once in fifty.
    settings |= {"learning_rate": 2e-2, "cast_weights": False, "dtype": torch.float32}
    ours, theirs = _make(tmp_path, **settings), _make(tmp_path, logits_free_loss=False, **settings)
    for trainer in (ours, theirs):
        trainer.train()
    assert ours._head is not None and theirs._head is None
    history = [[log for log in one.state.log_history if "train_runtime" not in log] for one in (ours, theirs)]
    assert len(history[0]) == len(history[1]) == 6
    for found, expected in zip(*history, strict=True):
        assert found.keys() == expected.keys()
        prefix = "eval_" if "eval_loss" in found else ""
        assert {prefix + name for name in ("mean_token_accuracy", "entropy", "num_tokens", "loss")} <= found.keys()
        for name in ("num_tokens", "mean_token_accuracy", "entropy", "loss"):
            assert found[prefix + name] == pytest.approx(expected[prefix + name], rel=2e-2, abs=1e-6), name
    assert any(log["eval_mean_token_accuracy"] > 0 for log in history[0] if "eval_loss" in log)


def test_the_best_checkpoint_may_be_that_of_the_best_token_accuracy(tmp_path: Path) -> None:
    trainer = _make(
        tmp_path, learning_rate=2e-2, eval_strategy="steps", eval_steps=4, save_strategy="steps", save_steps=4,
        load_best_model_at_end=True, metric_for_best_model="eval_mean_token_accuracy", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    accuracies = [log["eval_mean_token_accuracy"] for log in trainer.state.log_history if "eval_loss" in log]
    assert trainer._head is not None and trainer.state.best_metric == max(accuracies)


def test_a_trainer_of_trl_with_another_loss_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class SmallBatchGKD(SmallBatchMixin, GKDTrainer):
        """As a user would write it."""

    args = sbft.small_batch(GKDConfig)(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1, lmbda=0.0, cast_weights=False, save_strategy="no"
    )
    chats = [{"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]}] * 4
    trainer = SmallBatchGKD(
        model=tiny_model(dtype=torch.float32), teacher_model=tiny_model(dtype=torch.float32), args=args,
        train_dataset=Dataset.from_list(chats), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    trainer.teacher_model.load_state_dict(trainer.model.state_dict())
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert abs(trainer.compute_loss(trainer.model, batch).item()) < 1e-4
    trainer.train()
    assert caplog.text.count("The loss is that of GKDTrainer.compute_loss") == 1


def test_another_loss_of_trl_is_kept(tmp_path: Path) -> None:
    dft, nll = _make(tmp_path, loss_type="dft"), _make(tmp_path)
    dft.train()
    nll.train()
    assert dft.state.log_history[0]["loss"] < 0.1 * nll.state.log_history[0]["loss"]


def test_trls_own_arguments_are_taken_with_a_line_that_says_what_that_set(tmp_path: Path, caplog: Any) -> None:
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_length=77, learning_rate=3e-4)
    made = SmallBatchSFTTrainer(model=tiny_model(), args=args, train_dataset=_rows(), processing_class=tiny_tokenizer()).args
    assert isinstance(made, sbft.small_batch(trl.SFTConfig))
    kept = {"max_length": 77, "learning_rate": 3e-4, "loss_type": args.loss_type, "logging_steps": 10}
    ours = {"per_device_train_batch_size": 1, "bf16": False, "mixed_precision": "no", "max_grad_norm": 0.0}
    assert {name: getattr(made, name) for name in kept | ours} == kept | ours
    (line,) = [record.message for record in caplog.records if "small_batch(SFTConfig)" in record.message]
    assert "per_device_train_batch_size=1 (was 8)" in line and "bf16=False (was True)" in line and "learning_rate" not in line


@pytest.mark.parametrize(("name", "size"), [("KTO", 8), ("GRPO", 8), ("RLOO", 8), ("DPO", 1), ("Reward", 1)])
def test_trainers_that_compare_examples_of_a_batch_keep_their_batch_size(name: str, size: int, tmp_path: Path) -> None:
    made = sbft.small_batch(getattr(trl, f"{name}Config"))(output_dir=str(tmp_path), use_cpu=True)
    assert made.per_device_train_batch_size == size and made.token_optimizer == "adafactor"


def test_arguments_of_transformers_become_those_that_trl_expects(tmp_path: Path, caplog: Any) -> None:
    basic = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none"}
    for args in (
        TrainingArguments(**basic, learning_rate=3e-4, gradient_accumulation_steps=2),
        SmallBatchTrainingArguments(**basic, learning_rate=3e-4, gradient_accumulation_steps=2, gradient_release=False),
    ):
        trainer = SmallBatchSFTTrainer(
            model=tiny_model(), args=args, train_dataset=_rows(), processing_class=tiny_tokenizer()
        )
        made = trainer.args
        assert isinstance(made, sbft.small_batch(trl.SFTConfig))
        assert (made.learning_rate, made.gradient_accumulation_steps, made.gradient_release) == (3e-4, 2, False)
        assert made.per_device_train_batch_size == 1
    with pytest.raises(ArgumentError, match="args is a dict; expected a SFTConfig"):
        SmallBatchSFTTrainer(model=tiny_model(), args={}, train_dataset=_rows(), processing_class=tiny_tokenizer())


ONLINE = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}


@pytest.mark.parametrize("kind", ONLINE)
def test_trainers_with_prompts_for_batches_count_the_tokens_of_prompts_and_completions(
    kind: str, tmp_path: Path, caplog: Any
) -> None:
    theirs, config = ONLINE[kind]

    class Mine(SmallBatchMixin, theirs):  # type: ignore[misc, valid-type]
        seen: list[int] = []

        def _prepare_inputs(self, inputs: Any) -> Any:
            made = super()._prepare_inputs(inputs)
            self.seen.append(int(made["prompt_mask"].sum() + made["completion_mask"].sum()))
            return made

    basic = {"use_cpu": True, "max_steps": 2, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    args = config(
        output_dir=str(tmp_path / "out"), max_completion_length=6, num_generations=4, gradient_checkpointing=False, **basic
    )
    trainer = Mine(
        model=str(save_tiny(tmp_path / "model")),
        reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
        args=args,
        train_dataset=_rows().remove_columns("completion"),
    )
    trainer.train()
    assert trainer.args.per_device_train_batch_size == 8 and trainer.tokens_seen == sum(Mine.seen) > 2 * 8
    assert not any("in examples" in record.message for record in caplog.records)


def test_a_model_that_trl_loads_by_its_name_keeps_its_cache_setting(tmp_path: Path, tiny_dir: Path) -> None:
    args = SmallBatchSFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1, save_strategy="no")
    trainer = SmallBatchSFTTrainer(str(tiny_dir), args, train_dataset=_rows(), processing_class=tiny_tokenizer())
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert LlamaConfig.from_pretrained(tiny_dir).use_cache is True
    assert LlamaConfig.from_pretrained(tmp_path / "saved").use_cache is True
