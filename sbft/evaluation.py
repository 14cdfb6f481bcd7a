"""What a model is worth: loss and perplexity of right answers, and its own answers scored by metrics."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sbft import metrics as metric_modules
from sbft.data.collate import IGNORED_LABEL, Collator, left_pad
from sbft.data.format import Rendering, encode_prompts, format_dataset, stop_tokens
from sbft.errors import DataError
from sbft.metrics.exact_match.exact_match import is_match

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGITS_BYTES = 128 * 2**20
"""Float32 logits that may exist at once. Long texts and large vocabularies are done in parts that fit."""


def evaluate_loss(
    model: PreTrainedModel, dataset: Dataset, collator: Collator, *, batch_size: int = 8
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
    total, count = 0.0, 0
    with _evaluating(model):
        limit = max(1, _LOGITS_BYTES // (4 * _vocabulary(model)))
        for batch in _batches(dataset, batch_size, limit):
            lone = batch[0]
            if len(batch) == 1 and len(lone["input_ids"]) > limit and len(_predicting(lone["labels"])) > limit:
                losses = [_loss_in_chunks(model, document, limit) for document in _documents(lone)]
            else:
                losses = [_loss_of_batch(model, collator(batch))]
            total += sum(losses)
            count += sum(len(_predicting(row["labels"])) for row in batch)
    if count == 0:
        raise DataError("The evaluation data has no token with a label, so that there is no loss to measure.")
    loss = total / count
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """Lets the model answer, always with the likeliest token.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a pad token.
        prompts: token ids, as `encode_prompts` gives them.
        max_new_tokens: tokens of the longest answer; shorter ones end with the end token or the end of the turn.
        batch_size: prompts at once; prompts of like length go together.

    Returns:
        The answers as text without special tokens, in the order of the prompts.

    Raises:
        DataError: a prompt without any token.
    """
    from transformers import GenerationConfig

    if not all(prompts):
        raise DataError(f"Prompt {prompts.index([]) + 1} is empty, so that there is nothing to answer.")
    # Set outright, as generate() takes what is left open from the checkpoint, where it suits sampling.
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        use_cache=True,
        eos_token_id=_end_tokens(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    with _evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = left_pad([prompts[index] for index in chosen], _pad_token(tokenizer))
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            generator: Any = model
            written = generator.generate(**on_device, generation_config=settings)[:, batch["input_ids"].shape[1] :]
            for index, text in zip(chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                answers[index] = text
    return answers


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    metrics: list[str],
    prompt: str = "prompt",
    completion: str = "completion",
    messages: str = "messages",
    text: str = "text",
    chat_template: bool = True,
    system: str | None = None,
    max_length: int = 1024,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    limit: int | None = None,
    metric_options: dict[str, dict[str, Any]] | None = None,
    predictions_path: str | Path | None = None,
) -> dict[str, float]:
    """Measures a model on rows of text.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        rows: rows as `sbft.data.sources` loads them.
        metrics: names of metrics that ship in `sbft.metrics`; they score generated answers.
        prompt, completion, messages, text, chat_template, system, max_length: as for `format_dataset`.
        max_new_tokens: tokens of the longest answer.
        batch_size: rows at once.
        limit: only the first so many rows.
        metric_options: options of a metric by its name.
        predictions_path: where to write the answers, one JSON object a line: prompt, reference, prediction,
            exact_match. Nothing is written where nothing is generated.

    Returns:
        "loss", "perplexity", and each metric by its name.

    Raises:
        DataError: as `format_dataset`; an unknown metric; or metrics for plain text, which has no right answer.
    """
    scores = [name for name in metrics if name not in ("loss", "perplexity")]
    metric_modules.check(scores)
    rendering = Rendering(prompt, completion, messages, text, chat_template, system)
    kind = rendering.kind(rows.column_names)
    if scores and kind == "text":
        raise DataError(
            f"The evaluation data is plain text, which has no right answers for {', '.join(scores)} to count. "
            "Set evaluation.metrics: [] to measure the loss alone, or give data with prompts and completions."
        )
    if limit is not None:
        rows = rows.select(range(min(limit, rows.num_rows)))
    columns: dict[str, Any] = {**rendering.__dict__}
    formatted, _ = format_dataset(rows, tokenizer, max_length=max_length, **columns)
    result = evaluate_loss(model, formatted, Collator(_pad_token(tokenizer)), batch_size=batch_size)
    if not scores:
        return result

    asked = [rendering.question_and_answer(row, kind) for row in rows]
    encoded = encode_prompts(rows, tokenizer, **columns)
    answers = generate_answers(model, tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=batch_size)
    references = [reference for _, reference in asked]
    options = metric_options or {}
    for name in scores:
        result[name] = metric_modules.compute(name, answers, references, **options.get(name, {}))
    if predictions_path is not None:
        _write_predictions(Path(predictions_path), asked, answers, options.get("exact_match", {}))
    return result


def _write_predictions(path: Path, asked: list[tuple[str, str]], answers: list[str], matching: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as lines:
        for (question, reference), answer in zip(asked, answers, strict=True):
            row = {
                "prompt": question,
                "reference": reference,
                "prediction": answer,
                "exact_match": is_match(answer, reference, **matching),
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    temporary.replace(path)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; the model's own mode afterwards."""
    was_training = model.training
    model.eval()
    # generate() passes the head the last position of every prompt, strided; matmul would then copy the head's weight
    # once for each of them: 2.8 GB for 50 prompts to a model of 135 million weights.
    head = model.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(_contiguous_input)
    try:
        with torch.no_grad():  # inference tensors that a model keeps for itself could not be trained with later
            yield
    finally:
        if hook is not None:
            hook.remove()
        model.train(was_training)


def _contiguous_input(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in inputs)


def _predicting(labels: list[int]) -> list[int]:
    """Positions whose next token has a label."""
    return [index for index, label in enumerate(labels[1:]) if label != IGNORED_LABEL]


def _batches(dataset: Dataset, batch_size: int, limit: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of like length together, as many as `batch_size` and `limit` positions with logits allow."""
    rows = sorted(dataset, key=lambda row: len(row["input_ids"]), reverse=True)
    batch: list[dict[str, Any]] = []
    positions: set[int] = set()
    for row in rows:
        union = positions | set(_predicting(row["labels"]))
        if batch and (len(batch) == batch_size or (len(batch) + 1) * len(union) > limit):
            yield batch
            batch, union = [], set(_predicting(row["labels"]))
        batch.append(row)
        positions = union
    if batch:
        yield batch


def _loss_of_batch(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    """The sum of the cross entropy over the batch's labels."""
    targets = batch.pop("labels")[:, 1:]
    kept = (targets != IGNORED_LABEL).any(dim=0).nonzero().squeeze(1)
    if kept.numel() == 0:
        return 0.0
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    logits = _logits(model, kept.to(model.device), use_cache=False, **inputs)[0]
    return _summed_loss(logits, targets[:, kept].to(model.device))


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
        total += _summed_loss(logits, targets[:, start:end][:, kept])
    return total


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


def _summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    flat = logits.float().flatten(0, 1)
    return F.cross_entropy(flat, targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum").item()


def _vocabulary(model: PreTrainedModel) -> int:
    size: int = model.config.get_text_config().vocab_size
    return size


def _pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.pad_token_id is None:
        raise DataError("The tokenizer has no pad token; load it with sbft.models.load_tokenizer, which sees to one.")
    return int(tokenizer.pad_token_id)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    own: int | list[int] | None = model.generation_config.eos_token_id if model.generation_config else None
    listed = own if isinstance(own, list) else [] if own is None else [own]
    return list(dict.fromkeys([*stop_tokens(tokenizer), *listed]))
