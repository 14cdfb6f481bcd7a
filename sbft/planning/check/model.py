"""Signs that a run will go wrong: data that its model cannot handle, found without reading a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from sbft.data.format import encode_questions, format_rows
from sbft.data.rendering import Rendering
from sbft.errors import DataError, ModelError, SbftError
from sbft.models.hub import hub_reachable
from sbft.models.limits import embedding_rows, position_limit, stated_positions
from sbft.models.load import load_config
from sbft.models.names import is_builtin, resolve
from sbft.models.random_weights import is_random
from sbft.models.scratch import is_scratch, scratch_config
from sbft.planning.check.finding import Finding, Severity
from sbft.planning.check.offload import why_not_streamed
from sbft.runs.prepare import Prepared, evaluation_rows
from sbft.training.batches.packing_probe import NO_PACKING, CannotTell, leak_in_words, packing_leaks_in
from sbft.training.checkpointing.trial_save import SavingError, try_saving
from sbft.training.generation_config import repaired

_CHUNK_ROWS = 1_000


@dataclass(frozen=True)
class Asked:
    """The extremes of a model's input during evaluation; zeros where it is not evaluated."""

    largest: int = 0
    """The largest token id."""
    longest: int = 0
    """Tokens of the longest example."""
    longest_prompt: int = 0
    """Tokens of the longest prompt that the model has to answer."""


@dataclass(frozen=True)
class Known:
    """A run's data and its model's config."""

    prepared: Prepared
    config: PreTrainedConfig

    @property
    def trust(self) -> bool:
        """Whether the model's own Python code may run."""
        return self.prepared.recipe.trust_remote_code

    @property
    def longest(self) -> int:
        """Tokens of the longest training example, packed or not."""
        prepared = self.prepared
        return prepared.recipe.data.max_length if prepared.pretrains else prepared.report.longest

    @property
    def answer(self) -> int:
        """The most tokens that an answer may have during evaluation."""
        settings = self.prepared.recipe.evaluation
        return settings.max_new_tokens if settings.metrics and not self.prepared.pretrains else 0

    @cached_property
    def evaluated(self) -> Dataset | None:
        """The rows that are evaluated."""
        rows, limit = evaluation_rows(self.prepared.splits), self.prepared.recipe.evaluation.limit
        if not isinstance(rows, Dataset) or len(rows) == 0:
            return None
        return rows.select(range(min(len(rows), limit or len(rows))))

    @cached_property
    def most_evaluated(self) -> int:
        """An upper bound for the tokens of an evaluated row, the chat template's aside: a token has at least one byte."""
        texts = (str(value) for row in self.evaluated or () for value in [list(row.values())])
        return max((len(text.encode()) for text in texts), default=0)

    @cached_property
    def asked(self) -> Asked:
        """The extremes of the evaluation's inputs. Takes as long as tokenizing its rows."""
        if self.evaluated is None:
            return Asked()
        data, tokenizer = self.prepared.recipe.data, self.prepared.tokenizer
        rendering = Rendering.of(data)
        try:
            examples, report = format_rows(self.evaluated, tokenizer, rendering, max_length=data.max_length)
            prompts = encode_questions(self.evaluated, tokenizer, rendering) if self.answer else []
        except DataError:
            return Asked()  # reported by the evaluation
        return Asked(_largest(examples), report.longest, max(map(len, prompts), default=0))


ModelCheck = Callable[[Known], Finding | None]


def find_in_model(prepared: Prepared, checks: tuple[ModelCheck, ...]) -> list[Finding]:
    """Run checks that require the model's config. Returns no finding where the config cannot be read.

    Args:
        prepared: what the run reads.
        checks: `BEFORE_LOADING`, or `MODEL_CHECKS`, which also has those that a run makes on its loaded model.
    """
    recipe = prepared.recipe
    config: Any
    try:
        if is_scratch(recipe.model):
            config = scratch_config(recipe.model, prepared.tokenizer)
        else:
            config = load_config(recipe.model, trust_remote_code=recipe.trust_remote_code)
    except SbftError:
        return []  # loading the model gives a better message
    known = Known(prepared, config)
    return [finding for check in checks if (finding := check(known)) is not None]


def refuse_errors(findings: list[Finding]) -> list[Finding]:
    """Return the findings unchanged if none is an error.

    Raises:
        ModelError: if one is.
    """
    for finding in findings:
        if finding.severity == "error":
            raise ModelError(f"{finding.title}. {finding.why} To fix it: {finding.fix}")
    return findings


def tokens_without_a_row(known: Known) -> Finding | None:
    """Token ids that the model's embedding has no row for."""
    prepared, tokenizer = known.prepared, known.prepared.tokenizer
    rows, count = embedding_rows(known.config), max(tokenizer.get_vocab().values()) + 1
    if rows is None or count <= rows:
        return None
    if isinstance(prepared.examples, Dataset):
        # Batches are padded.
        largest = max(_largest(prepared.examples), int(tokenizer.pad_token_id), known.asked.largest)
    else:
        largest = count - 1  # pretraining data is too large to search, and its tokens come from this tokenizer
    severity: Severity
    if largest >= rows:
        severity = "error"
        why = f"The data contains token {largest:,}, for which the model has no row: training fails when it gets there."
    else:
        severity = "warning"
        why = (
            f"The model has no row for tokens from {rows:,} on. This data contains none, but any text that does fails."
        )
    return Finding(
        "tokenizer-larger-than-embedding",
        severity,
        f"The tokenizer has {count:,} tokens, and the model has rows for {rows:,}",
        why,
        "Give the model a row for every token, and train from the folder that you save it to: "
        "model.resize_token_embeddings(len(tokenizer)); model.save_pretrained(DIR); tokenizer.save_pretrained(DIR)",
    )


def longer_than_positions(known: Known) -> Finding | None:
    """Texts that are longer than the model's positions, or than those it was trained on."""
    stated = stated_positions(known.config)
    if stated is None or max(known.longest, known.most_evaluated + known.answer) <= stated:
        return None
    limit = position_limit(known.config, trust_remote_code=known.trust)
    assert limit is not None
    if not limit.hard:
        if known.longest <= limit.tokens:
            return None
        return Finding(
            "longer-than-trained-positions",
            "warning",
            f"The longest example has {known.longest:,} tokens, and the model was made for {limit.tokens:,}",
            "It accepts longer ones, but works poorly at positions that it was never trained on. Cut the examples, or extend "
            "its positions (rope_parameters in its config.json).",
            f"--set data.max_length={limit.tokens}",
        )
    longest = max(known.longest, known.asked.longest)
    if longest > limit.tokens:
        return Finding(
            "longer-than-positions",
            "error",
            f"The longest example has {longest:,} tokens, and the model has positions for {limit.tokens:,}",
            "Its table of positions ends there, so a longer example fails. The model does not learn what is cut: "
            "split long examples where that matters.",
            f"--set data.max_length={limit.tokens}",
        )
    room = limit.tokens - known.asked.longest_prompt
    if not known.answer or room >= known.answer:
        return None
    severity: Severity = "warning" if room > 0 else "error"
    return Finding(
        "answers-longer-than-positions",
        severity,
        f"An evaluation question has {known.asked.longest_prompt:,} tokens, its answer may have {known.answer:,}, and "
        f"the model has positions for {limit.tokens:,}",
        f"Its table of positions ends there: {'answers are cut' if room > 0 else 'it cannot answer this question'}.",
        f"--set evaluation.max_new_tokens={room}"
        if room > 0
        else "Remove questions of this length from the evaluation, or --set evaluation.metrics=[]",
    )


def documents_mixed_up(known: Known) -> Finding | None:
    """Packing for a model whose attention mixes the documents of a packed row."""
    if known.prepared.pretrains or not known.prepared.recipe.data.packing:
        return None
    name = (known.config.architectures or [f"The model ({known.config.model_type})"])[0]
    try:
        leaks = packing_leaks_in(known.config, trust_remote_code=known.trust)
    except CannotTell as error:
        return Finding(
            "packing-not-known",
            "note",
            f"It is not known yet whether {name} keeps packed documents apart",
            f"This could not be tried without its weights ({error}). sbft train tries it with the loaded model, and refuses "
            "to pack if that fails as well.",
        )
    if not leaks:
        return None
    return Finding("packing-leaks", "error", f"{name} cannot be packed", leak_in_words(name), NO_PACKING)


def layers_not_streamed(known: Known) -> Finding | None:
    """Layers that are to be in the host's memory, and cannot be."""
    return why_not_streamed(known.prepared.recipe, known.config)


def unsaveable(known: Known) -> Finding | None:
    """Something in the model's files that makes it impossible to save the trained model."""
    recipe = known.prepared.recipe
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known.config, trust_remote_code=known.trust)
    except Exception:  # the model's own code failed; expected_memory reports it
        return None
    generation, repairs = _generation_config(recipe.model)
    if generation is not None:
        model.generation_config = generation
    try:
        try_saving(model, known.prepared.tokenizer, known.prepared.arguments)
    except SavingError as error:
        return Finding(
            "cannot-be-saved", "error", "The trained model could not be saved", str(error), "Correct its files."
        )
    if not repairs:
        return None
    return Finding(
        "generation-config-repaired",
        "note",
        "The model's generation_config.json has settings that transformers refuses to save",
        f"The trained model is saved with a repaired one: {' and '.join(repairs)}.",
    )


def _generation_config(model: str) -> tuple[GenerationConfig | None, list[str]]:
    if is_random(model) or is_scratch(model) or is_builtin(model):
        return None, []
    folder = resolve(model)
    local_only = not Path(folder).is_dir() and not hub_reachable()
    try:
        return repaired(GenerationConfig.from_pretrained(folder, local_files_only=local_only))
    except (OSError, ValueError):
        return None, []  # the model has none, or an invalid one


def _largest(examples: Dataset) -> int:
    return max(int(ids.max()) for ids in _ids(examples))


def _ids(examples: Dataset) -> Iterator[np.ndarray]:
    for table in examples.with_format("arrow").iter(batch_size=_CHUNK_ROWS):
        yield table["input_ids"].combine_chunks().flatten().to_numpy()


BEFORE_LOADING: tuple[ModelCheck, ...] = (tokens_without_a_row, longer_than_positions, layers_not_streamed)
MODEL_CHECKS: tuple[ModelCheck, ...] = (*BEFORE_LOADING, documents_mixed_up, unsaveable)
