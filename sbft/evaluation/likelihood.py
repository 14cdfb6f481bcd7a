"""How likely a model finds given words: the loss of right answers, and each of several labels as the answer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sbft.data.collate import IGNORED_LABEL, Collator
from sbft.data.format import encode_answers
from sbft.data.rendering import Rendering
from sbft.errors import DataError
from sbft.models.limits import refuse_what_does_not_fit
from sbft.native.openmp import spinning_while_alone

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGITS_BYTES = 128 * 2**20
"""Float32 logits that may exist at once. Long texts and large vocabularies are done in parts that fit."""

_CANDIDATES_AT_ONCE = 4_096
"""Prompts with a label that are tokenized before they are measured; like lengths among them go together."""


def evaluate_loss(
    model: PreTrainedModel, dataset: Dataset | Iterable[dict[str, Any]], collator: Collator, *, batch_size: int = 8
) -> dict[str, float]:
    """Measures the mean cross entropy over all tokens with a label.

    Logits are computed where a label is predicted and nowhere else, and summed up in float32.

    Args:
        model: a causal language model.
        dataset: rows as `format_dataset` gives them, packed or not.
        collator: makes the batches.
        batch_size: rows at once, fewer where their logits would be large.

    Returns:
        "loss" in nats per token, and "perplexity", its exponential.

    Raises:
        DataError: no token has a label.
    """
    rows = list(dataset)
    count = sum(len(_predicting(row["labels"])) for row in rows)
    if count == 0:
        raise DataError("The evaluation data has no token with a label, so that there is no loss to measure.")
    loss = math.fsum(_summed_losses(model, rows, collator, batch_size)) / count
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def label_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset | Iterable[dict[str, Any]],
    labels: list[str],
    rendering: Rendering | None = None,
    *,
    max_length: int = 1024,
    batch_size: int = 16,
) -> torch.Tensor:
    """Measures how likely the model finds each label as the answer to each prompt.

    A label's score is the sum of the log-probabilities of the tokens that training on it would learn, the token that
    ends the turn or the text among them. That token keeps the comparison fair where one label begins another ("no" and
    "not sure"): without it the longer one could never be likelier than the shorter.

    Every label is put after the whole prompt, so that a prompt costs as many forward passes as there are labels.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a pad token.
        rows: rows with a prompt, or with messages, whose last answer the labels take the place of.
        labels: the answers to compare; each exactly as an answer stands in the data, white space and all.
        rendering: how rows become text; `Rendering()` if None.
        max_length: tokens of the longest prompt with a label. Nothing is cut: a label without its end could not be
            compared.
        batch_size: prompts with a label at once, fewer where their logits would be large.

    Returns:
        Scores of shape (rows, labels), float64 on the CPU, in nats.

    Raises:
        DataError: a label that is empty, or that the chat template renders like another one; rows that are plain text;
            or a prompt that with one of the labels is longer than `max_length`.
    """
    listed = list(rows)
    rendering = (rendering or Rendering()).thinking([listed], tokenizer)  # one way for all rows
    collator = Collator(pad_token(tokenizer))
    at_once = max(1, _CANDIDATES_AT_ONCE // len(labels))
    scores: list[float] = []
    for start in range(0, len(listed), at_once):
        candidates = encode_answers(listed[start : start + at_once], tokenizer, labels, rendering)
        _check_candidates(candidates, labels, max_length, start)
        scores += [-loss for loss in _summed_losses(model, candidates, collator, batch_size)]
    return torch.tensor(scores, dtype=torch.float64).view(len(listed), len(labels))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode afterwards."""
    was_training = model.training
    model.eval()
    # generate() passes the head the last position of every prompt, strided; matmul would then copy the head's weight
    # once for each of them: 2.8 GB for 50 prompts to a model of 135 million weights.
    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(_contiguous_input)
    try:
        # Not inference tensors: those that a model keeps for itself could not be trained with later.
        with torch.no_grad(), spinning_while_alone(model.device):
            yield
    finally:
        if hook is not None:
            hook.remove()
        model.train(was_training)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token.

    Raises:
        DataError: it has none.
    """
    if tokenizer.pad_token_id is None:
        raise DataError("The tokenizer has no pad token; load it with sbft.models.load.load_tokenizer, which sees to one.")
    return int(tokenizer.pad_token_id)


def _check_candidates(candidates: list[dict[str, list[int]]], labels: list[str], max_length: int, before: int) -> None:
    """Refuses what cannot be compared; `before` rows came before those of `candidates`."""
    seen: dict[tuple[int, ...], str] = {}
    for label, candidate in zip(labels, candidates[: len(labels)], strict=True):
        ids = tuple(candidate["input_ids"])
        if ids in seen:
            raise DataError(
                f"The labels {seen[ids]!r} and {label!r} are the same tokens once they are rendered, so that the model "
                "cannot tell them apart. Leave one of them out of evaluation.labels."
            )
        seen[ids] = label
    too_long = [index for index, candidate in enumerate(candidates) if len(candidate["input_ids"]) > max_length]
    if too_long:
        row, place = divmod(too_long[0], len(labels))
        raise DataError(
            f"Row {before + row + 1} of the evaluation data with the label {labels[place]!r} has "
            f"{len(candidates[too_long[0]]['input_ids'])} tokens, and data.max_length is {max_length}: cut off, the "
            "label could not be compared. Raise data.max_length, or take the long rows out of the evaluation data."
        )


def _summed_losses(
    model: PreTrainedModel, rows: list[dict[str, Any]], collator: Collator, batch_size: int
) -> list[float]:
    """The cross entropy of each row, summed over its labels."""
    losses = [0.0] * len(rows)
    limit = max(1, _LOGITS_BYTES // (4 * _vocabulary(model)))
    if "position_ids" not in (rows[0] if rows else {}):  # of packed rows, which are longer than their documents
        refuse_what_does_not_fit(model, (row["input_ids"] for row in rows), "an example")
    with evaluating(model):
        for chosen in _batches(rows, batch_size, limit):
            batch = [rows[index] for index in chosen]
            lone = batch[0]
            if len(batch) == 1 and len(lone["input_ids"]) > limit and len(_predicting(lone["labels"])) > limit:
                losses[chosen[0]] = sum(_loss_in_chunks(model, document, limit) for document in _documents(lone))
                continue
            for index, loss in zip(chosen, _losses_of_batch(model, collator(batch)), strict=True):
                losses[index] = loss
    return losses


def _batches(rows: list[dict[str, Any]], batch_size: int, limit: int) -> Iterator[list[int]]:
    """Rows of like length together, as many as `batch_size` and `limit` positions with logits allow."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]), reverse=True)
    batch: list[int] = []
    positions: set[int] = set()
    for index in order:
        own = set(_predicting(rows[index]["labels"]))
        union = positions | own
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(union) > limit):
            yield batch
            batch, union = [], own
        batch.append(index)
        positions = union
    if batch:
        yield batch


def _losses_of_batch(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[float]:
    """The cross entropy over the labels of each row of a batch."""
    targets = batch.pop("labels")[:, 1:]
    kept = (targets != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
    if kept.numel() == 0:
        return [0.0] * len(targets)
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits = _logits(model, kept.to(model.device), use_cache=False, **inputs)[0]
    return _losses(logits, targets[:, kept].to(model.device))


def _loss_in_chunks(model: PreTrainedModel, row: dict[str, list[int]], limit: int) -> float:
    """The same for one long row: a stretch of tokens after the other, the earlier ones' keys and values cached."""
    ids = torch.tensor([row["input_ids"]], device=model.device)
    targets = torch.tensor([[*row["labels"][1:], IGNORED_LABEL]], device=model.device)
    total, cache = 0.0, None
    for start in range(0, ids.shape[1], limit):
        end = min(start + limit, ids.shape[1])
        kept = (targets[0, start:end] != IGNORED_LABEL).nonzero().squeeze(1)
        kept = kept if kept.numel() else kept.new_zeros(1)
        logits, cache = _logits(
            model,
            kept,
            input_ids=ids[:, start:end],
            attention_mask=torch.ones_like(ids[:, :end]),
            past_key_values=cache,
            use_cache=True,
        )
        total += sum(_losses(logits, targets[:, start:end][:, kept]))
    return total


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """The cross entropy of each row, summed over its targets in float32."""
    flat = logits.float().flatten(0, 1)
    losses = F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    summed: list[float] = losses.view(targets.shape).sum(dim=1).tolist()
    return summed


def _predicting(labels: list[int]) -> list[int]:
    """Positions whose next token has a label."""
    return [index for index, label in enumerate(labels[1:]) if label != IGNORED_LABEL]


def _documents(row: dict[str, list[int]]) -> list[dict[str, list[int]]]:
    """The documents of a packed row; the row itself where it is not packed."""
    positions = row.get("position_ids", [0])
    starts = [index for index, position in enumerate(positions) if position == 0]
    ends = [*starts[1:], len(row["input_ids"])]
    return [{name: row[name][a:b] for name in ("input_ids", "labels")} for a, b in zip(starts, ends, strict=True)]


def _logits(model: PreTrainedModel, kept: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, Any]:
    """Logits at the positions `kept`, and the cache."""
    if _can_choose_logits(model):
        output = model(**inputs, logits_to_keep=kept)
        return output.logits, output.past_key_values
    output = model(**inputs)
    return output.logits[:, kept], output.get("past_key_values")


def _can_choose_logits(model: PreTrainedModel) -> bool:
    plain = _without_adapter(model)
    return "logits_to_keep" in inspect.signature(type(plain).forward).parameters


def _without_adapter(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, whose own signature says nothing."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _vocabulary(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _contiguous_input(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)
