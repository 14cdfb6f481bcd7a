"""Fills a folder with what TRL's tests load from the hub: tiny random models, and the data sets TRL's scripts generate.

    python scripts/conformance/tiny_hub.py TRL_CHECKOUT FOLDER

A machine without the hub can then run the same tests. The tokenizer is trained on the Zen of Python, of which most of
that data is made, and has the chat templates that come with TRL.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers as tf
import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
DATA = {"zen": "generate_zen_dataset", "toolcall": "generate_toolcall_dataset", "harmony": "generate_harmony_dataset"}


def fill(checkout: Path, hub: Path) -> None:
    """Makes models and data sets in `hub`."""
    for name, (model_class, config, tokenizer) in _models().items():
        _save(hub / name, model_class, config, tokenizer)
    for name, script in DATA.items():
        _generate(checkout / "scripts" / f"{script}.py", name, hub)


def _tokenizer(template: str | None, extra: tuple[str, ...] = (), *, eos: str = "<|im_end|>") -> Any:
    pad = "<|endoftext|>"
    tokens = list(dict.fromkeys((pad, "<|im_start|>", "<|im_end|>", *extra, eos)))
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(tuple(tokens))), bos_token=pad, eos_token=eos, pad_token=pad
    )
    tokenizer.chat_template = None if template is None else (TEMPLATES / template).read_text()
    return tokenizer


@cache
def _trained(special_tokens: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with contextlib.redirect_stdout(io.StringIO()):  # importing it prints
        import this
    zen = "".join(this.d.get(letter, letter) for letter in this.s)
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        zen.splitlines() * 2 + ["user assistant system tool What is better than"] * 2, trainer
    )
    return tokenizer.to_str()


def _shape(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        **more,
    }


def _models() -> dict[str, tuple[Any, Any, Any]]:
    """Class, config and tokenizer for every name on the hub."""
    qwen2, qwen3 = _tokenizer("qwen2_5.jinja"), _tokenizer("qwen3.jinja")
    channels = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
    oss = _tokenizer("gptoss.jinja", channels, eos="<|return|>")
    neox = _tokenizer(None, eos="<|endoftext|>")
    headers = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
    llama = _tokenizer("llama3_2.jinja", headers, eos="<|eot_id|>")
    experts = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    oss_experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    neox_shape = {key: _shape(neox)[key] for key in ("vocab_size", "hidden_size", "num_attention_heads")}
    neox_shape |= {"num_hidden_layers": 2, "intermediate_size": 32}
    q2, q3, l3 = _shape(qwen2), _shape(qwen3, head_dim=8), _shape(llama)
    return {
        "tiny-Qwen2ForCausalLM-2.5": (tf.Qwen2ForCausalLM, tf.Qwen2Config(**q2), qwen2),
        "tiny-Qwen3ForCausalLM": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**q3), qwen3),
        "small-Qwen3ForCausalLM": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**q3), qwen3),
        "tiny-Qwen3MoeForCausalLM": (tf.Qwen3MoeForCausalLM, tf.Qwen3MoeConfig(**q3 | experts), qwen3),
        "tiny-GptOssForCausalLM": (tf.GptOssForCausalLM, tf.GptOssConfig(**_shape(oss, **oss_experts)), oss),
        "tiny-GPTNeoXForCausalLM": (tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**neox_shape), neox),
        "tiny-LlamaForCausalLM-3.2": (tf.LlamaForCausalLM, tf.LlamaConfig(**l3), llama),
        "tiny-LlamaForCausalLM-3.1": (tf.LlamaForCausalLM, tf.LlamaConfig(**l3), llama),
        "tiny-MistralForCausalLM-0.2": (tf.MistralForCausalLM, tf.MistralConfig(**q2), qwen2),
        "tiny-CohereForCausalLM": (tf.CohereForCausalLM, tf.CohereConfig(**q2), qwen2),
        "tiny-Gemma2ForCausalLM": (tf.Gemma2ForCausalLM, tf.Gemma2Config(**q2, head_dim=8), qwen2),
        "tiny-Qwen2ForSequenceClassification-2.5": (
            tf.Qwen2ForSequenceClassification,
            tf.Qwen2Config(**q2, num_labels=1),
            qwen2,
        ),
        "tiny-Qwen3ForSequenceClassification": (
            tf.Qwen3ForSequenceClassification,
            tf.Qwen3Config(**q3, num_labels=1),
            qwen3,
        ),
        "tiny-LlamaForSequenceClassification-3.2": (
            tf.LlamaForSequenceClassification,
            tf.LlamaConfig(**l3, num_labels=1),
            llama,
        ),
        "tiny-Qwen3MoeForSequenceClassification": (
            tf.Qwen3MoeForSequenceClassification,
            tf.Qwen3MoeConfig(**q3 | experts, num_labels=1),
            qwen3,
        ),
    }


def _save(folder: Path, model_class: Any, config: Any, tokenizer: Any) -> None:
    torch.manual_seed(0)
    model = model_class(config).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 and parameter.float().var(correction=0) == 0:
                # If norms are all ones, what an update did to them does not show.
                parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.02)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _generate(script: Path, name: str, hub: Path) -> None:
    """Runs a script of TRL's that pushes data sets to the hub; they are kept in `hub/data` instead."""

    def keep(self: Any, repo_id: str, config_name: str = "default", **kwargs: Any) -> None:
        self.save_to_disk(str(hub / "data" / repo_id.split("/")[-1] / config_name))

    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    sys.modules[script.stem] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    theirs = datasets.DatasetDict.push_to_hub
    datasets.DatasetDict.push_to_hub = keep
    try:
        module.main(0.1, True, f"trl-internal-testing/{name}")
    finally:
        datasets.DatasetDict.push_to_hub = theirs


if __name__ == "__main__":
    fill(Path(sys.argv[1]), Path(sys.argv[2]))
