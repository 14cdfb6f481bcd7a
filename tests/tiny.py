"""Tiny models and a tokenizer, made when needed: every test can have a real architecture without a download."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

KINDS = ("llama", "qwen3", "gemma3", "gpt2")
VOCABULARY = 512
BOS, EOS, PAD, TURN = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same rendering, from a template that does not mark which part the assistant wrote.
CHATML_WITHOUT_MARKERS = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")

_LINES = [
    "What is the sum of 12 and 30? The answer is 42.",
    "user assistant system question answer prompt completion",
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Count the letters in the word banana: 0 1 2 3 4 5 6 7 8 9",
]


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_LINES * 4, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most 512 tokens; bos, eos and pad are three different tokens."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained()), bos_token=BOS, eos_token=EOS, pad_token=PAD
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(
    kind: str = "llama",
    *,
    tied: bool | None = None,
    vocab: int = VOCABULARY,
    hidden: int = 64,
    layers: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    **config: Any,
) -> PreTrainedModel:
    """A two-layer causal model of a real architecture, its weights drawn from `seed`.

    Args:
        kind: one of `KINDS`.
        tied: whether input and output embeddings are one tensor; the architecture's own default when None.
        vocab: number of tokens.
        hidden: hidden size; 4 heads of hidden / 4 dimensions, 2 key-value heads.
        layers: number of layers.
        dtype: dtype of all weights.
        seed: seed of the initial weights; the global generator is left as it was.
        **config: further settings of the architecture's config.
    """
    tokens: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if tied is not None:
        tokens["tie_word_embeddings"] = tied
    shape: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        **tokens,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
        elif kind == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**{**shape, "head_dim": hidden // 4, **config}))
        elif kind == "gemma3":
            gemma = {"head_dim": hidden // 4, "sliding_window": 32, "final_logit_softcapping": 30.0}
            model = Gemma3ForCausalLM(Gemma3TextConfig(**{**shape, **gemma, **config}))
        elif kind == "gpt2":
            gpt2: dict[str, Any] = {
                "vocab_size": vocab,
                "n_embd": hidden,
                "n_layer": layers,
                "n_head": 4,
                "n_positions": 512,
            }
            model = GPT2LMHeadModel(GPT2Config(**{**gpt2, **tokens, **config}))
        else:
            raise ValueError(f"kind is {kind!r}; expected one of {KINDS}")
    model = model.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def save_tiny(folder: str | Path, kind: str = "llama", *, chat_template: str | None = CHATML, **model: Any) -> Path:
    """Writes a tiny model and its tokenizer as a plain Hugging Face checkpoint; returns the folder."""
    folder = Path(folder)
    tiny_model(kind, **model).save_pretrained(folder)
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return folder
