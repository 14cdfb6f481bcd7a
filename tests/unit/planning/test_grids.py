"""Weights on grids, before a run begins: the predicted memory, and the warnings about noise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from sbft.grid import buffer
from sbft.grid.codes import dequantize, quantize
from sbft.grid.formats import GRIDS
from sbft.grid.update import apply_
from sbft.grid.weight import GridWeight
from sbft.models.load import load_config
from sbft.native.device_type import standing_for
from sbft.native.memory import model_bytes
from sbft.planning.check.check_recipe import find
from sbft.planning.check.grid_noise import MOST_NOISE, MOST_NOISE_BESIDE_DISTANCE, Travel, grid_noise, spacing
from sbft.planning.check.model import find_in_model
from sbft.planning.memory.predict import predict_recipe
from sbft.planning.memory.skeleton import skeleton
from sbft.planning.memory.step import FORWARD, StepShape, trace_step
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.runs.prepare import prepare
from tests.tiny import save_tiny

MIB = 2**20
HIDDEN, VOCABULARY, LAYERS = 1024, 32768, 3


def resolved(*overrides: str, model: str = "random:tiny", method: str = "sbft") -> Recipe:
    return resolve(load_recipe(None, list(overrides), model=model, method=method, data="generated:random_text"))


def llama(layers: int = LAYERS) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )


@pytest.mark.parametrize("weights", ["int4", "int8", "int12", "{default: int4, lm_head: int8}"])
def test_a_skeleton_on_grids_weighs_what_the_model_does(tmp_path: Path, weights: str) -> None:
    from sbft.grid.convert import put_on_grids
    from sbft.runs.build import prepare_model

    folder = str(save_tiny(tmp_path, tied=False, hidden=128))
    recipe = resolved(f"weights={weights}", model=folder)
    real = prepare_model(recipe)
    assert recipe.grids is not None and put_on_grids(real, recipe.grids)
    found = skeleton(recipe, load_config(folder))
    assert all(tensor.is_meta for tensor in [*found.parameters(), *found.buffers()])
    assert model_bytes(found) == model_bytes(real)


@pytest.mark.parametrize(("weights", "bytes_each"), [("int4", 0.5625), ("int8", 1 + 2 / 128), ("int12", 1.5 + 2 / 128)])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_predicted_weights_are_codes_and_scales(device: str, weights: str, bytes_each: float) -> None:
    plain = predict_recipe(resolved(), longest=64, device=device, config=llama()).parts
    on_grid = predict_recipe(resolved(f"weights={weights}"), longest=64, device=device, config=llama()).parts
    assert on_grid["weights"] == pytest.approx(plain["weights"] * bytes_each / 2, rel=1e-3)


def test_the_buffer_of_values_is_kept_on_a_cpu_and_freed_after_each_product_on_a_gpu() -> None:
    largest = HIDDEN * 4 * HIDDEN * 2
    assert largest <= buffer.LARGEST_KEPT_BYTES
    for device in ("cpu", "cuda"):
        shape = StepShape(1, 16, 15, False)
        plain = trace_step(resolved(), llama(), shape, device, checkpointing=False).phases[FORWARD]
        grid = trace_step(resolved("weights=int8"), llama(), shape, device, checkpointing=False).phases[FORWARD]
        # On a GPU the buffer is freed after the last product, before the last results of the last layer exist.
        results = 0 if device == "cpu" else 5 * 16 * HIDDEN * 2
        assert plain["activations"] - results <= grid["activations"] <= plain["activations"], device
        in_use = plain["workspace"] if device == "cpu" else 0  # at the peaks of both
        assert grid["workspace"] - in_use >= largest, device
    weight = GridWeight.empty((HIDDEN, HIDDEN), GRIDS["int8"], "meta")
    for device, buffers in (("cpu", 1), ("cuda", 0)):
        with standing_for(device), buffer.planned_buffer() as planned:
            buffer.give_back(buffer.borrow(weight.quantized).memory)
            assert len(planned) == buffers, device


def test_layers_on_grids_of_their_own_are_traced_one_by_one() -> None:
    config = llama(8)
    mixed = resolved("weights={default: int4, layers.7: bfloat16}")
    part = predict_recipe(mixed, longest=16, device="cuda", config=config).parts["weights"]
    assert part == pytest.approx(model_bytes(skeleton(mixed, config)), rel=1e-3)
    assert part > predict_recipe(resolved("weights=int4"), longest=16, device="cuda", config=config).parts["weights"]


# Noise


# A step adds noise of at most s^2 / 4; steps as long as the spacing add less.
@pytest.mark.parametrize(
    ("name", "rate", "over"), [("int4", 1e-3, 1.35), ("int8", 1e-3, 1.35), ("int12", 1e-4, 1.35), ("int12", 1e-3, 2.0)]
)
def test_the_noise_of_a_grid_is_what_its_rounding_adds(name: str, rate: float, over: float) -> None:
    grid, steps = GRIDS[name], 200
    torch.manual_seed(0)
    weight = quantize(torch.randn(64, 1024), grid)
    began = dequantize(weight, torch.float32)
    # Steps cancel in pairs: what is left is noise.
    for step in range(steps):
        direction = torch.randn(64, 1024, generator=torch.Generator().manual_seed(step // 2))
        apply_(weight, direction if step % 2 else -direction, step=rate, decay=0.0, key=(1, step))
    noise = float((dequantize(weight, torch.float32) - began).square().mean().sqrt())
    predicted = Travel((rate,), steps).noise(spacing(grid, weight.block))
    assert predicted / over < noise < 1.2 * predicted


def noise_found(tmp_path: Path, *settings: str) -> str | None:
    folder = save_tiny(tmp_path, hidden=128)
    recipe = resolved(*settings, f"output_dir={tmp_path / 'out'}", "data.train_size=8", model=str(folder))
    found = find_in_model(prepare(recipe), (grid_noise,))
    return found[0].key if found else None


LINEAR = ("training.lr_scheduler_type=linear", "training.warmup_steps=40", "training.max_steps=400")


def test_runs_that_were_measured_to_train_are_not_warned_of(tmp_path: Path) -> None:
    assert noise_found(tmp_path, "weights=int4", "training.learning_rate=1e-4", *LINEAR) is None
    assert noise_found(tmp_path, "weights=int4", "training.learning_rate=3e-4", *LINEAR) is None
    assert noise_found(tmp_path, "weights=int8", "training.learning_rate=1e-4", *LINEAR) is None


def test_a_rate_that_is_lost_in_the_noise_and_the_one_that_is_not(tmp_path: Path) -> None:
    assert noise_found(tmp_path, "weights=int4", "training.learning_rate=1e-5", *LINEAR) == "grid-noise-outweighs-steps"
    assert noise_found(tmp_path, "weights=int8", "training.learning_rate=1e-5", *LINEAR) is None
    assert noise_found(tmp_path, "training.learning_rate=1e-5", *LINEAR) is None  # in bfloat16
    recipe = resolved("weights=int4", "training.learning_rate=1e-5", *LINEAR, f"output_dir={tmp_path}", "data.train_size=8",
                      model=str(save_tiny(tmp_path, hidden=128)))  # fmt: skip
    (finding,) = find_in_model(prepare(recipe), (grid_noise,))
    assert finding.severity == "warning" and "model.embed_tokens.weight and " in finding.why
    assert finding.fix is not None and finding.fix.startswith("--set training.learning_rate=")
    fix = finding.fix.removeprefix("--set ")
    assert noise_found(tmp_path, "weights=int4", *LINEAR, fix) is None


def test_so_many_steps_that_weights_become_noise(tmp_path: Path) -> None:
    many = ("training.lr_scheduler_type=constant", "training.learning_rate=1e-4")
    assert noise_found(tmp_path, "weights=int4", *many, "training.max_steps=4000") == "grid-noise-too-large"
    assert noise_found(tmp_path, "weights=int4", *many, "training.max_steps=500") is None
    assert noise_found(tmp_path, "weights=int8", *many, "training.max_steps=4000") is None


def test_rounding_to_nearest_on_a_grid_is_an_error_where_it_loses_every_step(tmp_path: Path) -> None:
    def severity(*settings: str) -> str:
        recipe = resolved(
            *settings, "optimizer.stochastic_rounding=false", f"output_dir={tmp_path}", "data.train_size=8"
        )
        (found,) = (one for one in find(prepare(recipe)) if one.key == "no-stochastic-rounding")
        return found.severity

    assert [severity(f"weights={name}") for name in ("int4", "int8", "int12", "bfloat16")] == [
        *["error"] * 3,
        "warning",
    ]
    assert severity("weights=int12", "training.learning_rate=1e-3") == "warning"  # over half the 12-bit spacing


def test_the_limits_are_twice_what_was_measured() -> None:
    step = spacing(GRIDS["int4"], 32)
    measured = Travel((0.5e-4,), 400)  # the mean rate of a linear schedule
    assert measured.noise(step) / measured.distance == pytest.approx(MOST_NOISE_BESIDE_DISTANCE / 2, rel=0.05)
    assert 0.9 * MOST_NOISE < measured.times(3).noise(step) < MOST_NOISE
