"""How likely a model finds a text: the loss of the right answers, and the likelihood of each label as the answer."""

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
"""Float32 logits that may exist at a time. Long texts and large vocabularies are processed in parts that fit."""

_CANDIDATES_AT_A_TIME = 4_096
"""Prompts with a label that are tokenized in one go; among them, similar lengths share a batch."""


def evaluate_loss(
    model: PreTrainedModel, dataset: Dataset | Iterable[dict[str, Any]], collator: Collator, *, batch_size: int = 8
) -> dict[str, float]:
    """Measure the mean cross entropy over all tokens with a label.

    Logits are computed only where a label is predicted. The loss is summed in float32.

    Args:
        model: a causal language model.
        dataset: rows as `format_dataset` returns them, packed or not.
        collator: makes the batches.
        batch_size: rows per batch; fewer if their logits would be large.

    Returns:
        "loss" in nats per token, and "perplexity", its exponential.

    Raises:
        DataError: if no token has a label.
    """
    rows = list(dataset)
    count = sum(len(_predicting(row["labels"])) for row in rows)
    if count == 0:
        raise DataError("The evaluation data has no token with a label, so there is no loss to measure.")
    loss = math.fsum(_summed_losses(model, rows, collator, batch_size)) / count
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def bits_per_byte(loss: float, rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> float:
    """The bits that a model needs for each UTF-8 byte of some texts. It compares models with different tokenizers.

    Args:
        loss: in nats per token with a label, as `evaluate_loss` returns it.
        rows: what it was measured on. Each is one text, of which the tokens from the second on have labels, and are
            counted. Special tokens are no bytes. A text that is cut within a character counts up to 2 bytes more.
        tokenizer: the model's tokenizer. Of one that changes texts, such as by lower case, the changed texts are counted.

    Raises:
        DataError: if the tokens with labels have no text.
    """
    predicted = size = 0
    for row in rows:
        ids, count = row["input_ids"], len(_predicting(row["labels"]))
        predicted += count
        # Decoded from the beginning: the first token may be a part of a character, or lose a space.
        size += _size_of_text(ids, tokenizer) - _size_of_text(ids[: len(ids) - count], tokenizer)
    if size <= 0:
        raise DataError("The tokens of the evaluation data have no text, so there are no bits per byte of it.")
    return loss * predicted / math.log(2) / size


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
    """Measure how likely the model finds each label as the answer to each prompt.

    A label's score is the sum of the log-probabilities of the tokens that training on it would learn. They include the
    token that ends the turn or the text. It keeps the comparison fair if one label begins another ("no" and "not sure"):
    without it, the longer one could never be likelier.

    A prompt costs as many forward passes as there are labels.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a pad token.
        rows: rows with a prompt, or with messages, whose last answer is replaced by the labels.
        labels: the answers to compare, each exactly as in the data, including white space.
        rendering: how rows become text; `Rendering()` if None.
        max_length: tokens of the longest prompt with a label. Longer ones are refused: a label that is cut off could not be
            compared.
        batch_size: prompts with a label per batch; fewer if their logits would be large.

    Returns:
        Scores of shape (rows, labels), float64 on the CPU, in nats.

    Raises:
        DataError: if a label is empty, or the chat template renders two labels alike; if the rows are plain text; or if a
            prompt with a label is longer than `max_length`.
    """
    listed = list(rows)
    rendering = (rendering or Rendering()).thinking([listed], tokenizer)  # the same for all rows
    collator = Collator(pad_token(tokenizer))
    rows_at_a_time = max(1, _CANDIDATES_AT_A_TIME // len(labels))
    scores: list[float] = []
    for start in range(0, len(listed), rows_at_a_time):
        candidates = encode_answers(listed[start : start + rows_at_a_time], tokenizer, labels, rendering)
        _check_candidates(candidates, labels, max_length, start)
        scores += [-loss for loss in _summed_losses(model, candidates, collator, batch_size)]
    return torch.tensor(scores, dtype=torch.float64).view(len(listed), len(labels))


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in its former mode."""
    was_training = model.training
    model.eval()
    # generate() passes the head a strided view of each prompt's last position. For each of them, matmul would copy the
    # head's weight: 2.8 GB for 50 prompts to a model of 135 million weights.
    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(_contiguous_input)
    try:
        # Not inference_mode: tensors that a model keeps could not be used in training later.
        with torch.no_grad(), spinning_while_alone(model.device):
            yield
    finally:
        if hook is not None:
            hook.remove()
        model.train(was_training)


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's pad token.

    Raises:
        DataError: if it has none.
    """
    if tokenizer.pad_token_id is None:
        raise DataError("The tokenizer has no pad token. Load it with sbft.models.load_tokenizer, which sets one.")
    return int(tokenizer.pad_token_id)


def _size_of_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the text of some tokens."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(str(text).encode())


def _check_candidates(candidates: list[dict[str, list[int]]], labels: list[str], max_length: int, before: int) -> None:
    """Refuse what cannot be compared; `before` is the number of rows before those of `candidates`."""
    seen: dict[tuple[int, ...], str] = {}
    for label, candidate in zip(labels, candidates[: len(labels)], strict=True):
        ids = tuple(candidate["input_ids"])
        if ids in seen:
            raise DataError(
                f"The labels {seen[ids]!r} and {label!r} are the same tokens once they are rendered, so the model "
                "cannot tell them apart. Remove one of them from evaluation.labels."
            )
        seen[ids] = label
    too_long = [index for index, candidate in enumerate(candidates) if len(candidate["input_ids"]) > max_length]
    if too_long:
        row, place = divmod(too_long[0], len(labels))
        raise DataError(
            f"Row {before + row + 1} of the evaluation data with the label {labels[place]!r} has "
            f"{len(candidates[too_long[0]]['input_ids'])} tokens, and data.max_length is {max_length}: a label that "
            "is cut off cannot be compared. Raise data.max_length, or remove the long rows from the evaluation data."
        )


def _summed_losses(
    model: PreTrainedModel, rows: list[dict[str, Any]], collator: Collator, batch_size: int
) -> list[float]:
    """The cross entropy of each row, summed over its labels."""
    losses = [0.0] * len(rows)
    limit = max(1, _LOGITS_BYTES // (4 * _vocabulary(model)))
    if "position_ids" not in (rows[0] if rows else {}):  # packed rows are longer than their documents
        refuse_what_does_not_fit(model, (row["input_ids"] for row in rows), "an example")
    with evaluating(model):
        for indices in _batches(rows, batch_size, limit):
            batch = [rows[index] for index in indices]
            first = batch[0]
            if len(batch) == 1 and len(first["input_ids"]) > limit and len(_predicting(first["labels"])) > limit:
                losses[indices[0]] = sum(_loss_in_chunks(model, document, limit) for document in _documents(first))
                continue
            for index, loss in zip(indices, _losses_of_batch(model, collator(batch)), strict=True):
                losses[index] = loss
    return losses


def _batches(rows: list[dict[str, Any]], batch_size: int, limit: int) -> Iterator[list[int]]:
    """Indices of rows in batches of similar length, of at most `batch_size` rows and `limit` positions with logits."""
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
    """The same for one long row, in chunks of tokens; keys and values of the earlier chunks are cached."""
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
    """The documents of a packed row; the row itself if it is not packed."""
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
    """The transformers model inside a PEFT wrapper, whose own signature hides the model's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _vocabulary(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _contiguous_input(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)
