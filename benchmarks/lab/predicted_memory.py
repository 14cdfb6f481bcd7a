"""Predicts the memory of the lab's recorded runs anew, and compares it with what was measured; nothing is trained.

    python -m benchmarks.lab.predicted_memory benchmarks/lab/results/xeon-2-cores-cpu benchmarks/lab/results/h100-small

Resident memory above the loaded model on a CPU, allocated memory on CUDA. What the code of some runs
held, and no longer does, is added to the prediction of these runs, so that it is of the code that was measured.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from sbft.bench.archive import archived_runs
from sbft.models.load import load_config
from sbft.planning.memory import predict
from sbft.planning.memory.graphs import shape_in_graph
from sbft.planning.memory.predict import predict_recipe
from sbft.recipe import Recipe, resolve
from sbft.runs.record import RunRecord
from sbft.training.loss import cross_entropy
from sbft.training.loss.cross_entropy import PIECE_ELEMENTS

MEBIBYTE = 1 << 20
# Before commit 0eda99b the loss on a CPU copied the gradient of logits that are made in one piece.
COPIED_LOGITS = {"7a85f19", "0cdd26f"}
# Before commit 540abc4 a captured step made a mask of all pairs of tokens.
MASKED_GRAPHS = {"0cdd26f", "6423102"}
# Until commit 16c6823 a slice of the vocabulary had up to `PIECE_ELEMENTS` logits, and was held while the next was made.
LARGE_SLICES = {"7a85f19", "5adb892", "6423102", "0cdd26f", "0eda99b"}


@dataclass(frozen=True)
class Compared:
    """Runs that differ in rate and seed alone."""

    name: str
    runs: int
    measured_bytes: int
    """The median."""
    predicted_bytes: int
    """As of the code now."""
    as_run_bytes: int
    """As of the code that was measured."""
    errors: list[float]
    """Of each run: `as_run_bytes` beside what it measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="folders with a runs.jsonl")
    parser.add_argument("--only", nargs="+", default=[], help="variants to compare")
    arguments = parser.parse_args()
    for folder in arguments.folders:
        show(str(folder), list(compare(folder, set(arguments.only))))


def compare(folder: Path, only: set[str]) -> Iterator[Compared]:
    """The runs of an archive, by variant, commit and micro-batch."""
    groups: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    for name, run in archived_runs(folder).items():
        variant = name.split("/")[1]
        if run.record.status == "ok" and (not only or variant in only):
            groups[variant, str(run.record.git_commit)[:7]].append(run.record)
    for (variant, commit), records in sorted(groups.items()):
        measured = [measured_bytes(record) for record in records]
        now, then = predicted_bytes(records[0]), predicted_bytes(records[0], as_of=commit)
        errors = [then / one - 1 for one in measured]
        yield Compared(f"{variant} ({commit})", len(records), round(statistics.median(measured)), now, then, errors)


def measured_bytes(record: RunRecord) -> int:
    on_gpu = record.memory_kind == "cuda_allocated"
    value = record.peak_memory_bytes if on_gpu else record.memory["above_baseline"]
    assert value is not None
    return value


def predicted_bytes(record: RunRecord, as_of: str | None = None) -> int:
    """What is predicted for a run's recipe; with `as_of`, besides what the code of that commit held."""
    recipe, on_gpu = recipe_of(record), record.memory_kind == "cuda_allocated"
    length = recipe.data.max_length
    assert length is not None
    masked = as_of in MASKED_GRAPHS and on_gpu and bool(recipe.optimizer.cuda_graphs)
    sliced = large_slices() if as_of in LARGE_SLICES else nullcontext()
    with masked_graphs() if masked else nullcontext(), sliced:
        found = predict_recipe(
            recipe, longest=length, padded=False, labelled=length - 1, device="cuda" if on_gpu else "cpu"
        )
    if on_gpu:
        return found.peak_bytes
    logits = recipe.largest_batch * (length - 1) * load_config(recipe.model).vocab_size
    copied = as_of in COPIED_LOGITS and recipe.dtype == "float32" and logits <= PIECE_ELEMENTS
    return found.above_model_bytes + 4 * logits * copied


def recipe_of(record: RunRecord) -> Recipe:
    def given(content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        return {name: given(value) for name, value in content.items() if value is not None}

    return resolve(Recipe.model_validate(given(record.recipe)))


@contextmanager
def masked_graphs() -> Iterator[None]:
    def with_mask(*args: Any, **kwargs: Any) -> Any:
        return replace(shape_in_graph(*args, **kwargs), padded=True)

    with mock.patch.object(predict, "shape_in_graph", with_mask):
        yield


@contextmanager
def large_slices() -> Iterator[None]:
    limits = dict.fromkeys(("_SLICE_ELEMENTS", "_GPU_SLICE_ELEMENTS"), PIECE_ELEMENTS)
    logits_of, held = cross_entropy._logits, []

    def holding(hidden: Any, weight: Any, bias: Any, start: int, size: int, *rest: Any) -> Any:
        made = logits_of(hidden, weight, bias, start, size, *rest)
        held[:] = [made] if start + size < weight.shape[0] else []
        return made

    predict._traced.clear()  # steps with slices as they are now
    with mock.patch.multiple(cross_entropy, **limits, _logits=holding):
        yield
    predict._traced.clear()


def show(title: str, rows: list[Compared]) -> None:
    print(f"{title}, MiB\n\n| variant (commit) | runs | measured | predicted | with what was removed since | error |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        sizes = (row.measured_bytes, row.predicted_bytes, row.as_run_bytes)
        cells = " | ".join(f"{size / MEBIBYTE:.1f}" for size in sizes)
        print(f"| {row.name} | {row.runs} | {cells} | {statistics.median(row.errors):+.1%} |")
    errors = sorted(abs(error) for row in rows for error in row.errors)
    within = sum(error <= 0.04 for error in errors)
    print(
        f"\n{len(errors)} runs: median error {statistics.median(errors):.1%}, largest {errors[-1]:.1%}, {within} within 4 %\n"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main()
