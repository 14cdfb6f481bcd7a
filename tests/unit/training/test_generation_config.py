"""Generation configs that can be saved, and that stop where training taught the model to stop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from sbft.training.generation_config import add_ends, repaired, settle_generation
from tests.tiny import CHATML_WITHOUT_MARKERS, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("settings", "kept", "left_out"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}, []),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"do_sample": False, "top_p": None}, ["temperature", "top_p"]),
        ({"do_sample": False, "top_k": 20, "typical_p": 0.2, "min_p": 0.1}, {"top_k": None}, ["top_k", "typical_p", "min_p"]),
        ({"early_stopping": True, "length_penalty": 2.0}, {"early_stopping": None}, ["early_stopping", "length_penalty"]),
        ({"num_beams": 4, "early_stopping": True}, {"num_beams": 4, "early_stopping": True}, []),
        ({"num_return_sequences": 3}, {"num_return_sequences": 3, "do_sample": True}, []),
        ({"pad_token_id": -1}, {"pad_token_id": None}, ["pad_token_id"]),
        ({"output_scores": True}, {"output_scores": None}, ["output_scores"]),
        ({"max_new_tokens": 0, "do_sample": True}, {"max_new_tokens": None, "do_sample": True}, ["max_new_tokens"]),
        ({"extra": object()}, {}, ["extra"]),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7, "do_sample": True}, []),
    ],
)
def test_what_does_not_go_together_is_repaired_and_all_else_stays(
    settings: dict[str, Any], kept: dict[str, Any], left_out: list[str]
) -> None:
    config = GenerationConfig(eos_token_id=[1, 7], max_length=99)
    for name, value in settings.items():
        setattr(config, name, value)
    former = copy.copy(vars(config))
    found, repairs = repaired(config)
    found.validate(strict=True)
    found.to_json_string()
    assert (found.eos_token_id, found.max_length) == ([1, 7], 99)
    assert {name: getattr(found, name) for name in kept} == kept
    assert all(name in repairs[0] for name in left_out) and bool(repairs) == (vars(found) != former)


@pytest.mark.parametrize(
    ("known", "ends", "expected"), [(None, [3], 3), (0, [0], 0), (0, [1, 0], [0, 1]), ([5, 6], [6, 2], [5, 6, 2]), (4, [], 4)]
)
def test_ends_are_added_and_none_is_taken_away(known: Any, ends: list[int], expected: Any) -> None:
    config = GenerationConfig(eos_token_id=known)
    add_ends(config, ends)
    assert config.eos_token_id == expected


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_ends_at_its_tokenizers_end_and_at_that_of_a_turn(adapter: bool) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(CHATML_WITHOUT_MARKERS)
    tokenizer.eos_token = "<|bos|>"  # as for a base model; turns end with <|im_end|>
    model.generation_config = GenerationConfig(eos_token_id=9)
    adapted: Any = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")) if adapter else model
    settle_generation(adapted, tokenizer, ends=[11])
    assert set(model.generation_config.eos_token_id) == {9, 11, 0, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    plain = tiny_tokenizer(None)
    model.generation_config = GenerationConfig()
    settle_generation(adapted, plain)
    assert model.generation_config.eos_token_id == plain.eos_token_id


def test_a_template_that_refuses_is_said_and_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer("{{ raise_exception('only tools') }}")
    settle_generation(model, tokenizer)
    assert model.generation_config.eos_token_id == 1 and "end token alone" in caplog.text
