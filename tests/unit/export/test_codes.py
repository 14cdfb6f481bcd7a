"""Exports of a model that was trained on a grid: every reader gets the trained values."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.errors import ExportError
from sbft.export.checkpoint import export_model
from sbft.export.codes import packed
from sbft.export.compressed import export_compressed
from sbft.export.gguf_architectures import with_adjacent_pairs
from sbft.export.gguf_file import export_gguf
from sbft.grid.codes import load_codes
from sbft.grid.convert import put_on_grids
from sbft.grid.grid_files import save_checkpoint, save_dense
from sbft.grid.scales import SCALES_FILE
from sbft.grid.weight import GridWeight
from tests.tiny import tiny_model, tiny_tokenizer
from tests.unit.grid.cases import dense_copy, pair, tokens

MIXED = {"default": "int8", "up_proj": "int4", "v_proj": "int12", "k_proj": "bfloat16"}


def save(folder: Path, weights: str | dict[str, str], kind: str = "llama", **settings: Any) -> PreTrainedModel:
    """Save a model on a grid as a run does; a hidden size of 192 has blocks of 64 and 128."""
    model = tiny_model(kind, **{"hidden": 192, "intermediate_size": 256, **settings})
    put_on_grids(model, weights, smallest_elements=1)
    save_dense(model, folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """Code times scale, in float32, of each weight on a grid."""
    return {name: p.dequantize(torch.float32) for name, p in model.named_parameters() if isinstance(p, GridWeight)}


def gguf_tensors(folder: Path) -> dict[str, tuple[str, Tensor, int]]:
    """Type, values in float32 and size in bytes of each tensor of the GGUF file in a folder."""
    gguf = pytest.importorskip("gguf")
    (file,) = folder.glob("*.gguf")
    return {
        one.name: (
            one.tensor_type.name,
            torch.from_numpy(gguf.dequantize(one.data, one.tensor_type).copy()),
            one.n_bytes,
        )
        for one in gguf.GGUFReader(file).tensors
    }


NAMES = {"down_proj": "ffn_down", "up_proj": "ffn_up", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_gguf_has_the_values_that_were_trained(kind: str, form: str, tmp_path: Path) -> None:
    scalar = {"query_pre_attn_scalar": 48} if kind == "gemma3" else {}
    model = save(tmp_path / "run", form, kind, **scalar)
    export = export_gguf(tmp_path / "run", tmp_path / "to")
    written, values = gguf_tensors(tmp_path / "to"), trained(model)
    assert export.coded == len(values) and export.uncoded == ()
    stored = {"int8": "Q8_0", "int4": "Q4_0"}[form]
    assert (tmp_path / "to" / f"model-{stored.lower()}.gguf").is_file()
    for part, name in NAMES.items():
        expected = values[f"model.layers.1.self_attn.{part}.weight" if "attn" in name else f"model.layers.1.mlp.{part}.weight"]
        if kind == "llama" and part in ("q_proj", "k_proj"):
            expected = with_adjacent_pairs(expected, 4 if part == "q_proj" else 2)
        found, read, size = written[f"blk.1.{name}.weight"]
        assert found == stored and torch.equal(read, expected)
        assert size == expected.numel() // 32 * (34 if form == "int8" else 18)
    assert torch.equal(written["token_embd.weight"][1], values["model.embed_tokens.weight"])
    assert written["output_norm.weight"][0] == "F32"


def test_gguf_of_a_mixture_and_of_another_dtype(tmp_path: Path) -> None:
    model = save(tmp_path / "run", MIXED)
    export = export_gguf(tmp_path / "run", tmp_path / "to")
    values, written = trained(model), gguf_tensors(tmp_path / "to")
    types = {part: written[f"blk.0.{name}.weight"][0] for part, name in NAMES.items()}
    assert types == {"down_proj": "Q8_0", "up_proj": "Q4_0", "q_proj": "Q8_0", "k_proj": "BF16", "v_proj": "BF16"}
    assert export.uncoded == tuple(f"model.layers.{i}.self_attn.v_proj.weight" for i in range(2))
    assert torch.equal(written["blk.0.ffn_up.weight"][1], values["model.layers.0.mlp.up_proj.weight"])

    export_gguf(tmp_path / "run", tmp_path / "8", dtype="q8_0")
    found, read, _ = gguf_tensors(tmp_path / "8")["blk.0.ffn_up.weight"]
    assert found == "Q8_0" and torch.equal(read, values["model.layers.0.mlp.up_proj.weight"])

    plain = export_gguf(tmp_path / "run", tmp_path / "16", dtype="bfloat16")
    assert plain.coded == 0 and plain.uncoded == ()
    assert {kind for kind, _, _ in gguf_tensors(tmp_path / "16").values()} == {"BF16", "F32"}


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_words_hold_the_first_codes_in_their_lowest_bits(form: str) -> None:
    weight, _ = pair((4, 64), form)
    bits = weight.grid.bits
    words = packed(weight.quantized).to(torch.int64) & 0xFFFFFFFF
    unpacked = torch.stack([words >> (bits * i) & (1 << bits) - 1 for i in range(32 // bits)], -1).flatten(-2)
    assert torch.equal(unpacked - (1 << bits - 1), load_codes(weight.quantized))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_transformers_computes_as_the_trained_model(form: str, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = save(tmp_path / "run", form, kind)
    export = export_compressed(tmp_path / "run", tmp_path / "to", max_shard_bytes=400_000)
    assert export.files > 1 and export.coded == 14
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "to")
    expected = dict(dense_copy(model).named_parameters())
    parameters = dict(loaded.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(torch.equal(parameters[name], one) for name, one in expected.items())
    of_the_run = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, of_the_run(tokens()).logits)


@pytest.mark.parametrize("weights", ["int8", "int4", MIXED], ids=["int8", "int4", "mixed"])
def test_float32_has_code_times_scale(weights: Any, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = save(tmp_path / "run", weights)
    export = export_compressed(tmp_path / "run", tmp_path / "to")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "to", dtype=torch.float32)
    with torch.no_grad():
        loaded(tokens())  # decompresses, unless loading has
    parameters, values = dict(loaded.named_parameters()), trained(model)
    coded = [name for name in values if name not in export.uncoded]
    assert len(coded) == export.coded >= 10
    assert all(torch.equal(parameters[name], values[name]) for name in coded)
    assert all(torch.equal(parameters[name], values[name].bfloat16().float()) for name in export.uncoded)


def test_the_size_is_that_of_codes_and_scales(tmp_path: Path) -> None:
    model = save(tmp_path / "run", "int4")
    export_compressed(tmp_path / "run", tmp_path / "to")
    stored = load_file(tmp_path / "to" / "model.safetensors")
    weight = dict(model.named_parameters())["model.layers.0.mlp.up_proj.weight"]
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].nbytes == weight.numel() // 2
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].shape == (weight.shape[0], weight.shape[1] // 32)
    assert stored["model.layers.0.mlp.up_proj.weight_shape"].tolist() == list(weight.shape)
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "to" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head"] and not (tmp_path / "to" / SCALES_FILE).exists()


@pytest.mark.parametrize("file_format", ["gguf", "compressed-tensors", "safetensors"])
def test_a_checkpoint_is_exported_as_the_run_would_be(file_format: str, tmp_path: Path) -> None:
    model = save(tmp_path / "run", "int8")
    checkpoint = tmp_path / "run" / "checkpoint-7"
    save_checkpoint(model, checkpoint)
    tiny_tokenizer().save_pretrained(checkpoint)
    (checkpoint / "optimizer.pt").write_bytes(b"not of the model")
    runner = CliRunner()
    for source, to in ((tmp_path / "run", "a"), (checkpoint, "b")):
        done = runner.invoke(app, ["export", str(source), "--to", str(tmp_path / to), "--format", file_format])
        assert done.exit_code == 0, done.output
        assert ("are those that were trained" in done.output) == (file_format != "safetensors")
    names = [sorted(path.name for path in (tmp_path / to).iterdir()) for to in "ab"]
    assert names[0] == names[1]
    if file_format == "gguf":
        one, other = gguf_tensors(tmp_path / "a"), gguf_tensors(tmp_path / "b")
        assert one.keys() == other.keys() and all(torch.equal(one[name][1], other[name][1]) for name in one)
        return
    one, other = (load_file(tmp_path / to / "model.safetensors") for to in "ab")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    generated = runner.invoke(app, ["generate", str(checkpoint), "What is 12 and 30?", "--max-new-tokens", "4"])
    assert generated.exit_code == 0, generated.output


def test_an_exported_model_generates_if_the_package_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "run", "int8")
    export_compressed(tmp_path / "run", tmp_path / "to")
    runner = CliRunner()
    arguments = ["What is 12 and 30?", "--max-new-tokens", "8"]
    if importlib.util.find_spec("compressed_tensors"):
        answers = [runner.invoke(app, ["generate", str(tmp_path / folder), *arguments]) for folder in ("run", "to")]
        assert answers[0].exit_code == 0 and answers[0].stdout == answers[1].stdout != ""
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused = runner.invoke(app, ["generate", str(tmp_path / "to"), *arguments])
    assert refused.exit_code == 2 and "in the format of compressed-tensors" in " ".join(refused.output.split())


def test_what_has_no_codes_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "int12", "int12")
    tiny_model("llama").save_pretrained(tmp_path / "plain")
    for source in ("int12", "plain"):
        with pytest.raises(ExportError, match="No linear layer .* was trained in 8 or 4 bits"):
            export_compressed(tmp_path / source, tmp_path / "to")
    assert not (tmp_path / "to").exists()
    for flags in (["--dtype", "float16"], ["--base", "x"], ["--as-lora", "4"]):
        arguments = ["export", str(tmp_path / "int12"), "--to", str(tmp_path / "to"), "--format", "compressed-tensors", *flags]
        refused = CliRunner().invoke(app, arguments)
        assert refused.exit_code == 2 and f"{flags[0]} cannot be given" in " ".join(refused.output.split())


def test_int12_exports_as_the_values_it_computes_with(tmp_path: Path) -> None:
    model = save(tmp_path / "run", "int12")
    export_model(tmp_path / "run", tmp_path / "to")
    values = load_file(tmp_path / "to" / "model.safetensors")
    assert all(torch.equal(values[name], one.bfloat16()) for name, one in trained(model).items())
