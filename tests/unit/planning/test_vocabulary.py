"""The planner's figures for gradients that come in slices of the vocabulary (on a CPU: test_trace.py)."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from sbft.planning.memory.predict import predict_recipe
from sbft.planning.memory.step import LOSS_BACKWARD, StepShape, trace_step
from sbft.recipe import Recipe, load_recipe, resolve

VOCABULARY, HIDDEN, TOKENS = 32768, 1024, 64
GIB = 2**30


def resolved(method: str, *overrides: str, model: str = "random:tiny") -> Recipe:
    return resolve(load_recipe(None, list(overrides), model=model, method=method, data="generated:random_text"))


def of_loss(setting: str, labels: int = TOKENS - 1) -> int:
    """Bytes of gradients in the backward pass of the loss on a GPU."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    recipe = resolved("sbft", *([] if setting == "default" else [f"optimizer.sliced_vocabulary={setting}"]))
    shape = StepShape(1, labels + 1, labels, False)
    return trace_step(recipe, config, shape, "cuda", checkpointing=False).phases[LOSS_BACKWARD]["gradients"]


def test_on_a_gpu_the_gradient_of_the_logits_takes_the_place_of_that_of_the_head() -> None:
    assert of_loss("true") == 2 * VOCABULARY * (TOKENS - 1)
    assert of_loss("false") == of_loss("default") == 2 * VOCABULARY * HIDDEN


def test_with_more_labels_than_half_the_columns_it_is_whole() -> None:
    assert of_loss("true", HIDDEN // 2) < of_loss("true", HIDDEN // 2 + 1) == 2 * VOCABULARY * HIDDEN


@pytest.mark.long
@pytest.mark.parametrize(
    ("method", "goal"), [("sbft-int4", 5.8), ("sbft-int8", 9.0), ("sbft-int12", 12.9), ("sbft", 16.1)]
)
def test_llama_with_8b_weights_trains_in_less_than_the_goal(method: str, goal: float) -> None:
    settings = ("training.gradient_checkpointing=true", "optimizer.sliced_vocabulary=true")
    recipe = resolved(method, *settings, model="random:llama3.1-8b")
    assert predict_recipe(recipe, longest=1024, device="cuda").peak_bytes < goal * GIB
