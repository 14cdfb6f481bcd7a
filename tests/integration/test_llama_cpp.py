"""Exported GGUF files, run by llama.cpp itself: the same tokens of a text, and the same greedy answers.

Needs the package llama-cpp-python, which has to be compiled, so no extra of sbft installs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from sbft.cli.app import app
from sbft.data.format import encode_prompts
from sbft.export.gguf_file import export_gguf
from sbft.models.load import resolve
from sbft.recipe import load_recipe
from sbft.runs.run_recipe import run as run_recipe
from tests.tiny import CHATML, save_tiny
from tests.unit.export.test_gguf import BUILTIN, PATTERN, gemma_like_tokenizer, split_tokenizer

llama_cpp = pytest.importorskip("llama_cpp")

TEXTS = [
    "The quick brown fox jumps over the lazy dog, and 12345 others don't.\n\n  What's that?",
    "Übergrößenträger: ça va? 日本語 🦙 \t tabs",
    " leading and trailing spaces ",
]
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load a model without ggml's AMX code, whose instructions some virtual machines report but do not execute."""
    (file,) = folder.glob("*.gguf")
    plain = llama_cpp.llama_model_default_params()
    plain.use_extra_bufts = False
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_model_default_params", lambda: plain)
    return llama_cpp.Llama(str(file), n_ctx=256, n_threads=1, verbose=False, logits_all=True)


def sharpened(source: Path) -> None:
    """Enlarge the weights, so that the likeliest token leads by more than rounding errors."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.save_pretrained(source)


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """Tokens that llama.cpp generates after a prompt."""
    answer = []
    for token in model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
        answer.append(int(token))
        if len(answer) == count:
            return answer
    return answer


@pytest.mark.parametrize(
    ("kind", "tokenizer", "changes"),
    [
        ("llama", None, {}),
        ("llama", None, {"rope_parameters": LLAMA_3}),
        ("llama", None, {"attention_bias": True, "tied": True}),
        ("llama", split_tokenizer(PATTERN, ignore_merges=True), {}),
        ("qwen3", split_tokenizer(PATTERN.replace("{1,3}", ""), ignore_merges=False), {}),
        ("gemma3", gemma_like_tokenizer(), {"vocab": 610, "query_pre_attn_scalar": 32, "layers": 7}),
    ],
    ids=["llama", "llama-3-rope", "llama-bias", "llama-3-tokenizer", "qwen3", "gemma3"],
)
def test_llama_cpp_reads_and_answers_as_transformers_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, tokenizer: Any, changes: dict[str, Any]
) -> None:
    source = save_tiny(tmp_path / "model", kind, hidden=128, dtype=torch.float32, **changes)
    if tokenizer is not None:
        tokenizer.save_pretrained(source)
    sharpened(source)
    export_gguf(source, tmp_path / "gguf")
    ours, theirs = AutoModelForCausalLM.from_pretrained(source), run(tmp_path / "gguf", monkeypatch)
    fast = AutoTokenizer.from_pretrained(source)
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == fast(text, add_special_tokens=False)["input_ids"]
    prompt = fast(TEXTS[0], add_special_tokens=False)["input_ids"]
    theirs.eval(prompt)
    logits = torch.tensor(theirs.scores[: len(prompt)])
    with torch.no_grad():
        expected = ours(torch.tensor([prompt])).logits[0]
    assert (logits - expected).abs().max() < 2e-2 * expected.abs().max()  # llama.cpp keeps keys and values in float16
    generated = ours.generate(torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None)
    assert greedy(theirs, prompt, 12) == generated[0, len(prompt) :].tolist()


@pytest.mark.skipif(BUILTIN is None, reason="needs the weights of the built-in model")
@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_the_built_in_model_answers_in_its_chat_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    source = Path(resolve("builtin:smollm2-135m"))
    export_gguf(source, tmp_path / "gguf", dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model, theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), run(tmp_path / "gguf", monkeypatch)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :]
    answer = theirs.create_chat_completion(question, max_tokens=24, top_k=1, temperature=0.0, repeat_penalty=1.0)
    expected = tokenizer.decode(ids, skip_special_tokens=True)
    assert answer["choices"][0]["message"]["content"] == expected


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_what_was_trained_on_a_grid_answers_as_generate_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, form: str
) -> None:
    source = save_tiny(tmp_path / "model", kind, hidden=128, chat_template=CHATML if kind == "llama" else None)
    if kind == "qwen3":
        split_tokenizer(PATTERN.replace("{1,3}", ""), ignore_merges=False).save_pretrained(source)
    question, answer = "What is the sum of 12 and 30?", "The quick brown fox jumps over the lazy dog."
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": question, "completion": answer}) + "\n")
    settings = [f"weights={form}", "training.learning_rate=1e-2", "training.max_steps=60", "training.seed=0"]
    paths = {"model": str(source), "data": str(data), "output_dir": str(tmp_path / "run")}
    run_recipe(load_recipe(None, settings, **paths))
    assert export_gguf(tmp_path / "run", tmp_path / "gguf").coded > 0
    asked = CliRunner().invoke(app, ["generate", str(tmp_path / "run"), question, "--max-new-tokens", "40"])
    assert asked.stdout.strip() == answer  # learned, so the likeliest token leads by more than rounding errors
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    (prompt,) = encode_prompts([{"prompt": question}], tokenizer)
    tokens = greedy(run(tmp_path / "gguf", monkeypatch), prompt, len(tokenizer(answer)["input_ids"]))
    assert tokenizer.decode(tokens, skip_special_tokens=True) == answer
