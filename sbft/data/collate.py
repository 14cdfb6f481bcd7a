"""Makes batches of examples: padded on the right for training and loss, on the left for generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

IGNORED_LABEL = -100
"""The label of a token that is not trained on; cross entropy leaves it out. transformers and TRL use the same number."""


@dataclass(frozen=True)
class Collator:
    """Pads examples on the right to the longest of their batch, rounded up to a multiple.

    Few distinct lengths matter on a CPU: oneDNN compiles its matrix products for each of them. With SmolLM2-135M, those of
    one length take about 10 MB while they are kept. oneDNN's tiles hold 16 rows, so the padding costs little time.

    Packed examples (those with `position_ids`) get no attention mask. transformers then derives from the positions, which
    restart at 0 with each document, a mask that keeps documents apart. Their padding has position 0 throughout, so each
    padding token counts as a document of its own.
    """

    pad_token_id: int
    pad_to_multiple_of: int = 16
    """Does not apply to packed examples, which keep their length."""

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes a batch.

        Args:
            examples: each with `input_ids` and `labels`, lists of one length, and `position_ids` when packed.

        Returns:
            int64 tensors of shape (batch, length): `input_ids`, `labels` (-100 on padding), and `attention_mask`
            (1 on tokens, 0 on padding), or `position_ids` when packed.
        """
        ids = [example["input_ids"] for example in examples]
        packed = "position_ids" in examples[0]
        multiple = 1 if packed else self.pad_to_multiple_of
        length = -(-max(map(len, ids)) // multiple) * multiple
        batch = {
            "input_ids": _right_pad(ids, length, self.pad_token_id),
            "labels": _right_pad([example["labels"] for example in examples], length, IGNORED_LABEL),
        }
        if packed:
            batch["position_ids"] = _right_pad([example["position_ids"] for example in examples], length, 0)
        else:
            batch["attention_mask"] = _right_pad([[1] * len(sequence) for sequence in ids], length, 0)
        return batch


def left_pad(sequences: Sequence[Sequence[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads prompts on the left, so that all end where generation begins.

    Args:
        sequences: token ids.
        pad_token_id: the token to pad with.

    Returns:
        `input_ids` and `attention_mask`, int64 tensors of shape (prompts, longest).
    """
    longest = max(map(len, sequences))
    padding = [longest - len(sequence) for sequence in sequences]
    return {
        "input_ids": torch.tensor(
            [[pad_token_id] * n + list(sequence) for n, sequence in zip(padding, sequences, strict=True)]
        ),
        "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
    }


def _right_pad(sequences: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    padded = [[*sequence, *[value] * (length - len(sequence))] for sequence in sequences]
    return torch.tensor(padded, dtype=torch.int64)
