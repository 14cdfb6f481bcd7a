"""Generated tasks: questions with one right answer, made from a seed by the package reasoning-gym."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any

from sbft.data import random_text
from sbft.errors import DataError, MissingPackageError, how_to_install

PREFIX = "generated:"

# Most tasks draw question i from the seed `seed + i`, so neighbouring seeds share questions. Therefore the parts of a data
# set, and the data sets of different seeds, are millions of seeds apart. The largest seed stays below 2**31.
_PART_START = {"train": 0, "validation": 700_000_000, "eval": 1_400_000_000}
_SEED_STRIDE = 10_000_000
_SEEDS = 60
_CHUNK = 256


def is_generated(source: str) -> bool:
    """Whether a source has the form `generated:NAME`."""
    return source.startswith(PREFIX)


def rows(source: str, *, part: str, seed: int = 0, options: dict[str, Any] | None = None) -> Iterator[dict[str, str]]:
    """Yields an endless stream of questions of one part of a task; the same arguments give the same questions.

    Args:
        source: `generated:NAME`, where NAME is a task of reasoning-gym, or `random_text`.
        part: "train", "validation" or "eval"; their seeds are far apart.
        seed: which data set of this task; those of 0 to 59 draw their questions from different seeds.
        options: settings of the task, for example {"min_digits": 2}.

    Yields:
        {"prompt": the question, "completion": the final answer as text}; of random_text {"text": the text}.

    Raises:
        MissingPackageError: reasoning-gym is not installed.
        DataError: the task does not exist, refuses its options, or has answers that are not a single text.
    """
    name = source.removeprefix(PREFIX)
    start = _PART_START[part] + (seed % _SEEDS) * _SEED_STRIDE
    if name == random_text.NAME:
        yield from random_text.rows(start=start, options=options or {})
        return
    done = 0
    while True:
        task = _create(name, seed=start + done, size=_CHUNK, options=options or {})
        for index in range(_CHUNK):
            try:
                item = task[index]
            except Exception as error:  # each of the hundred tasks has its own code
                raise _refused(name, options, error) from error
            if not isinstance(item["answer"], str):
                raise DataError(
                    f"The task {source} gives no single right answer as text, so exact match cannot score it. "
                    "Choose another task, for example generated:chain_sum."
                )
            yield {"prompt": item["question"], "completion": item["answer"]}
        done += _CHUNK


def _create(name: str, *, seed: int, size: int, options: dict[str, Any]) -> Any:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise MissingPackageError(
            f"The data {PREFIX}{name} is made by the package reasoning-gym, which is not installed. "
            + how_to_install("'sbft[tasks]'")
        ) from error
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3)
        hint = f" Did you mean {' or '.join(PREFIX + task for task in near)}?" if near else ""
        raise DataError(f"reasoning-gym has no task {name!r} (it has {len(DATASETS)} others).{hint}")
    known = {field.name for field in dataclasses.fields(DATASETS[name][1])} - {"seed", "size"}
    if unknown := sorted(set(options) - known):
        raise DataError(
            f"The task {PREFIX}{name} has no option {', '.join(map(repr, unknown))}; "
            f"it has {', '.join(sorted(known)) or 'none'}. Correct data.options."
        )
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
    except Exception as error:  # each of the hundred tasks has its own code
        raise _refused(name, options, error) from error


def _refused(name: str, options: dict[str, Any] | None, error: Exception) -> DataError:
    reason = " ".join(str(error).split())[:200] or "no reason is given"
    return DataError(
        f"The task {PREFIX}{name} refuses its options {str(options)[:200]}: {reason}. Correct data.options."
    )
