"""Loads models whose weights bitsandbytes stores in 4 bits, and measures their memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sbft.errors import MissingPackageError, how_to_install

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig

Quantization = Literal["nf4"]

_NOTE = "base_quantization.json"
_EXTRA = "'sbft[bitsandbytes]'"


def quantization_config(kind: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How transformers loads every linear layer but the output head in 4 bits.

    Args:
        kind: "nf4": NormalFloat in blocks of 64, the blocks' scales quantized too (arXiv 2305.14314, section 3).
        dtype: dtype of the matrix products, and of all other weights.

    PEFT's `prepare_model_for_kbit_training` is not called. It freezes the base, which the adapter does anyway; turns on
    gradient checkpointing, which is a separate choice; and casts norms, embeddings and head to float32. QLoRA's own
    code casts embeddings and head back to bfloat16 and runs under autocast. Without autocast, norms in float32 would
    make every activation float32, at twice the memory; the frozen values would be the same.
    """
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def check_bitsandbytes(what: str, device: torch.device, *, optimizer: bool) -> None:
    """Check that bitsandbytes works here: its wheel may lack the library for this device.

    Args:
        what: what needs it, such as "Method qlora".
        device: where it must work.
        optimizer: whether the 8-bit optimizer is needed; else the 4-bit weights are.

    Raises:
        MissingPackageError: if it does not work.
    """

    try:
        if optimizer:
            _step_in_8_bits(device)
        else:
            _round_trip_in_4_bits(device)
    except ImportError as error:
        raise MissingPackageError(f"{what} requires the package bitsandbytes. " + how_to_install(_EXTRA)) from error
    except (RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MissingPackageError(
            f"{what} requires the package bitsandbytes, which does not work on this machine's {device.type} device: {reason} "
            "Install a version built for it, or choose another method."
        ) from error


def _round_trip_in_4_bits(device: torch.device) -> None:
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    values = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    dequantize_4bit(*quantize_4bit(values, quant_type="nf4"))


def _step_in_8_bits(device: torch.device) -> None:
    import torch
    from bitsandbytes.optim import AdamW8bit

    values = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device=device))  # smaller ones stay in 32 bits
    values.grad = torch.ones_like(values)
    AdamW8bit([values]).step()


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking the 4-bit weights of a model.

    On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks them for inference, for good, at the first forward in evaluation
    mode. After that a backward pass through them gives no gradient, and their scales have been rounded again.
    """
    for layer in _layers(model):
        layer.support_avx512bf16_for_cpu = False


def scales_bytes(model: nn.Module) -> int:
    """Bytes of the scales of 4-bit weights, which are neither parameters nor buffers."""
    states = [layer.weight.quant_state for layer in _layers(model)]
    tensors = [
        tensor
        for state in states
        for tensor in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    ]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def _layers(model: nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def write_note(folder: Path, kind: Quantization) -> None:
    """Note in an adapter's folder how its base was quantized, which PEFT's own config does not say."""
    (folder / _NOTE).write_text(json.dumps({"quantization": kind}) + "\n", encoding="utf-8")


def read_note(folder: Path) -> Quantization | None:
    """How an adapter's base was quantized in training; None if it was not."""
    note = folder / _NOTE
    if not note.is_file():
        return None
    kind: Quantization = json.loads(note.read_text(encoding="utf-8"))["quantization"]
    return kind
