"""Writes a tokenizer for llama.cpp: its tokens with their types, its merges, and its pre-tokenization."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from sbft.errors import ExportError

if TYPE_CHECKING:
    from gguf import GGUFWriter

_SPACE = "▁"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe", rf"{_LETTERS}|\p{{N}}|{_REST}": "qwen2"}
"""llama.cpp's name for each regular expression that splits text before merging."""
_IGNORES_MERGES = {"llama-bpe": True, "qwen2": False, "smollm": False, "gpt-2": False}
"""Whether a piece that is a token as a whole is taken without its merges; llama.cpp knows it by the name."""
_NO_MERGE_MAKES_IT = -1e9


def write_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, rows: int
) -> None:
    """Write a tokenizer with its chat template.

    Args:
        writer: of the file.
        tokenizer: a fast one, with byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) or BPE with byte fallback (Llama 2, Gemma).
        generation: has the tokens that end an answer, in addition to the tokenizer's own.
        rows: rows of the embedding; those without a token are marked as unused.

    Raises:
        ExportError: if llama.cpp cannot tokenize as it does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("it is none of the package tokenizers")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE":
        raise _unknown(f"it is a {model['type']} model")
    tokens, types = _tokens(tokenizer, model, rows)
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, model))
        writer.add_add_space_prefix(_adds_space(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(state))
        writer.add_token_merges([" ".join(_pair(merge)) for merge in model["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _write_special_tokens(writer, tokenizer, generation)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(_templates(tokenizer.chat_template))


def _unknown(why: str) -> ExportError:
    return ExportError(
        f"llama.cpp cannot tokenize as this model's tokenizer does, as far as sbft knows: {why}. Export the model as "
        "safetensors (leave --format out), and convert that with llama.cpp's convert_hf_to_gguf.py."
    )


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _tokens(tokenizer: PreTrainedTokenizerBase, model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Text and type of each token, one for each row of the embedding."""
    from gguf import TokenType

    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise ExportError(
            f"The tokenizer has {max(by_id) + 1:,} tokens and the model {rows:,} rows for them. Resize the model's embeddings "
            "(model.resize_token_embeddings) before you export it."
        )
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(rows):
        token = by_id.get(number)
        kind = TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
            token = token if added[number].special else token.replace(_SPACE, " ")
        elif token == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        elif model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = TokenType.BYTE
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], model: dict[str, Any]) -> list[float]:
    """Scores that make llama.cpp, which merges the best-scored pair first, apply the merges in their order."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(_pair(merge)), rank)
    return [float(-ranks[token]) if token in ranks else _NO_MERGE_MAKES_IT for token in tokens]


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    normalizer, cut = json.dumps(state.get("normalizer")), json.dumps(state.get("pre_tokenizer"))
    return '"Prepend"' in normalizer or '"prepend_scheme": "first"' in cut or '"prepend_scheme": "always"' in cut


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """llama.cpp's name for the way text is split before merging."""
    cut = state.get("pre_tokenizer") or {}
    steps = cut["pretokenizers"] if cut.get("type") == "Sequence" else [cut]
    kinds = [step.get("type") for step in steps]
    name = None
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1]["add_prefix_space"]:
        if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
            name = "gpt-2"
        elif kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
            name = "smollm"
        elif kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and steps[0]["behavior"] == "Isolated":
            name = _PATTERNS.get(steps[0]["pattern"].get("Regex"))
    if name is None:
        raise _unknown(f"text is cut by {json.dumps(cut, ensure_ascii=False)[:300]}")
    if bool(state["model"].get("ignore_merges")) != _IGNORES_MERGES[name]:
        raise _unknown(f"it is {name} with ignore_merges {state['model'].get('ignore_merges')}")
    return name


def _write_special_tokens(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None
) -> None:
    ends = [] if generation is None else generation.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    if end is not None:
        writer.add_eos_token_id(end)
    if other := [token for token in ends if token != end]:
        writer.add_eot_token_id(other[0])
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.unk_token_id is not None:
        writer.add_unk_token_id(tokenizer.unk_token_id)
    ids, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    before, after = ids[: len(ids) - len(bare)], []
    if ids[: len(bare)] == bare:
        before, after = [], ids[len(bare) :]
    writer.add_add_bos_token(before == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None)
    writer.add_add_eos_token(bool(after) and after == [end])


def _templates(template: str | dict[str, str]) -> Any:
    if isinstance(template, str):
        return template
    return [{"name": name, "template": text} for name, text in template.items()]
