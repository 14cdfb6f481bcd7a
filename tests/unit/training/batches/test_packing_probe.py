"""Packing is for models that keep the documents of a row apart; each model is probed for this."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from sbft.data.collate import Collator
from sbft.errors import ModelError
from sbft.planning.check.check_recipe import check
from sbft.recipe import load_recipe, resolve
from sbft.runs.run_recipe import run
from sbft.training.arguments import SmallBatchTrainingArguments
from sbft.training.batches.packing_probe import packing_leaks_in, refuse_leaking_rows, sees_previous_document
from sbft.training.trainer import SmallBatchTrainer
from tests.tiny import VOCABULARY, save_tiny, tiny_model, tiny_tokenizer
from tests.unit.training.test_trainer import assert_same, rows, weights

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}


def tiny_opt() -> PreTrainedModel:
    shape = {"ffn_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(**SMALL, **shape))


def tiny_mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(**SMALL, state_size=8))


def change_of_second_document(model: PreTrainedModel) -> float:
    """How far the second document's logits move when the first one changes, in a row as `Collator` packs it."""
    second, found = list(range(20, 34)), []
    for first in (list(range(3, 13)), list(range(40, 50))):
        row = {"input_ids": first + second, "labels": [-100] * 24, "position_ids": [*range(10), *range(14)]}
        batch = {key: value for key, value in Collator(0)([row]).items() if key != "labels"}
        if isinstance(model, MambaForCausalLM):
            del batch["position_ids"]
        with torch.no_grad():
            found.append(model(**batch, use_cache=False).logits[0, 10:].float())
    return float((found[0] - found[1]).abs().max())


@pytest.mark.parametrize(
    ("make", "leaks"),
    [
        *((lambda kind=kind: tiny_model(kind), False) for kind in ("llama", "qwen3", "gemma3", "gpt2")),
        (lambda: get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM")), False),
        (tiny_opt, True),
        (tiny_mamba, True),
    ],
    ids=["llama", "qwen3", "gemma3", "gpt2", "lora", "opt", "mamba"],
)
def test_a_loaded_model_tells_what_it_does_and_stays_as_it_is(make: Callable[[], Any], leaks: bool) -> None:
    model = make().train()
    model.config.use_cache = False  # as a trainer sets it
    model.get_output_embeddings().eval()  # someone may have frozen a part
    before, modes = weights(model), [module.training for module in model.modules()]
    assert sees_previous_document(model) is leaks
    assert [module.training for module in model.modules()] == modes
    assert (change_of_second_document(model.eval()) > 1e-4) is leaks
    assert model.train().training and all(parameter.grad is None for parameter in model.parameters())
    assert_same(model, before)
    if leaks:
        with pytest.raises(ModelError, match="see one another.*data.packing=false"):
            refuse_leaking_rows(model)
    else:
        refuse_leaking_rows(model, rows=4)


@pytest.mark.parametrize(
    ("kind", "leaks"),
    [
        *((kind, False) for kind in ("llama", "mistral", "qwen3", "qwen3_moe", "gemma2", "gemma3", "gemma4_text", "phi3")),
        *((kind, False) for kind in ("gpt2", "gpt_neox", "olmo2", "glm4", "smollm3", "deepseek_v3", "mixtral")),
        *((kind, True) for kind in ("gpt_oss", "opt", "bloom", "mpt", "biogpt", "xglm", "openai-gpt", "minimax")),
        *((kind, True) for kind in ("mamba", "mamba2", "rwkv", "recurrent_gemma", "jamba", "bamba", "falcon_h1", "qwen3_next")),
    ],
)
def test_a_class_tells_it_without_weights_from_a_config_of_full_size(kind: str, leaks: bool) -> None:
    config = AutoConfig.for_model(kind)
    before = config.to_dict()
    assert packing_leaks_in(config) is leaks
    assert config.to_dict() == before


def test_a_layer_that_comes_late_is_among_those_that_are_asked() -> None:
    kinds = ["full_attention"] * 6 + ["conv"] + ["full_attention"]
    assert not packing_leaks_in(AutoConfig.for_model("lfm2", num_hidden_layers=8, layer_types=["full_attention"] * 8))
    assert packing_leaks_in(AutoConfig.for_model("lfm2", num_hidden_layers=8, layer_types=kinds))


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], Any]:
    save_tiny(tmp_path / "llama")
    for name, model in (("opt", tiny_opt()), ("mamba", tiny_mamba())):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    data = tmp_path / "my.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {n}?", "completion": str(n)}) + "\n" for n in range(12)))

    def recipe(model: str) -> Any:
        found = {"model": str(tmp_path / model), "data": str(data), "output_dir": str(tmp_path / "out")}
        settings = ["data.packing=true", "data.max_length=60", "training.max_steps=1"]
        return load_recipe(None, settings, **found)

    return recipe


@pytest.mark.parametrize("model", ["opt", "mamba"])
def test_a_recipe_that_packs_is_refused_and_check_says_so(made: Callable[[str], Any], model: str, tmp_path: Path) -> None:
    errors = [one for one in check(resolve(made(model))).findings if one.severity == "error"]
    assert [one.key for one in errors] == ["packing-leaks"] and errors[0].fix == "--set data.packing=false"
    with pytest.raises(ModelError, match="data.packing is true.*lets the documents.*data.packing=false"):
        run(made(model))
    assert not list((tmp_path / "out").iterdir())


def test_a_recipe_packs_for_a_model_that_keeps_documents_apart(made: Callable[[str], Any]) -> None:
    assert check(resolve(made("llama"))).exit_code == 0
    assert run(made("llama")).steps == 1


class Masking:
    """Packed batches with a padding mask, which keeps transformers from looking at the positions."""

    def __init__(self) -> None:
        self.collate = DataCollatorWithFlattening()

    def __call__(self, examples: Any) -> Any:
        batch = self.collate(examples)
        return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


@pytest.mark.parametrize(
    ("make", "collator", "said"),
    [
        (tiny_model, DataCollatorWithFlattening(), None),
        (tiny_model, Masking(), "LlamaForCausalLM lets these documents see one another, because the batches also hold"),
        (tiny_opt, DataCollatorWithFlattening(), "OPTForCausalLM lets these documents see one another. Give it one document"),
    ],
    ids=["right", "mask", "leaking"],
)
def test_other_peoples_packed_batches_are_warned_of_once(
    make: Callable[[], Any], collator: Any, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = SmallBatchTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, save_strategy="no",
        per_device_train_batch_size=3, cast_weights=False, remove_unused_columns=False,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, logger="sbft"):
        SmallBatchTrainer(make(), args, collator, train_dataset=rows()).train()
    told = [record.getMessage() for record in caplog.records if "documents" in record.getMessage()]
    assert len(told) == (said is not None) and (said is None or said in told[0])


def test_positions_that_a_trainer_takes_out_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = SmallBatchTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=1, save_strategy="no", cast_weights=False
    )
    packed = rows().map(lambda row: {"position_ids": [0] * len(row["input_ids"])})
    SmallBatchTrainer(tiny_mamba(), args, Collator(0), train_dataset=packed).train()
    assert "a column position_ids, which MambaForCausalLM does not take" in caplog.text


def test_the_miniature_of_a_composite_model_has_its_language_model(tmp_path: Path) -> None:
    """Also if the language model is probed alone: an outer config's cache setting does not reach the inner one."""
    from sbft.models.miniature import miniatures

    model = next(miniatures(AutoConfig.for_model("gemma3")))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.get_text_config() is not loaded.config
    args = SmallBatchTrainingArguments(str(tmp_path), use_cpu=True, report_to=[], save_strategy="no", cast_weights=False)
    SmallBatchTrainer(loaded, args)
    assert not sees_previous_document(loaded)
