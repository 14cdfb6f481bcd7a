"""Files saved beside the weights never cost a training: their errors are found beforehand, or the weights are kept."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, TrainerCallback

from sbft.errors import DiskError
from sbft.recipe import Recipe, load_recipe
from sbft.runs.record import RunRecord
from sbft.runs.run_recipe import run
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.checkpointing.trial_save import SavingError, save_all_that_can_be, try_saving
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer
from tests.unit.training.test_trainer import Collator, rows

Damage = Callable[[Any, Any], None]


def damage_tokenizer(model: Any, tokenizer: Any) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such normalizer")

    tokenizer.save_pretrained = fail


def damage_config(model: Any, tokenizer: Any) -> None:
    model.config.notes = object()


def damage_generation(model: Any, tokenizer: Any) -> None:
    model.generation_config.temperature = 0.3  # without do_sample, as code may set it during training


def share_weights(model: Any, tokenizer: Any) -> None:
    first, second = model.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight


class AfterStep(TrainerCallback):
    def __init__(self, step: int, damage: Damage) -> None:
        self.step, self.damage = step, damage

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step == self.step:
            self.damage(model, processing_class)


def make(
    folder: Path, model: Any = None, tokenizer: Any = None, *callbacks: TrainerCallback, **settings: Any
) -> SmallBatchTrainer:
    args = SmallBatchTrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **{"max_steps": 3, "save_strategy": "no", **settings}
    )
    return SmallBatchTrainer(
        tiny_model() if model is None else model,
        args,
        Collator(2),
        train_dataset=rows(),
        processing_class=tokenizer or tiny_tokenizer(),
        callbacks=[*callbacks],
    )


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (damage_tokenizer, "The tokenizer cannot be saved.*no such normalizer"),
        (damage_config, "The model's config cannot be saved.*not JSON serializable"),
        (share_weights, "The model cannot be saved.*shared tensors.*up_proj"),
    ],
)
def test_what_cannot_be_saved_is_found_before_the_first_step(
    damage: Damage, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    damage(model, tokenizer)
    trainer = make(tmp_path, model, tokenizer, save_strategy="steps")
    with pytest.raises(SavingError, match=named):
        trainer.train()
    assert trainer.state.global_step == 0 and not list(tmp_path.iterdir())
    # Without checkpoints, training is allowed, with a warning.
    trainer = make(tmp_path, model, tokenizer)
    trainer.train()
    assert trainer.state.global_step == 3 and "save_model() will fail" in caplog.text


def test_an_adapter_gets_a_trial_save_and_so_does_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    adapted = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM"))
    adapted.peft_config["default"].revision = object()
    with pytest.raises(SavingError, match="The adapter's config cannot be saved"):
        try_saving(adapted)
    (tmp_path / "file").write_text("")
    trainer = make(tmp_path / "out", save_strategy="steps")
    trainer.args.output_dir = "/proc/nothing"
    with pytest.raises((DiskError, OSError)):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_trial_save_changes_nothing_and_leaves_nothing(kind: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(kind), tiny_tokenizer()
    before, config = {name: p.clone() for name, p in model.state_dict().items()}, model.config.to_dict()
    try_saving(model, tokenizer, SmallBatchTrainingArguments(str(tmp_path), use_cpu=True), tmp_path)
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert {**model.config.to_dict(), "architectures": None} == {**config, "architectures": None}


@pytest.mark.parametrize(
    ("damage", "lost", "named"),
    [
        (damage_tokenizer, "tokenizer.json", "the tokenizer could not be saved"),
        (damage_config, "config.json", "the model's config could not be saved"),
        (damage_generation, "generation_config.json", "the generation config could not be saved"),
    ],
)
@pytest.mark.parametrize("checkpoints", [True, False])
def test_weights_are_saved_whatever_happens_to_the_rest(
    damage: Damage, lost: str, named: str, checkpoints: bool, tmp_path: Path
) -> None:
    trainer = make(tmp_path, None, None, AfterStep(1, damage), save_strategy="steps" if checkpoints else "no", save_steps=2)
    with pytest.raises(SavingError, match=named) as told:
        trainer.train()
        trainer.save_model()
    folder = tmp_path / "checkpoint-2" if checkpoints else tmp_path
    assert trainer.state.global_step == (2 if checkpoints else 3) and f"weights are in {folder}, but" in str(told.value)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.equal(stored[name], p) for name, p in trainer.model.named_parameters())
    others = {"tokenizer.json", "config.json", "generation_config.json"} - {lost}
    assert all((folder / name).is_file() for name in others) and not (folder / lost).exists()
    if checkpoints:
        resumed = make(tmp_path, save_steps=3, save_strategy="steps")
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 3 and (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.parametrize("adapter", [False, True])
def test_weights_whose_sharing_nobody_declared_are_kept_once(adapter: bool, tmp_path: Path) -> None:
    model: Any = tiny_model()
    if adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
        model.peft_config["default"].revision = object()
    else:
        share_weights(model, None)
    assert list(save_all_that_can_be(model, tiny_tokenizer(), tmp_path)) == [
        "The adapter's config" if adapter else "The model"
    ]
    stored = load_file(tmp_path / f"{'adapter_' * adapter}model.safetensors")
    if adapter:
        assert stored and all("lora_" in name for name in stored)
    else:
        assert len(stored) == len(list(model.named_parameters())) and (tmp_path / "tokenizer.json").is_file()


def test_the_saved_config_says_of_the_cache_what_it_said_before(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="steps")
    assert trainer.model.config.use_cache is False
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-3/config.json").read_text())["use_cache"] is True
    assert trainer.model.config.use_cache is False


def test_the_model_of_each_training_is_repaired_where_model_init_makes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def made() -> Any:
        model = tiny_model()
        model.generation_config.temperature, model.generation_config.eos_token_id = 0.3, 7
        return model

    args = SmallBatchTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer = SmallBatchTrainer(
        None, args, Collator(2), train_dataset=rows(), processing_class=tiny_tokenizer(), model_init=made
    )
    for _ in range(2):
        trainer.train()
        saved = json.loads((tmp_path / "checkpoint-1/generation_config.json").read_text())
        assert saved["eos_token_id"] == [7, 1] and saved["temperature"] == 0.3 and saved["do_sample"]
    assert caplog.text.count("cannot be saved as it is") == 1


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    save_tiny(tmp_path / "model")
    data = tmp_path / "my.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": str(n)}) + "\n" for n in range(6)))

    def made(*settings: str) -> Recipe:
        found = {"model": str(tmp_path / "model"), "data": str(data), "output_dir": str(tmp_path / "out")}
        return load_recipe(None, ["training.max_steps=2", *settings], **found)

    return made


def test_a_run_repairs_what_vicuna_ships_with_one_warning(
    recipe: Callable[..., Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "temperature": 0.9, "top_p": 0.6}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(published))
    assert run(recipe()).status == "ok"
    said = [record.getMessage() for record in caplog.records if "generation config" in record.getMessage()]
    assert len(said) == 1 and "do_sample: true is added" in said[0]
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)
    assert saved.eos_token_id in (1, [1])  # depends on the version of transformers
    AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")


def test_a_run_that_cannot_be_saved_is_refused_before_it_writes(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        tokenizer = tiny_tokenizer()
        damage_tokenizer(None, tokenizer)
        return tokenizer

    monkeypatch.setattr("sbft.runs.prepare.load_tokenizer", load)
    with pytest.raises(SavingError, match="nothing has been trained"):
        run(recipe())
    assert not list((tmp_path / "out").iterdir())


def test_a_run_keeps_its_weights_where_the_tokenizer_fails_at_the_end(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(SavingError, match="the tokenizer could not be saved"):
        run(recipe(), callbacks=[AfterStep(1, damage_tokenizer)])
    assert (tmp_path / "out/model.safetensors").is_file() and (tmp_path / "out/config.json").is_file()
    record = RunRecord.load(tmp_path / "out")
    assert record.status == "error" and record.steps == 2 and "weights are in" in str(record.error)


def test_a_card_that_fails_leaves_the_model_and_says_so_in_the_record(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise UnicodeEncodeError("ascii", "é", 0, 1, "no locale")

    monkeypatch.setattr("sbft.runs.run_recipe.write_card", fail)
    with pytest.raises(UnicodeEncodeError):
        run(recipe())
    assert (tmp_path / "out/model.safetensors").is_file() and RunRecord.load(tmp_path / "out").status == "error"


def test_nothing_is_said_where_all_is_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(tmp_path, tiny_model(dtype=torch.bfloat16), save_strategy="steps")
    with caplog.at_level(logging.WARNING, logger="sbft"):
        trainer.train()
    assert not [record for record in caplog.records if record.name.startswith("sbft")]
