"""New models: the paper's shapes and initialization, and one model per seed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sbft.errors import ModelError
from sbft.models.load import load_config, load_model, load_tokenizer
from sbft.models.scratch import SIZES, counted_parameters, scratch_config, scratch_model
from sbft.planning.memory.fit import make_plan
from tests.tiny import tiny_tokenizer

CPU = torch.device("cpu")
# Width, layers, vocabulary, and the number of parameters in the name.
SHAPES = {
    "0.4m": (96, 2, 2048, 0.4e6),
    "1m": (128, 4, 2048, 1e6),
    "3m": (192, 6, 2048, 3e6),
    "30m": (384, 6, 50257, 30e6),
    "124m": (768, 12, 50257, 124e6),
    "1.3b": (2048, 24, 50257, 1.3e9),
}


def fresh(name: str = "0.4m", seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return scratch_model(f"scratch:{name}", tiny_tokenizer(), seed=seed, dtype=dtype, device=CPU)


def test_each_size_is_what_it_is_called() -> None:
    assert SHAPES.keys() == SIZES.keys()
    for name, (width, layers, vocabulary, called) in SHAPES.items():
        config = load_config(f"scratch:{name}")
        # The paper counts embedding and blocks: queries, keys, values and output, and an MLP of four times the width.
        assert counted_parameters(config) == vocabulary * width + layers * (4 + 2 * 4) * width**2
        assert counted_parameters(config) == pytest.approx(called, rel=0.08)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = width // config.num_attention_heads
        norms = layers * (2 * width + 2 * head) + width
        assert sum(p.numel() for p in model.parameters()) == counted_parameters(config) + vocabulary * width + norms
    assert counted_parameters(load_config("scratch:30m")) == 29_915_520  # the paper's 30M


def test_the_architecture_is_the_papers() -> None:
    model = fresh()
    layer = model.model.layers[0]
    assert layer.self_attn.q_norm.weight.shape == layer.self_attn.k_norm.weight.shape == (32,)
    assert "RMSNorm" in type(model.model.norm).__name__ and not model.config.tie_word_embeddings
    assert all(not name.endswith("bias") for name, _ in model.named_parameters())
    states = torch.randn(3, 96)
    mlp = layer.mlp
    expected = torch.nn.functional.gelu(states @ mlp.up_proj.weight.T, approximate="tanh") @ mlp.down_proj.weight.T
    torch.testing.assert_close(mlp(states), expected)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in model.named_parameters() if parameter.dim() == 1}


def test_the_weights_are_drawn_as_in_the_papers_code() -> None:
    weights = dict(fresh("3m").named_parameters())
    width, heads, size = 192, 3, 64
    # Glorot's fans for flax's kernels: (3, heads, width, head) for queries, keys and values in one; (heads, head, width).
    fans = {"q_proj": 9 * (width + size), "v_proj": 9 * (width + size), "o_proj": 3 * (width + size)}
    fans = {f"self_attn.{name}": fan for name, fan in fans.items()} | {
        "mlp.up_proj": 5 * width,
        "mlp.down_proj": 5 * width,
    }
    assert heads * size == width
    for name, fan in fans.items():
        weight = weights[f"model.layers.2.{name}.weight"]
        bound = math.sqrt(6 / fan)
        # The largest of n uniform numbers is below (1 - 20/n) of the bound only once in e^20 times.
        assert bound * (1 - 20 / weight.numel()) < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=6 / math.sqrt(weight.numel()))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        deviation, count = weights[name].std().item(), weights[name].numel()
        assert deviation == pytest.approx(width**-0.5, rel=6 / math.sqrt(2 * count))


def test_a_seed_is_a_model_in_every_dtype() -> None:
    first, again, other, narrow = (
        dict(fresh(seed=seed, dtype=dtype).named_parameters())
        for seed, dtype in ((0, torch.float32), (0, torch.float32), (1, torch.float32), (0, torch.bfloat16))
    )
    for name, weight in first.items():
        assert torch.equal(weight, again[name]) and torch.equal(weight.bfloat16(), narrow[name])
        assert weight.dim() == 1 or not torch.equal(weight, other[name])
    q, k = (first[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    assert not torch.equal(q, k)


def test_a_fresh_model_loads_again_with_its_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = fresh(), tiny_tokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype=torch.float32)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
    assert model.config.vocab_size == len(tokenizer)


def test_what_there_is_not_is_said() -> None:
    with pytest.raises(
        ModelError, match=r"no size of a new model called '1mb'.*scratch:30m.* Did you mean scratch:1m\?"
    ):
        scratch_config("scratch:1mb")
    with pytest.raises(ModelError, match="its tokenizer comes with the data"):
        load_tokenizer("scratch:1m")
    with pytest.raises(ModelError, match="is new, and has to be pretrained"):
        load_model("scratch:1m", dtype=torch.float32)


def test_a_plan_of_a_fresh_model_has_the_methods_that_train_it() -> None:
    plan = make_plan("scratch:0.4m", sequence_length=64, memory_bytes=1, device="cuda", methods=["sbft", "lora"])
    assert {row.method for row in plan.rows} == {"sbft"} and all(row.prediction is not None for row in plan.rows)
    assert plan.rows[0].command.startswith(
        "sbft pretrain --model scratch:0.4m --data builtin:python-stdlib --method sbft"
    )
