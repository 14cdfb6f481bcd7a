"""Limits of a model's input: token ids within its embedding, and no more positions than it has.

Beyond these limits, a CPU raises an IndexError that names neither, and a GPU kills the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from sbft.errors import ModelError
from sbft.models.miniature import NoMiniature, miniatures

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_FEW = 16
# Rows of a position table that no token uses, such as those for padding in RoBERTa.
_MOST_RESERVED = 4


@dataclass(frozen=True)
class PositionLimit:
    """The longest text that a model was made for."""

    tokens: int
    hard: bool
    """Whether it fails on longer texts, as with a position table. With rotary positions, they are only unfamiliar to it."""


def stated_positions(config: PreTrainedConfig) -> int | None:
    """The longest text that a model was made for, as its config says; None if it does not say."""
    settings = config.get_text_config()
    stated = (vars(settings).get(type(settings).attribute_map.get(name, name)) for name in _POSITIONS)
    return next((length for length in stated if isinstance(length, int) and length > 0), None)


def embedding_rows(config: PreTrainedConfig) -> int | None:
    """The number of token ids that the embedding has rows for; None if the config does not say, or if the model also gets ids
    that are no tokens, such as placeholders for images.
    """
    text = config.get_text_config()
    rows = vars(text).get(type(text).attribute_map.get("vocab_size", "vocab_size"))
    return rows if text is config and isinstance(rows, int) else None


def refuse_what_does_not_fit(
    model: PreTrainedModel, texts: Iterable[Sequence[int]], what: str, *, more: int = 0
) -> None:
    """Refuse token ids that the embedding has no row for, and texts that are longer than the position table.

    Args:
        model: a loaded model.
        texts: their token ids.
        what: the name of a text in the error, such as "a prompt".
        more: how many tokens are generated after each text.

    Raises:
        ModelError: if a text exceeds a limit.
    """
    extremes = [(max(text), len(text)) for text in texts if len(text)]
    if extremes:
        largest_ids, lengths = zip(*extremes, strict=True)
        _refuse(model.config, max(largest_ids), max(lengths) + more, what)


def table_of_positions(model: PreTrainedModel, tokens: int) -> int | None:
    """The length of a model's position table, if it has one that is shorter than `tokens`; else None."""
    stated = stated_positions(model.config)
    if stated is None or tokens <= stated:
        return None
    limit = position_limit(model.config)
    return limit.tokens if limit is not None and limit.hard else None


class FittingBatches:
    """A collator that refuses batches which do not fit the model.

    Args:
        collate: as `DataLoader` takes it.
        config: the model's config.
    """

    def __init__(self, collate: Callable[[Any], Any], config: PreTrainedConfig) -> None:
        self._collate, self._config = collate, config
        self._rows, self._positions = embedding_rows(config), stated_positions(config)

    def __call__(self, examples: Any) -> Any:
        batch = self._collate(examples)
        ids = batch.get("input_ids") if isinstance(batch, dict) else None
        if not isinstance(ids, Tensor) or not ids.numel():
            return batch
        positions = batch.get("position_ids")
        longest = int(positions.max()) + 1 if isinstance(positions, Tensor) else ids.shape[-1]
        if self._positions is not None and longest > self._positions:
            _refuse(self._config, 0, longest, "a training example")
            self._positions = None  # the model takes longer ones: no need to try again for every batch
        if self._rows is not None:
            _refuse(self._config, int(ids.max()), 0, "a training example")
        return batch


def fitting_batches(collate: Callable[[Any], Any], model: Any) -> Callable[[Any], Any]:
    """The collator with a check of its batches, if the model has a config that says what fits."""
    config = getattr(model, "config", None)  # any nn.Module can be trained; an adapter has the config of its model
    return FittingBatches(collate, config) if isinstance(config, PreTrainedConfig) else collate


def _refuse(config: PreTrainedConfig, largest: int, longest: int, what: str) -> None:
    rows = embedding_rows(config)
    if rows is not None and largest >= rows:
        raise ModelError(
            f"The token {largest:,} is in {what}, and the model has rows for {rows:,}: the tokenizer belongs to another model, "
            "or tokens were added to it. Add rows with model.resize_token_embeddings(len(tokenizer)), and save both."
        )
    stated = stated_positions(config)
    if stated is None or longest <= stated:
        return
    limit = position_limit(config)
    if limit is not None and limit.hard and longest > limit.tokens:
        raise ModelError(
            f"There are {longest:,} tokens in {what}, and the model has a position table for {limit.tokens:,}. Cut it "
            f"(data.max_length={limit.tokens} in a recipe), or split it."
        )


def position_limit(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PositionLimit | None:
    """The longest text that models of this config take; None if it does not say.

    Whether the limit is hard is tried on a miniature of the model's class.
    """
    stated = stated_positions(config)
    if stated is None:
        return None
    try:
        for model in miniatures(config, trust_remote_code=trust_remote_code, **dict.fromkeys(_POSITIONS, _FEW)):
            if not _runs(model, 2):
                continue
            if _runs(model, _FEW + 1):
                return PositionLimit(stated, hard=False)
            taken = next((n for n in range(_FEW, _FEW - _MOST_RESERVED - 1, -1) if _runs(model, n)), None)
            if taken is not None:
                return PositionLimit(stated - (_FEW - taken), hard=True)
    except NoMiniature:
        pass
    return PositionLimit(stated, hard=False)


@torch.no_grad()
def _runs(model: PreTrainedModel, tokens: int) -> bool:
    try:
        model(input_ids=torch.full((1, tokens), 5), use_cache=False)
    except Exception:  # from the model's own code
        return False
    return True
