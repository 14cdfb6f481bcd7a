"""Signs that a run will go wrong: its examples, if cut off, evaluated as well, or without their first or last token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from sbft.data.collate import IGNORED_LABEL
from sbft.data.format import Rendering, format_rows
from sbft.data.overlap import questions
from sbft.planning.check.finding import Finding
from sbft.runs.prepare import Prepared

_CHUNK_ROWS = 1_000
_NO_LIMIT = 2**31 - 1
# transformers' model_max_length of a tokenizer that knows no limit is about 1e30.
_KNOWN_LIMIT = 1e9


def truncated(prepared: Prepared) -> Finding | None:
    """Examples that were cut at the maximum length, or left out because the cut leaves no label."""
    report, limit = prepared.report, prepared.recipe.data.max_length
    if not (report.truncated or report.dropped):
        return None
    counts = [f"{_count(report.truncated, 'example')} cut off at {limit} tokens"] if report.truncated else []
    counts += [f"{_count(report.dropped, 'example')} left out"] if report.dropped else []
    _, uncut = format_rows(
        prepared.splits.train, prepared.tokenizer, Rendering.of(prepared.recipe.data), max_length=_NO_LIMIT
    )
    context = prepared.tokenizer.model_max_length
    fix = f"--set data.max_length={uncut.longest}"
    if uncut.longest > context and context < _KNOWN_LIMIT:
        fix = f"Split examples of more than {context:,} tokens, the most that the model can read"
        fix += f", and --set data.max_length={context}." if limit < context else "."
    return Finding(
        "examples-truncated",
        "warning",
        f"{' and '.join(counts)}, of {report.examples + report.dropped:,}",
        f"The model does not learn what is cut: the ends of answers, and so where to stop. The longest example "
        f"has {uncut.longest:,} tokens; memory grows with it.",
        fix,
    )


def not_read(prepared: Prepared) -> Finding | None:
    """Columns, and keys of messages, that are not used."""
    names = prepared.report.unread
    if not names:
        return None
    kind = "Column" if not any("[]." in name for name in names) else "Part of the data"
    return Finding(
        "data-not-read",
        "warning",
        f"{kind}{'s' * (len(names) > 1 and kind == 'Column')} not read: {', '.join(names)}",
        "The model neither sees it nor is trained on it.",
        "Name the columns to read with data.prompt, data.completion, data.messages, data.tools or data.text, or "
        "remove these.",
    )


def divided(prepared: Prepared) -> Finding | None:
    """Conversations that became several examples, which makes an epoch longer."""
    count = prepared.report.divided
    if not count:
        return None
    return Finding(
        "conversations-divided",
        "note",
        f"{_count(count, 'conversation')} became several examples, {prepared.report.examples:,} in all",
        "The model's chat template changes earlier answers once later ones follow: it may leave out their reasoning. "
        "So each such answer gets an example that ends with it, as it does when the model is used.",
    )


def dated_template(prepared: Prepared) -> Finding | None:
    """A chat template that writes today's date, so that a prompt of another day differs from the trained ones."""
    template = str(prepared.tokenizer.chat_template)
    if "strftime_now" not in template or not _renders(prepared):
        return None
    fix = "Give every chat a system turn with data.system, if the template then leaves out its own."
    if "date_string" in template:
        fix = "--set data.chat_template_kwargs.date_string='26 Jul 2024'"
    return Finding(
        "date-in-template",
        "note",
        "The chat template writes today's date into each example",
        "On any other day, the model's prompt contains a date that it was not trained with.",
        fix,
    )


def overlap(prepared: Prepared) -> Finding | None:
    """Validation or evaluation questions that are in the training data. Only data.allow_overlap makes this possible."""
    data, splits = prepared.recipe.data, prepared.splits
    if not data.allow_overlap:
        return None
    columns = (data.prompt, data.messages, data.text)
    trained_on = set(questions(splits.train, columns))
    parts = {"evaluation": splits.eval, "validation": splits.validation}
    shared = {
        part: sum(question in trained_on for question in questions(rows, columns))
        for part, rows in parts.items()
        if rows is not None
    }
    counts = [f"{count:,} of {len(parts[part] or ()):,} {part} questions" for part, count in shared.items() if count]
    if not counts:
        return None
    return Finding(
        "evaluation-in-training",
        "warning",
        f"{' and '.join(counts)} are in the training data",
        "The model may have memorized these answers, so the metrics prove nothing. Remove these rows from either part. "
        "Without data.allow_overlap, sbft refuses any that remain.",
        "--set data.allow_overlap=false",
    )


@dataclass(frozen=True)
class Ends:
    """How the answers of some examples end; examples that were cut off are not counted."""

    examples: int
    open: int
    """Examples whose last trained token is not a special token, so that they do not teach the model to stop."""
    masked: int
    """Of these, examples in which a special token follows immediately but has no label."""
    padded: int
    """Examples in which padding is trained on."""

    def __add__(self, other: Ends) -> Ends:
        return Ends(
            self.examples + other.examples,
            self.open + other.open,
            self.masked + other.masked,
            self.padded + other.padded,
        )


def unlearned_end(prepared: Prepared) -> Finding | None:
    """Answers whose end has no label, such as where the end token is also the pad token and is masked with it."""
    counts, tokenizer = ends(prepared), prepared.tokenizer
    if not counts.open:
        return None
    why = "no end token follows the answer"
    fix = "Set eos_token in the tokenizer's tokenizer_config.json."
    if counts.masked or tokenizer.eos_token_id is not None:
        why = "what ends the answer has no label"
        fix = "Put the end of the turn before {% endgeneration %} in the tokenizer's chat template."
    if counts.masked and tokenizer.pad_token_id == tokenizer.eos_token_id:
        why += f" (perhaps because {tokenizer.eos_token} is also the pad token, which is masked)"
    return Finding(
        "end-not-learned",
        "warning",
        f"The end of the answer is not learned in {_count(counts.open, 'example')} of {counts.examples:,}",
        f"In these, {why}, so the model does not learn to stop.",
        fix,
    )


def trained_padding(prepared: Prepared) -> Finding | None:
    """Padding that the data contains and that is trained on as if it were part of the answer."""
    counts, pad = ends(prepared), prepared.tokenizer.pad_token
    if not counts.padded:
        return None
    also = ", which is the end token too," if prepared.tokenizer.pad_token_id == prepared.tokenizer.eos_token_id else ""
    return Finding(
        "padding-trained",
        "warning",
        f"Padding is learned in {_count(counts.padded, 'example')} of {counts.examples:,}",
        f"Their text contains {pad}{also} several times in a row. It has labels, so the model would learn to write it. "
        "sbft pads batches itself, without labels.",
        f"Remove {pad} from the text of the training data.",
    )


def missing_begin(prepared: Prepared) -> Finding | None:
    """Examples that lack the begin token the model was trained with."""
    tokenizer = prepared.tokenizer
    begin = tokenizer.bos_token_id
    if begin is None or not (_adds_begin(tokenizer) or _asks_for_begin(tokenizer)):
        return None
    without = sum(int((chunk.ids[chunk.starts] != begin).sum()) for chunk in _chunks(prepared))
    if not without:
        return None
    kind = _kind(prepared)
    if _renders(prepared):
        why = "The tokenizer is set to put it before every text, but the chat template does not write it"
        fix = f"Put {tokenizer.bos_token} at the start of the tokenizer's chat template."
        if kind == "completion" and _adds_begin(tokenizer):
            fix = "--set data.chat_template=false"
    else:
        why = "The tokenizer's configuration asks for it, but its tokenizer.json does not add it"
        fix = "Add it in the post_processor of the model's tokenizer.json."
    return Finding(
        "begin-token-missing",
        "warning",
        f"{_count(without, 'example')} of {prepared.report.examples:,} do not begin with {tokenizer.bos_token}",
        f"{why}. Models that were trained with it write worse without it.",
        fix,
    )


def ends(prepared: Prepared) -> Ends:
    """How the answers of all training examples end."""
    tokenizer = prepared.tokenizer
    special = _special(tokenizer)
    # Where pad and end token are the same, the first ends the answer, and the data may contain a second.
    pads = 3 if tokenizer.pad_token_id == tokenizer.eos_token_id else 2
    limit = prepared.recipe.data.max_length
    each = (_ends(chunk, special, tokenizer.pad_token_id, pads, limit) for chunk in _chunks(prepared))
    return reduce(add, each, Ends(0, 0, 0, 0))


def answer_ends(prepared: Prepared) -> list[int]:
    """The special tokens that trained answers end with, except answers that were cut off; none in pretraining."""
    if prepared.pretrains:
        return []
    tokenizer, limit = prepared.tokenizer, prepared.recipe.data.max_length
    special = _special(tokenizer)
    last_tokens: set[int] = set()
    for chunk in _chunks(prepared):
        last, uncut = _last_trained(chunk), _lengths(chunk) < limit
        last_tokens |= set(chunk.ids[last[uncut]].tolist())
    return sorted(last_tokens & set(special.tolist()))


def _special(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    added = [token for token, content in tokenizer.added_tokens_decoder.items() if content.special]
    return np.array(sorted({*added, *tokenizer.all_special_ids}), dtype=np.int64)


@dataclass(frozen=True)
class _Chunk:
    """Some examples, concatenated."""

    ids: np.ndarray
    labels: np.ndarray
    starts: np.ndarray
    """Where each example begins; the examples in a packed row count separately."""


def _chunks(prepared: Prepared) -> Iterator[_Chunk]:
    assert isinstance(prepared.examples, Dataset)
    for table in prepared.examples.with_format("arrow").iter(batch_size=_CHUNK_ROWS):
        ids = table["input_ids"].combine_chunks()
        if "position_ids" in table.column_names:
            starts = np.flatnonzero(table["position_ids"].combine_chunks().flatten().to_numpy() == 0)
        else:
            lengths = ids.value_lengths().to_numpy()
            starts = np.cumsum(lengths) - lengths
        yield _Chunk(ids.flatten().to_numpy(), table["labels"].combine_chunks().flatten().to_numpy(), starts)


def _last_trained(chunk: _Chunk) -> np.ndarray:
    """Where the last label of each example is."""
    return np.maximum.reduceat(np.where(chunk.labels != IGNORED_LABEL, np.arange(len(chunk.ids)), -1), chunk.starts)


def _lengths(chunk: _Chunk) -> np.ndarray:
    return np.diff(np.append(chunk.starts, len(chunk.ids)))


def _ends(chunk: _Chunk, special: np.ndarray, pad: int, pads: int, limit: int) -> Ends:
    trained = chunk.labels != IGNORED_LABEL
    last = _last_trained(chunk)
    stops = np.append(chunk.starts[1:], len(chunk.ids))
    is_special = np.isin(chunk.ids, special)
    uncut = _lengths(chunk) < limit
    open_end = uncut & ~is_special[last]
    behind = np.minimum(last + 1, len(chunk.ids) - 1)
    masked = open_end & (last + 1 < stops) & is_special[behind]
    # The first token of an example has no label, so no sequence of pad tokens continues from one example into the next.
    padding = in_a_row = trained & (chunk.labels == pad)
    for _ in range(pads - 1):
        padding = np.append(padding[1:], False)
        in_a_row = in_a_row & padding
    padded = np.logical_or.reduceat(in_a_row, chunk.starts)
    return Ends(int(uncut.sum()), int(open_end.sum()), int(masked.sum()), int(padded.sum()))


def _adds_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its begin token before a text."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return ids[:1] == [tokenizer.bos_token_id]


def _asks_for_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's configuration asks for the begin token. transformers goes by tokenizer.json alone."""
    if not tokenizer.name_or_path:  # made in Python, not loaded
        return False
    return bool(get_tokenizer_config(tokenizer.name_or_path, local_files_only=True).get("add_bos_token"))


def _kind(prepared: Prepared) -> str:
    assert isinstance(prepared.splits.train, Dataset)
    return Rendering.of(prepared.recipe.data).kind(prepared.splits.train.column_names)


def _renders(prepared: Prepared) -> bool:
    """Whether the examples are rendered by the chat template."""
    return Rendering.of(prepared.recipe.data).uses_template(_kind(prepared), prepared.tokenizer)


def _count(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


EXAMPLES_CHECKS = (truncated, not_read, divided, dated_template, overlap, unlearned_end, trained_padding, missing_begin)
