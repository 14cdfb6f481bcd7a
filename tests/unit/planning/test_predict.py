"""Predictions from a config alone match the size and memory of the whole model, for any number of layers."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaModel, MixtralConfig, PreTrainedConfig

import sbft.models.names
from sbft.errors import ModelError
from sbft.models.load import load_config
from sbft.models.quantized import scales_bytes
from sbft.native.memory import PeakMemory, available_bytes, model_bytes, resident_bytes
from sbft.native.onednn_products import MOST_KEPT, bytes_each, products_bytes
from sbft.planning.memory import predict
from sbft.planning.memory.predict import PARTS, PlanError, predict_recipe
from sbft.planning.memory.skeleton import layers_of, period_of_layers, shortened, skeleton
from sbft.planning.memory.step import StepShape, trace_step
from sbft.planning.memory.trace import Phase
from sbft.recipe import Recipe, load_recipe, resolve
from sbft.recipe.methods import METHODS
from sbft.runs.build import prepare_model
from tests.tiny import save_tiny

MIB = 2**20


def resolved(method: str = "sbft", *overrides: str, model: str = "random:tiny") -> Recipe:
    return resolve(load_recipe(None, list(overrides), model=model, method=method, data="generated:random_text"))


# Skeletons


def _counts(model: torch.nn.Module) -> tuple[int, int]:
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("method", "overrides"),
    [("sbft", ()), ("adam", ()), ("sbft", ("freeze=[embeddings]",)), ("lora", ("lora.rank=4",))],
    ids=["bfloat16", "float32", "frozen embeddings", "adapter"],
)
def test_a_skeleton_weighs_what_the_model_does(
    tmp_path: Path, method: str, overrides: tuple[str, ...], tied: bool
) -> None:
    if METHODS[method].missing_packages:
        pytest.skip(f"needs {', '.join(METHODS[method].missing_packages)}")
    folder = str(save_tiny(tmp_path, tied=tied, attention_bias=True))
    recipe = resolved(method, *overrides, model=folder)
    real, found = prepare_model(recipe), skeleton(recipe, load_config(folder))
    assert all(tensor.is_meta for tensor in [*found.parameters(), *found.buffers()])
    assert _counts(found) == _counts(real)
    assert model_bytes(found) == model_bytes(real)
    expected = {name: (p.shape, p.dtype, p.requires_grad) for name, p in real.named_parameters()}
    assert {name: (p.shape, p.dtype, p.requires_grad) for name, p in found.named_parameters()} == expected


def test_a_skeleton_in_4_bits_weighs_what_bitsandbytes_makes_of_the_model(tmp_path: Path) -> None:
    if METHODS["qlora"].missing_packages:
        pytest.skip(f"needs {', '.join(METHODS['qlora'].missing_packages)}")
    folder = str(save_tiny(tmp_path, hidden=512, layers=2, tied=False))
    recipe = resolved("qlora", model=folder)
    real, found = prepare_model(recipe), skeleton(recipe, load_config(folder))
    # bitsandbytes keeps its tables of values, a few hundred numbers each, for every layer.
    assert model_bytes(found) == pytest.approx(model_bytes(real) + scales_bytes(real), rel=0.01)
    assert _counts(found)[1] == _counts(real)[1]


def gemma(layers: int) -> Gemma3TextConfig:
    kinds = ["full_attention" if i % 3 == 2 else "sliding_attention" for i in range(layers)]
    return Gemma3TextConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=32, layer_types=kinds,
    )  # fmt: skip


def llama(layers: int, **settings: Any) -> LlamaConfig:
    shape = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 512}
    return LlamaConfig(
        **{**shape, "num_attention_heads": 4, "num_key_value_heads": 2, **settings}, num_hidden_layers=layers
    )


def mixtral(layers: int) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip


def test_layers_repeat_with_the_period_of_their_kinds() -> None:
    recipe = resolved()
    for config, period in (
        (llama(5), 1),
        (gemma(9), 3),
        (gemma(5), None),
        (gemma(6), 3),
        (mixtral(4), 1),
        (llama(1), None),
    ):
        assert period_of_layers(config, skeleton(recipe, config)) == period, config


def test_parameters_are_told_by_layer_with_an_adapter_and_without() -> None:
    config = llama(3)
    plain = layers_of(skeleton(resolved(), config))
    assert Counter(plain.values()) == {0: 9, 1: 9, 2: 9}
    assert all(f".layers.{layer}." in name for name, layer in plain.items())
    adapted = skeleton(resolved("lora"), config)
    numbers = layers_of(adapted)
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert Counter(numbers[name] for name in trainable) == {0: 14, 1: 14, 2: 14}  # two for each of seven products


def test_a_shortened_config_is_that_of_the_first_layers() -> None:
    config = gemma(9)
    short = shortened(config, 4)
    assert short.num_hidden_layers == 4 and short.layer_types == config.layer_types[:4]
    assert config.num_hidden_layers == 9 and len(config.layer_types) == 9  # left as it was
    whole, part = (skeleton(resolved(), one).state_dict() for one in (config, short))
    assert {n: v.shape for n, v in part.items()} == {n: whole[n].shape for n in part} and len(part) < len(whole)


# From few layers to all


def _by_end(phase: Phase, phases: Any, layers: int) -> Counter[str]:
    """What the whole model holds in a phase; a negative layer is counted from the last."""
    name, layer = phase
    held: Counter[str] = phases[name, layer if layer is None or layer >= 0 else layers + layer]
    return held


@pytest.mark.parametrize(
    ("config", "method", "overrides"),
    [
        (llama(12), "sbft", ()),
        (llama(12, tie_word_embeddings=True), "adam", ("training.gradient_checkpointing=true",)),
        (llama(12), "lora", ()),
        (gemma(13), "sbft", ()),
        (mixtral(12), "sbft", ("training.gradient_checkpointing=true",)),
        (mixtral(5), "adam-accum", ()),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else None,
)
def test_a_step_of_few_layers_tells_that_of_all_exactly(
    config: PreTrainedConfig, method: str, overrides: tuple[str, ...]
) -> None:
    if METHODS[method].missing_packages:
        pytest.skip(f"needs {', '.join(METHODS[method].missing_packages)}")
    recipe = resolved(method, *overrides)
    checkpointing = bool(overrides)
    shape = StepShape(batch_size=1, tokens=48, labelled=40, padded=False)
    layers = config.num_hidden_layers
    short, long = predict._few_layers(recipe, config)
    assert short < long < layers
    told = predict._step(recipe, config, shape, "cuda", checkpointing, whole=False).phases
    whole = trace_step(recipe, config, shape, "cuda", checkpointing=checkpointing).phases
    for phase, held in told.items():
        assert +held == +_by_end(phase, whole, layers), phase
    assert {name for name, _ in told} == {name for name, _ in whole}
    # The layers in between hold no more than these.
    assert max(held.total() for held in told.values()) == max(held.total() for held in whole.values())


def test_layers_that_are_not_alike_are_all_traced() -> None:
    one_layer_frozen = resolved("sbft", "freeze=['model.layers.3.*']")
    assert predict._few_layers(one_layer_frozen, llama(12)) == (12, 12)
    kinds = ["sliding_attention"] * 11 + ["full_attention"]
    config = gemma(12)
    config.layer_types = kinds
    assert predict._few_layers(resolved(), config) == (12, 12)
    short, long = predict._few_layers(resolved(), llama(12))
    assert short < long < 12
    first = trace_step(one_layer_frozen, llama(12), StepShape(1, 16, 15, False), "cuda", checkpointing=False)
    assert ("backward", 3) not in first.phases and ("backward", 4) in first.phases


# Predictions


@pytest.mark.parametrize(("device", "method"), [("cuda", "sbft"), ("cpu", "adam")])
def test_the_parts_are_all_that_is_held_at_the_peak(device: str, method: str) -> None:
    recipe, config = resolved(method), llama(4)
    found = predict_recipe(recipe, longest=64, device=device, config=config)
    assert tuple(found.parts) == PARTS and min(found.parts.values()) >= 0
    step = predict._step(recipe, config, StepShape(1, 64, 63, False), device, False, whole=device == "cpu")
    traced = max(phase.total() for phase in step.phases.values())
    model = model_bytes(skeleton(recipe, config))
    assert found.parts["weights"] == pytest.approx(model, rel=0.02)  # each tensor is rounded up to whole blocks
    assert found.above_model_bytes == found.needed_bytes - found.parts["weights"] - found.parts["runtime"]
    if device == "cuda":
        assert found.heap_ratio is None and found.peak_bytes == found.needed_bytes - found.parts["runtime"]
        assert found.peak_bytes == traced + 2 * predict._cublas_bytes()
    else:
        assert found.peak_bytes == found.needed_bytes
        assert step.heap_bytes is not None and found.heap_ratio is not None and found.heap_ratio >= 1
        held = max(step.heap_bytes, traced - found.parts["weights"])
        assert (step.products, step.head_products) == (0, 0)  # adam's weights are float32
        assert found.above_model_bytes == held + predict._first_use_bytes(recipe, config)
        again = predict_recipe(recipe, longest=64, device=device, config=config, heap_ratio=found.heap_ratio)
        assert again.above_model_bytes == found.above_model_bytes
        twice = predict_recipe(recipe, longest=64, device=device, config=config, heap_ratio=2.0)
        assert twice.above_model_bytes == 2 * (traced - found.parts["weights"]) + predict._first_use_bytes(recipe, config)
        assert found.parts["runtime"] == pytest.approx(resident_bytes(), rel=0.05)


@pytest.mark.skipif(products_bytes(1) == 0, reason="oneDNN does not multiply bfloat16 on this CPU")
def test_a_cpu_keeps_compiled_products_of_some_lengths() -> None:
    def above(lengths: int, label_counts: int) -> int:
        known = {"longest": 64, "lengths": lengths, "label_counts": label_counts}
        return predict_recipe(resolved(), **known, device="cpu", config=llama(4)).above_model_bytes

    step = predict._step(resolved(), llama(4), StepShape(1, 64, 63, False), "cpu", False, whole=True)
    # Queries and output, keys and values, gate and up, down: forward, and two in backward; the head has its own three.
    assert (step.products, step.head_products) == (12, 3)
    assert above(3, 1) - above(1, 1) == 2 * 12 * bytes_each()
    assert above(1, 3) - above(1, 1) == 2 * 3 * bytes_each()
    assert above(100, 1) == above(1000, 1000) == above(1, 1) + (MOST_KEPT - 15) * bytes_each()


def test_a_longer_sequence_never_needs_less() -> None:
    # Padding requires a mask, so 63 tokens may need more than 64.
    for method, lengths in (("sbft", range(16, 1100, 512)), ("hf-adafactor", range(17, 1100, 512))):
        needed = [predict_recipe(resolved(method), longest=n, device="cuda").needed_bytes for n in lengths]
        assert needed == sorted(needed) and needed[0] < needed[-1]


@pytest.mark.parametrize(
    ("method", "config"),
    [("sbft", llama(5)), ("sbft", llama(5, tie_word_embeddings=True)), ("adam", mixtral(5))],
    ids=["untied", "tied", "experts"],
)
def test_releasing_gradients_never_needs_more_than_holding_them(method: str, config: PreTrainedConfig) -> None:
    def needed(release: bool, labelled: int) -> int:
        recipe = resolved(method, f"optimizer.gradient_release={str(release).lower()}")
        return predict_recipe(recipe, longest=16, labelled=labelled, device="cuda", config=config).needed_bytes

    assert needed(True, 15) <= needed(False, 15)
    assert needed(True, 1) < needed(False, 1)  # the peak is in backward, not in the loss


def test_fewer_labels_and_recomputed_activations_need_less() -> None:
    config = llama(12, vocab_size=4096)
    recipe = resolved()
    assert (
        predict_recipe(recipe, longest=512, labelled=8, device="cuda", config=config).needed_bytes
        < predict_recipe(recipe, longest=512, device="cuda", config=config).needed_bytes
    )
    again = resolved("sbft", "training.gradient_checkpointing=true")
    many, few = (predict_recipe(r, longest=512, labelled=8, device="cuda", config=config) for r in (recipe, again))
    assert few.needed_bytes < many.needed_bytes and few.parts["activations"] < many.parts["activations"]


def test_a_model_that_does_not_run_without_numbers_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_value(self: LlamaModel, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        return self.embed_tokens(input_ids[input_ids.nonzero(as_tuple=True)])

    monkeypatch.setattr(LlamaModel, "forward", by_value)
    for device in ("cpu", "cuda"):
        with pytest.raises(PlanError, match="random:tiny cannot be predicted: a step of Llama does not run"):
            predict_recipe(resolved(), longest=16, device=device)


def test_70_billion_weights_are_predicted_at_once_and_without_them() -> None:
    recipe = resolved(model="random:llama-70b")
    begin = time.process_time()
    with PeakMemory("cpu") as peak:
        found = predict_recipe(recipe, longest=1024, device="cuda")
    seconds = time.process_time() - begin
    if peak.note is None:
        assert peak.peak_bytes - peak.baseline_bytes < 300 * MIB
    assert seconds < 10
    # By hand: four projections per layer (64 heads and 8, of 128), three matrices of the MLP, two norms; two embeddings.
    layer = 2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    weights = 80 * layer + 2 * 128256 * 8192 + 8192
    assert weights == 70_553_706_496
    assert found.parts["weights"] == pytest.approx(2 * weights, rel=1e-4)
    assert found.parts["optimizer_state"] < 2 * weights / 100


# Configs by name


def test_a_config_of_random_weights_is_that_of_its_name() -> None:
    config = load_config("random:tiny")
    assert (config.model_type, config.num_hidden_layers, config.hidden_size, config.vocab_size) == (
        "llama",
        2,
        160,
        512,
    )
    with pytest.raises(ModelError, match="random:tiny"):
        load_config("random:tinny")


def test_a_builtin_config_needs_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the weights were asked for")

    monkeypatch.setattr(sbft.models.names, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(sbft.models.names, "find_gguf", never)
    monkeypatch.setattr(sbft.models.names, "convert", never)
    config = load_config("builtin:smollm2-135m")
    model = skeleton(resolved(), config)
    assert model.num_parameters() == 134_515_008 and not list(tmp_path.iterdir())
    assert config.max_position_embeddings == 8192 and config.tie_word_embeddings
    with pytest.raises(ModelError, match="no built-in model"):
        load_config("builtin:smollm")
    # Once the model is converted, the config of its checkpoint is used.
    folder = tmp_path / "models" / "smollm2-135m-v1"
    llama(7).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    assert load_config("builtin:smollm2-135m").num_hidden_layers == 7


def test_a_folders_config_is_read_and_an_adapters_is_its_bases(tiny_dir: Path, tmp_path: Path) -> None:
    config = load_config(str(tiny_dir))
    assert (config.model_type, config.hidden_size, config.vocab_size) == ("llama", 64, 512)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_dir)}))
    assert load_config(str(tmp_path)).to_dict() == config.to_dict()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "random:tiny"}))
    assert load_config(str(tmp_path)).hidden_size == 160
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="base_model_name_or_path"):
        load_config(str(tmp_path))


def test_what_is_no_causal_model_or_no_folder_has_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no folder"):
        load_config(str(tmp_path / "missing"))
    with pytest.raises(ModelError, match=r"config\.json was expected"):
        load_config(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    with pytest.raises(ModelError, match="not a causal language model"):
        load_config(str(tmp_path))


# Available memory


def test_what_is_available_is_between_what_is_held_and_what_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal:       9000 kB\nMemFree:          10 kB\nMemAvailable:   4096 kB\n")
    unlimited, limit = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    unlimited.write_text("max\n")
    monkeypatch.setattr(sbft.native.memory, "_MEMORY", memory)
    monkeypatch.setattr(sbft.native.memory, "_CONTAINER_LIMITS", (unlimited, limit))
    held = resident_bytes()
    assert held > 50 * MIB  # torch alone takes that
    assert available_bytes("cpu") == pytest.approx(held + 4 * MIB, abs=2 * MIB)
    limit.write_text(f"{3 * MIB}\n")
    assert available_bytes("cpu") == 3 * MIB
