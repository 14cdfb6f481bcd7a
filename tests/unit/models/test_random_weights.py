"""Models with random weights: the published shapes, the same weights every time, and a run on random text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sbft.data.collate import IGNORED_LABEL
from sbft.data.format import format_dataset
from sbft.data.sources import load_source, load_splits
from sbft.errors import DataError, ModelError
from sbft.models.load import load_model, load_tokenizer
from sbft.models.random_weights import ARCHITECTURES, byte_tokenizer, random_config, random_model, training_device
from sbft.recipe import Recipe, load_recipe
from sbft.runs.run_recipe import run

CPU = torch.device("cpu")


def llama_parameters(*, layers: int, width: int, mlp: int, kv: int, vocabulary: int, heads: int) -> int:
    """`kv` is the width of keys and values; `heads` is 1 if the output head is the input embedding, else 2."""
    attention = 2 * width * width + 2 * width * kv
    return layers * (attention + 3 * width * mlp + 2 * width) + heads * vocabulary * width + width


# L (4 D 40 128 + 8 D^2 + 4 D) + 2 V D + 2 D: attention, MLP and the two LayerNorms, embedding and head, last LayerNorm.
GPT3_13B = 40 * (4 * 5140 * 40 * 128 + 8 * 5140**2 + 4 * 5140) + 2 * 50257 * 5140 + 2 * 5140


def parameters(*, layers: int, width: int, mlp: int, heads: int, kv: int, head: int, norms: int, embeddings: int) -> int:
    """Query and output; key and value; a gated MLP; the norms of a layer. Then embeddings, and the last norm."""
    layer = 2 * width * heads * head + 2 * width * kv * head + 3 * width * mlp + norms
    return layers * layer + embeddings + width


def qwen3_parameters(*, layers: int, width: int, mlp: int, heads: int, embeddings: int = 1) -> int:
    """A layer has two norms of the model's width, and two of the heads' size."""
    shape = {"layers": layers, "width": width, "mlp": mlp, "heads": heads, "kv": 8, "head": 128}
    return parameters(**shape, norms=2 * width + 2 * 128, embeddings=embeddings * 151936 * width)


def gemma3_parameters(*, layers: int, width: int, mlp: int, heads: int, kv: int, vocabulary: int) -> int:
    """A layer has four norms of the model's width, and two of the heads' size."""
    shape = {"layers": layers, "width": width, "mlp": mlp, "heads": heads, "kv": kv, "head": 256}
    return parameters(**shape, norms=4 * width + 2 * 256, embeddings=vocabulary * width)


GEMMA3_4B = gemma3_parameters(layers=34, width=2560, mlp=10240, heads=8, kv=4, vocabulary=262208)
# SigLIP at 896 pixels, 64 x 64 patches of 14 x 14: four square matrices, an MLP, two LayerNorms, all with biases; patches,
# positions and the last LayerNorm. Then the projection to the text's width, and its norm.
SIGLIP = (
    27 * (4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 1152 + 4304 + 4 * 1152)
    + (3 * 14 * 14 + 1) * 1152 + 64 * 64 * 1152 + 2 * 1152
)  # fmt: skip
PARAMETERS = {
    "tiny": llama_parameters(layers=2, width=160, mlp=320, kv=80, vocabulary=512, heads=1),
    "smollm2-135m": llama_parameters(layers=30, width=576, mlp=1536, kv=192, vocabulary=49152, heads=1),
    "llama-1b": llama_parameters(layers=16, width=2048, mlp=8192, kv=512, vocabulary=128256, heads=1),
    "llama-8b": llama_parameters(layers=32, width=4096, mlp=14336, kv=1024, vocabulary=128256, heads=2),
    "llama-70b": llama_parameters(layers=80, width=8192, mlp=28672, kv=1024, vocabulary=128256, heads=2),
    "smollm2-360m": llama_parameters(layers=32, width=960, mlp=2560, kv=320, vocabulary=49152, heads=1),
    "smollm2-1.7b": llama_parameters(layers=24, width=2048, mlp=8192, kv=2048, vocabulary=49152, heads=1),
    "smollm3-3b": llama_parameters(layers=36, width=2048, mlp=11008, kv=512, vocabulary=128256, heads=1),
    "llama3.2-1b": llama_parameters(layers=16, width=2048, mlp=8192, kv=512, vocabulary=128256, heads=1),
    "llama3.2-3b": llama_parameters(layers=28, width=3072, mlp=8192, kv=1024, vocabulary=128256, heads=1),
    "llama3.1-8b": llama_parameters(layers=32, width=4096, mlp=14336, kv=1024, vocabulary=128256, heads=2),
    "phi4-mini": llama_parameters(layers=32, width=3072, mlp=8192, kv=1024, vocabulary=200064, heads=1),
    "mistral-7b": llama_parameters(layers=32, width=4096, mlp=14336, kv=1024, vocabulary=32768, heads=2),
    "qwen3-0.6b": qwen3_parameters(layers=28, width=1024, mlp=3072, heads=16),
    "qwen3-1.7b": qwen3_parameters(layers=28, width=2048, mlp=6144, heads=16),
    "qwen3-4b": qwen3_parameters(layers=36, width=2560, mlp=9728, heads=32),
    "qwen3-8b": qwen3_parameters(layers=36, width=4096, mlp=12288, heads=32, embeddings=2),
    "qwen3-32b": qwen3_parameters(layers=64, width=5120, mlp=25600, heads=64, embeddings=2),
    "gemma3-1b": gemma3_parameters(layers=26, width=1152, mlp=6912, heads=4, kv=1, vocabulary=262144),
    "gemma3-4b": GEMMA3_4B,
    "gemma3-4b-vision": GEMMA3_4B + SIGLIP + 1152 * 2560 + 1152,
    "gpt3-13b": GPT3_13B,
}


def on_meta(name: str) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(random_config(f"random:{name}"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_has_the_parameters_of_its_formula(name: str) -> None:
    model = on_meta(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert model.config.get_text_config().vocab_size >= len(byte_tokenizer())


def test_the_13b_model_is_the_one_of_the_paper() -> None:
    config = random_config("random:gpt3-13b")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (5140, 40, 50257)
    assert config.max_position_embeddings == 2048  # rotary: no parameter has 2048 rows
    assert all(2048 not in parameter.shape for parameter in on_meta("gpt3-13b").parameters())
    # Within 0.2% of 12 L D^2 + 2 V D, as the shape is described. The paper has 27.58 GB for SGD, of which 1.21 GB
    # are not weights; both are rounded to 0.01 GB.
    parameters = sum(parameter.numel() for parameter in on_meta("gpt3-13b").parameters())
    assert parameters == pytest.approx(12 * 40 * 5140**2 + 2 * 50257 * 5140, rel=2e-3)
    assert 2 * parameters / 1e9 == pytest.approx(27.58 - 1.21, abs=0.01)
    # Flash and memory-efficient attention require heads of at most 256 dimensions, in multiples of 8.
    head = on_meta("gpt3-13b").model.layers[0].self_attn.head_dim
    assert head <= 256 and head % 8 == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_made_in_the_dtype_asked_for(dtype: torch.dtype) -> None:
    wider: list[torch.dtype] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.numel() > 1000:
                wider.append(made.dtype)
            return made

    with Watch():
        model = random_model("random:tiny", dtype=dtype, device=CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype} == set(wider)
    assert model.dtype == model.config.dtype == dtype and not model.training
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # rotary frequencies are not weights


@pytest.fixture
def small_gpt3(monkeypatch: pytest.MonkeyPatch) -> str:
    """A small gpt3-13b, whose heads' sizes do not add up to its width either."""
    small = {"hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 5, "num_key_value_heads": 5}
    settings = {**ARCHITECTURES["gpt3-13b"], **small, "intermediate_size": 240, "head_dim": 16, "vocab_size": 300}
    monkeypatch.setitem(ARCHITECTURES, "small-gpt3", settings)
    return "random:small-gpt3"


def test_weights_are_normal_norms_one_and_biases_zero(small_gpt3: str) -> None:
    model = random_model(small_gpt3, dtype=torch.float32, device=CPU)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (80, 60)
    for name, parameter in model.state_dict().items():
        if parameter.dim() == 1:
            assert parameter.unique().tolist() == [0.0 if name.endswith(".bias") else 1.0], name
        else:
            # 4,800 numbers or more: four standard errors of their deviation are below 5%.
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.05), name
            assert abs(float(parameter.mean())) < 0.02 * 5 / parameter.numel() ** 0.5, name


def test_the_same_weights_every_time_and_no_two_alike() -> None:
    torch.manual_seed(1)
    first = load_model("random:tiny", dtype=torch.bfloat16)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    again = load_model("random:tiny", dtype=torch.bfloat16)
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in first.state_dict().items())
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not used
    layers = first.model.layers
    assert not torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)
    assert first.get_input_embeddings().weight is first.get_output_embeddings().weight  # tied, as its config says


def test_it_is_made_where_it_is_trained() -> None:
    model = load_model("random:tiny", dtype=torch.bfloat16)
    assert {parameter.device for parameter in model.parameters()} == {training_device()}
    assert training_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_an_unknown_name_is_told_the_near_one() -> None:
    for load in (load_tokenizer, lambda name: load_model(name, dtype=torch.bfloat16)):
        with pytest.raises(ModelError, match="weights called 'gpt3-13B'; expected random:tiny.*mean random:gpt3-13b"):
            load("random:gpt3-13B")


def test_its_tokenizer_has_a_token_for_every_byte() -> None:
    tokenizer = load_tokenizer("random:tiny")
    text = "a  b\n" + "".join(map(chr, range(0x20, 0x180))) + "\N{SNOWMAN}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    assert len(tokenizer) == 259 and {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {
        256, 257, 258,
    }  # fmt: skip
    config = random_config("random:tiny")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (256, 257, 258)


def test_random_text_fills_every_row_to_the_token() -> None:
    rows = load_source("generated:random_text", size=3, options={"length": 96})
    dataset, report = format_dataset(rows, byte_tokenizer(), max_length=96)
    assert [len(ids) for ids in dataset["input_ids"]] == [96, 96, 96] and report.truncated == 0
    # No token comes before the first one to predict it.
    assert all(labels[0] == IGNORED_LABEL and IGNORED_LABEL not in labels[1:] for labels in dataset["labels"])
    assert all(ids[-1] == byte_tokenizer().eos_token_id for ids in dataset["input_ids"])


def test_random_text_has_any_length_from_the_shortest_on() -> None:
    options = {"length": 9, "shortest": 5}
    lengths = [len(text) + 1 for text in load_source("generated:random_text", size=200, options=options)["text"]]
    assert set(lengths) == {5, 6, 7, 8, 9} and min(map(lengths.count, {*lengths})) > 20
    same = [len(text) + 1 for text in load_source("generated:random_text", size=200, options=options)["text"]]
    assert same == lengths


def test_random_text_is_repeatable_and_its_parts_differ() -> None:
    def texts(seed: int) -> list[list[str]]:
        options = {"length": 16}
        splits = load_splits(
            train="generated:random_text", train_size=20, validation_size=5, eval_size=5, seed=seed, options=options
        )
        assert splits.validation is not None and splits.eval is not None and splits.dropped_overlap == 0
        return [list(part["text"]) for part in (splits.train, splits.validation, splits.eval)]

    first = texts(0)
    assert first == texts(0)
    everything = [text for seed in (0, 1) for part in texts(seed) for text in part]
    assert len(set(everything)) == len(everything) == 60
    assert len(load_source("generated:random_text", size=1)["text"][0]) == 1023


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"words": 3}, "no option 'words'; it has length"),
        ({"length": 1}, "is 1; expected"),
        ({"length": "2k"}, "2k"),
        ({"length": 8, "shortest": 9}, "shortest of .* is 9; expected a number of tokens from 2 to 8"),
    ],
)
def test_wrong_options_of_random_text(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load_source("generated:random_text", size=1, options=options)


def recipe(model: str, method: str, folder: Path, *settings: str) -> Recipe:
    data = ["data.train_size=3", "data.options={length: 48}", "data.max_length=48"]
    flags = {"model": model, "method": method, "data": "generated:random_text", "output_dir": str(folder)}
    return load_recipe(None, [*data, "evaluation.before=false", *settings], **flags)


def test_a_run_on_random_weights_and_text(tmp_path: Path) -> None:
    record = run(recipe("random:tiny", "sbft", tmp_path / "run", "data.eval_size=2"))
    assert record.status == "ok" and record.steps == 3 and record.tokens == 3 * 48
    assert record.parameters >= PARAMETERS["tiny"] and record.data["longest"] == 48
    # Random text over 94 characters under random weights: the uniform guess over 512 tokens costs 6.24 nats.
    assert 4.0 < record.metrics["loss"] < 7.0
    trained = load_model(str(tmp_path / "run"), dtype=torch.bfloat16).to(CPU)
    started = load_model("random:tiny", dtype=torch.bfloat16).to(CPU)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert not torch.equal(trained(ids).logits, started(ids).logits)
    assert load_tokenizer(str(tmp_path / "run"))("ab")["input_ids"] == byte_tokenizer()("ab")["input_ids"]


@pytest.mark.parametrize(("method", "steps"), [("sgd", 3), ("sbft", 3), ("adam", 3), ("adam-accum", 1)])
def test_runs_of_the_memory_figure_in_small(
    method: str, steps: int, small_gpt3: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ["dtype=bfloat16", "training.gradient_checkpointing=true"]
    record = run(recipe(small_gpt3, method, tmp_path / "run", *settings))
    assert (record.status, record.steps, record.tokens) == ("ok", steps, 3 * 48)
    assert "logits" not in caplog.text  # no warning that the loss computes them for all tokens
    assert record.memory["weights"] >= 2 * record.parameters  # plus the rotary frequencies
    state = record.memory["optimizer_state"]
    assert (state == 0) == (method == "sgd")
