"""Tiny checkpoints and data files under the names that docs/trainer.md uses, so that its snippets run as printed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from datasets import Dataset
from PIL import Image

from tests.tiny import BOS, EOS, PAD, VOCABULARY, tiny_model, tiny_tokenizer

_BEGIN_IMAGE, _END_IMAGE, _IMAGE = "<start_of_image>", "<end_of_image>", "<image_soft_token>"
_TURNS = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(code: str, folder: Path) -> None:
    """Creates in `folder` those of `CHECKPOINTS` and `DATA` that a snippet names."""
    with torch.random.fork_rng(devices=[]):
        for name, write in {**CHECKPOINTS, **DATA}.items():
            if f'"{name}"' in code:
                torch.manual_seed(0)
                write(folder / name)


def _qwen3(folder: Path) -> None:
    import trl

    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer = tiny_tokenizer(template.read_text())
    tiny_model("qwen3", hidden=32, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _bert(folder: Path) -> None:
    tf.BertModel(tf.BertConfig(**_SHAPE, max_position_embeddings=128, pad_token_id=2)).save_pretrained(folder)
    _named_tokenizer(None).save_pretrained(folder)


def _named_tokenizer(template: str | None) -> Any:
    tokenizer: Any = tiny_tokenizer(template)
    tokenizer.model_max_length = 128
    return tokenizer


def _t5(folder: Path) -> None:
    shape = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = tf.T5Config(**shape, decoder_start_token_id=2, pad_token_id=2, eos_token_id=1)
    tf.T5ForConditionalGeneration(config).save_pretrained(folder)
    _named_tokenizer(None).save_pretrained(folder)


def _vit(folder: Path) -> None:
    shape = {key: value for key, value in _SHAPE.items() if key != "vocab_size"}
    tf.ViTForImageClassification(tf.ViTConfig(**shape, image_size=16, patch_size=8)).save_pretrained(folder)
    tf.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def _gemma3(folder: Path) -> None:
    marks = {"boi_token": _BEGIN_IMAGE, "eoi_token": _END_IMAGE, "image_token": _IMAGE}
    plain = tiny_tokenizer(_TURNS)
    tokenizer: Any = tf.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, extra_special_tokens=marks
    )
    tokenizer.chat_template = _TURNS
    text = {**_SHAPE, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 32}
    vision = {**_SHAPE, "image_size": 16, "patch_size": 4}
    del vision["vocab_size"]
    ids = tokenizer.convert_tokens_to_ids([_BEGIN_IMAGE, _END_IMAGE, _IMAGE, BOS, EOS, PAD])
    config = tf.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        **dict(zip(("boi_token_index", "eoi_token_index", "image_token_index"), ids[:3], strict=True)),
        **dict(zip(("bos_token_id", "eos_token_id", "pad_token_id"), ids[3:], strict=True)),
    )
    tf.Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    images = tf.Gemma3ImageProcessor(size={"height": 16, "width": 16})
    tf.Gemma3Processor(images, tokenizer, chat_template=_TURNS, image_seq_length=4).save_pretrained(folder)


def _whisper(folder: Path) -> None:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    width = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": VOCABULARY, "num_mel_bins": 16}
    tokens = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    config = tf.WhisperConfig(**layers, **width, **tokens, max_source_positions=50, suppress_tokens=None)
    tf.WhisperForConditionalGeneration(config).save_pretrained(folder)
    tf.WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(folder)
    _named_tokenizer(None).save_pretrained(folder)


def _lines(rows: list[dict[str, Any]]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


def _says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def _pictures(folder: Path) -> None:
    for name, shade in (("cat", 0), ("dog", 255)):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (16, 16), (shade, 10 * i, 255 - shade)).save(folder / name / f"{i}.png")


def _looks(path: Path) -> None:
    rows = []
    for name, shade in (("dark", 0), ("bright", 255)):
        picture = path.with_name(f"{name}.png")
        Image.new("RGB", (16, 16), (shade, shade, shade)).save(picture)
        rows.append(
            {"image": picture.name, "prompt": [_says("user", "Which?")], "completion": [_says("assistant", f"The {name} one.")]}
        )
    _lines(rows)(path)


def _speech(folder: Path) -> None:
    time = np.arange(8_000) / 16_000
    tones = [np.sin(2 * np.pi * pitch * time).astype(np.float32) for pitch in (220, 880)]
    Dataset.from_dict({"sound": tones, "text": ["low answer", "the high question"]}).save_to_disk(str(folder))


_WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}},
    },
}
_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}

CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "Qwen/Qwen3-0.6B": _qwen3,
    "google-bert/bert-base-uncased": _bert,
    "google-t5/t5-small": _t5,
    "google/vit-base-patch16-224": _vit,
    "google/gemma-3-4b-it": _gemma3,
    "openai/whisper-tiny": _whisper,
}
DATA: dict[str, Callable[[Path], None]] = {
    "chats.jsonl": _lines(
        [{"messages": [_says("user", f"{i} plus 1?"), _says("assistant", f"The answer is {i + 1}.")]} for i in range(4)]
    ),
    "tools.jsonl": _lines(
        [
            {
                "messages": [
                    _says("user", f"{question}"),
                    _says("assistant", "", tool_calls=[_CALL]),
                    _says("tool", "sun", name="weather"),
                    _says("assistant", "The sun shines."),
                ],
                "tools": [_WEATHER],
            }
            for question in ("Is it warm in Rome?", "The weather in Rome?")
        ]
    ),
    "preferences.jsonl": _lines(
        [{"prompt": f"What is {i}?", "chosen": " A number.", "rejected": " The lazy dog."} for i in range(4)]
    ),
    "liked.jsonl": _lines(
        [
            {"prompt": f"What is {i}?", "completion": " A number." if liked else " The lazy dog.", "label": liked}
            for i in range(2)
            for liked in (True, False)
        ]
    ),
    "reviews.jsonl": _lines([{"text": "a quick fox", "label": 1}, {"text": "the lazy dog sleeps", "label": 0}]),
    "entities.jsonl": _lines(
        [{"words": ["the", "quick", "fox"], "tags": [0, 1, 2]}, {"words": ["a", "dog", "sleeps"], "tags": [0, 2, 1]}]
    ),
    "summaries.jsonl": _lines(
        [
            {"text": "The quick brown fox jumps over the lazy dog.", "summary": "A fox jumps."},
            {"text": "Count the letters in the word banana.", "summary": "Counting."},
        ]
    ),
    "pairs.jsonl": _lines(
        [
            {"sentence1": "a quick fox", "sentence2": "the fast fox", "score": 1.0},
            {"sentence1": "a quick fox", "sentence2": "count the letters", "score": 0.0},
        ]
    ),
    "pictures": _pictures,
    "looks.jsonl": _looks,
    "speech": _speech,
}
