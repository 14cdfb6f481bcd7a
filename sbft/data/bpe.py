"""A byte-level BPE tokenizer, trained on the spot: pretraining needs no hub."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sbft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "bpe:"
END = "<|endoftext|>"
_SMALLEST, _LARGEST = 257, 2**20
"""The 256 bytes and the end token; and more tokens than any training text can use."""


def vocabulary_of(name: str) -> int | None:
    """The size in a name `bpe:SIZE`; None for any other name.

    Raises:
        DataError: if SIZE is not a number within the limits.
    """
    if not name.startswith(PREFIX):
        return None
    size = name.removeprefix(PREFIX)
    if not (size.isascii() and size.isdecimal() and _SMALLEST <= int(size) <= _LARGEST):
        raise DataError(
            f"tokenizer is {name}, expected a size from {_SMALLEST:,} (the bytes and the end token) to {_LARGEST:,}, such as "
            f"{PREFIX}2048."
        )
    return int(size)


def train_bpe(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer: its tokens are the bytes, an end token, and the most frequent merges in `texts`.

    Args:
        texts: training texts.
        vocabulary: largest number of tokens; short texts give fewer.

    Returns:
        The tokenizer; it is the same for the same texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )
