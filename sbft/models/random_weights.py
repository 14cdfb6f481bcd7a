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
"""Settings of each model's transformers config. SmolLM2, Llama 3, Qwen3 and Gemma 3 (text) are as published."""


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
        raise ModelError(f"There is no model with random weights called {name!r}; there is: {known}.{hint}")
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
