"""Models with random weights, `random:NAME`: to measure memory and speed of a shape without its checkpoint."""

from __future__ import annotations

import difflib
import zlib
from typing import TYPE_CHECKING, Any

from sbft.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

PREFIX = "random:"
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
_BYTES = 256
_STD = 0.02

_LLAMA: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 8192}
_LLAMA_3: dict[str, Any] = {**_LLAMA, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
_LONG_LLAMA_3: dict[str, Any] = {**_LLAMA_3, "max_position_embeddings": 131072}
_SMOLLM2: dict[str, Any] = {**_LLAMA, "vocab_size": 49152, "tie_word_embeddings": True}
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3", "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
_ROTARY_PAIRS_OF_PHI4 = 48


def _llama3_rope(factor: float) -> dict[str, Any]:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, **scaling}


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_LLAMA, "hidden_size": 160, "num_hidden_layers": 2, "intermediate_size": 320, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        **_LLAMA, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "llama-1b": {
        **_LLAMA_3, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA_3, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "tie_word_embeddings": False,
    },
    "llama-70b": {
        **_LLAMA_3, "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64,
        "tie_word_embeddings": False,
    },
    "qwen3-4b": {
        "model_type": "qwen3", "hidden_size": 2560, "num_hidden_layers": 36, "intermediate_size": 9728,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "tie_word_embeddings": True, "max_position_embeddings": 40960,
    },
    "gemma3-4b": {
        "model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "sliding_window": 1024,
        "tie_word_embeddings": True, "max_position_embeddings": 131072,
    },
    # Of the recipes in recipes/, each beside the checkpoint that it fine-tunes.
    "smollm2-360m": {
        **_SMOLLM2, "hidden_size": 960, "num_hidden_layers": 32, "intermediate_size": 2560, "num_attention_heads": 15,
        "num_key_value_heads": 5, "rope_parameters": _rope(1e5),
    },
    "smollm2-1.7b": {
        **_SMOLLM2, "hidden_size": 2048, "num_hidden_layers": 24, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 32, "rope_parameters": _rope(1.3e5),
    },
    "smollm3-3b": {
        "model_type": "smollm3", "hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256, "no_rope_layer_interval": 4,
        "tie_word_embeddings": True, "max_position_embeddings": 65536, "rope_parameters": _rope(5e6),
    },
    "llama3.2-1b": {
        **_LONG_LLAMA_3, "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
        "tie_word_embeddings": True, "rope_parameters": _llama3_rope(32.0),
    },
    "llama3.2-3b": {
        **_LONG_LLAMA_3, "hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192,
        "num_attention_heads": 24, "tie_word_embeddings": True, "rope_parameters": _llama3_rope(32.0),
    },
    "llama3.1-8b": {
        **_LONG_LLAMA_3, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "tie_word_embeddings": False, "rope_parameters": _llama3_rope(8.0),
    },
    "qwen3-0.6b": {
        **_QWEN3, "hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16,
        "tie_word_embeddings": True, "rope_parameters": _rope(1e6),
    },
    "qwen3-1.7b": {
        **_QWEN3, "hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "num_attention_heads": 16,
        "tie_word_embeddings": True, "rope_parameters": _rope(1e6),
    },
    "qwen3-8b": {
        **_QWEN3, "hidden_size": 4096, "num_hidden_layers": 36, "intermediate_size": 12288, "num_attention_heads": 32,
        "tie_word_embeddings": False, "rope_parameters": _rope(1e6),
    },
    "qwen3-32b": {
        **_QWEN3, "hidden_size": 5120, "num_hidden_layers": 64, "intermediate_size": 25600, "num_attention_heads": 64,
        "tie_word_embeddings": False, "rope_parameters": _rope(1e6),
    },
    "gemma3-1b": {
        "model_type": "gemma3_text", "hidden_size": 1152, "num_hidden_layers": 26, "intermediate_size": 6912,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144, "sliding_window": 512,
        "tie_word_embeddings": True, "max_position_embeddings": 32768,
    },
    # The checkpoint: the text model above and the tower that reads images, which is loaded though no text reaches it.
    "gemma3-4b-vision": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208,
            "sliding_window": 1024, "max_position_embeddings": 131072,
        },
        "vision_config": {
            "model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27, "intermediate_size": 4304,
            "num_attention_heads": 16, "image_size": 896, "patch_size": 14, "vision_use_head": False,
        },
        "mm_tokens_per_image": 256, "tie_word_embeddings": True,
    },
    "phi4-mini": {
        "model_type": "phi3", "hidden_size": 3072, "num_hidden_layers": 32, "intermediate_size": 8192,
        "num_attention_heads": 24, "num_key_value_heads": 8, "vocab_size": 200064, "sliding_window": 262144,
        "tie_word_embeddings": True, "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        # The published factors differ from 1, which changes values and no shape.
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "factor": 32.0,
            "short_factor": [1.0] * _ROTARY_PAIRS_OF_PHI4, "long_factor": [1.0] * _ROTARY_PAIRS_OF_PHI4,
        },
    },
    "mistral-7b": {
        "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32768, "sliding_window": None,
        "tie_word_embeddings": False, "max_position_embeddings": 32768, "rope_parameters": _rope(1e6),
    },
    # The paper's memory figure: 40 layers, width 5140, vocabulary 50257, 2048 tokens. GPT-3's 13B has 40 heads of 128,
    # which make 5120, not 5140, so the heads' size cannot be derived from the width; 257 (20 heads), what the width
    # would divide into, is odd and above the 256 that flash attention takes. With 40 heads of 128 there are 13.18e9
    # parameters, in bfloat16 the 26.4 GB that the paper's 27.58 GB for SGD leave beside its 1.21 GB of "other".
    # Starcoder2 is transformers' GPT with rotary positions (no table of them), LayerNorm and an MLP without a gate.
    "gpt3-13b": {
        "model_type": "starcoder2", "hidden_size": 5140, "num_hidden_layers": 40, "intermediate_size": 4 * 5140,
        "num_attention_heads": 40, "num_key_value_heads": 40, "head_dim": 128, "vocab_size": 50257, "use_bias": False,
        "tie_word_embeddings": False, "max_position_embeddings": 2048,
    },
}  # fmt: skip
"""Settings of each model's transformers config, as published. `gemma3-4b` is the text model of that checkpoint alone."""


def is_random(model: str) -> bool:
    """Whether a model is named `random:NAME`."""
    return model.startswith(PREFIX)


def random_config(model: str) -> PreTrainedConfig:
    """The transformers config of `random:NAME`; its special tokens are those of `byte_tokenizer`.

    Raises:
        ModelError: if there is no architecture of that name.
    """
    from transformers import AutoConfig

    name = model.removeprefix(PREFIX)
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=1)
        hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
        known = ", ".join(PREFIX + architecture for architecture in ARCHITECTURES)
        raise ModelError(f"There is no model with random weights called {name!r}; expected {known}.{hint}")
    tokens: dict[str, Any] = {"bos_token_id": _BYTES, "eos_token_id": _BYTES + 1, "pad_token_id": _BYTES + 2}
    # An adapter records its base by this name.
    return AutoConfig.for_model(**ARCHITECTURES[name], **tokens, name_or_path=PREFIX + name)


def random_model(
    model: str, *, dtype: torch.dtype, device: torch.device, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Make a model with random weights directly on its device, in one dtype.

    Matrices are normal with standard deviation 0.02, the norms' weights 1, biases 0. Each parameter has its own generator,
    seeded by its name, so that a kind of device always gets the same weights.

    Args:
        model: `random:NAME`.
        dtype: dtype of all weights.
        device: where the weights are made.
        attn_implementation: "sdpa", "eager", ...; transformers' choice when None.

    Returns:
        The model in evaluation mode.

    Raises:
        ModelError: if there is no architecture of that name.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = random_config(model)
    with torch.device(device), no_init_weights():
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    made.tie_weights()  # no_init_weights skips this too
    for name, parameter in made.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            torch.nn.init.normal_(parameter, std=_STD, generator=generator)
    return made.eval()


def training_device() -> torch.device:
    """The device that a `Trainer` in this process will train on."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return torch.device("cpu")
    # Several processes have each selected theirs by now.
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, and tokens for begin, end and padding. It needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
