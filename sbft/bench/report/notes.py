"""Notes to a comparison: how, where and with what its results were measured."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from sbft.bench.report import formats
from sbft.bench.report.comparison import Comparison
from sbft.bench.report.tables import metric_name
from sbft.bench.suite import Suite, load_suite, suite_names, uneven_grids
from sbft.bench.suite_runs import SUITE_FILE
from sbft.runs.record import RunRecord

_MEMORY_KINDS = {
    "cuda_allocated": "what torch allocated on the GPU",
    "resident": "resident memory of the whole process, Python and libraries included",
}


def summary(comparison: Comparison) -> str:
    """The suite's description, and how many of its runs are done."""
    made = comparison.made()
    records = [made.record for made in made if made.record is not None]
    failed = sum(record.status != "ok" for record in records)
    undecided = sum(row.choice.rate is None and not row.choice.decided for row in comparison.rows)
    done = len(records) - failed
    parts = [f"{done} run{'' if done == 1 else 's'} done"]
    if failed:
        parts.append(f"{failed} failed")
    if len(made) > len(records):
        parts.append(f"{len(made) - len(records)} still to be made")
    if undecided:
        rows = f"{undecided} row{'s' if undecided > 1 else ''}"
        parts.append(f"the learning rate of {rows} still to be chosen, and then {rows} to be tested")
    about = comparison.suite.summary.strip()
    return f"{about}{'' if about.endswith('.') else '.'} {'; '.join(parts)}." if about else f"{'; '.join(parts)}."


def command(comparison: Comparison) -> str:
    """The command that makes the same runs."""
    folder = _relative(comparison.folder)
    jobs = _most_at_once(comparison)
    on_cpu = not any(
        made.record.memory_kind == "cuda_allocated" for made in comparison.made() if made.record is not None
    )
    # On GPUs, sbft bench by itself makes as many runs at the same time as there are GPUs.
    at_once = f" --jobs {jobs}" if on_cpu and jobs is not None and jobs > 1 else ""
    return f"sbft bench {shlex.quote(_source(comparison.suite, folder))} --output-dir {shlex.quote(folder)}{at_once}"


def _most_at_once(comparison: Comparison) -> int | None:
    """The highest number of runs that a runner made at the same time; None where unknown."""
    counts = [count for made in comparison.made() if made.record is not None and (count := made.at_once) is not None]
    return max(counts, default=None)


def _source(suite: Suite, folder: str) -> str:
    """The name of the suite if it ships with sbft and was run unchanged, else the path of the copy beside its runs."""
    return next((name for name in suite_names() if load_suite(name) == suite), f"{folder}/{SUITE_FILE}")


def _relative(folder: Path) -> str:
    path = os.path.relpath(folder)
    return str(folder) if path.startswith("..") else path


def notes(comparison: Comparison) -> list[str]:
    """A list of notes, each on one subject."""
    suite = comparison.suite
    made = [one for one in comparison.made() if one.record is not None]
    records = [one.record for one in made if one.record is not None]
    sentences = [
        f"The test runs have seeds {_listed(suite.seeds)}. A seed decides the order of the examples and, unless a task has "
        "a data.seed, which examples these are; it is the same for every method. The learning rate was chosen on the "
        f"validation part, with seeds {_listed(suite.search_seeds)}.",
        "± is one standard error. Over several seeds, it is the sample standard deviation divided by the square root of "
        "their number. With one seed, it is that of a share of as many items; a loss then has none. Validation scores have "
        "theirs over the search seeds, or over the items of the validation part.",
        *_items(comparison),
    ]
    if (uneven := uneven_grids(suite)) is not None:
        sentences.append(uneven)
    if not records:
        return sentences
    sentences += _memory(records)
    sentences.append(
        "ms per step is the median over the steps of a run; a step is one update, which takes several batches with gradient "
        "accumulation. The table has the median over the test runs, so other load while these were made slows a row. "
        "tokens/s, and the total time from reading the data to the last measurement, are those of the fastest test run, "
        "because a run that was paused for a while has far too low a rate."
    )
    most = _most_at_once(comparison)
    if most is not None and most > 1:
        where = "each on its own GPU or sharing one" if "cuda_allocated" in _kinds(records) else "sharing its cores"
        sentences.append(
            f"Up to {most} runs were on the machine at the same time, {where}: each took longer than it would alone."
        )
    elif most is not None:
        sentences.append("Each runner made one run at a time.")
    sentences.append(f"Machine: {formats.machines((one.record.device, one.cores) for one in made if one.record)}.")
    sentences.append(f"Versions: {', '.join(_versions(records))}.")
    commits = {record.git_commit for record in records if record.git_commit}
    sentences.append(
        f"Commits: {_every(record.git_commit for record in records) or 'not run from a checkout'}."
        + (" The runs of this table are of several commits." if len(commits) > 1 else "")
    )
    return sentences


def _items(comparison: Comparison) -> list[str]:
    notes_on_items = []
    for title, rows in comparison.groups():
        records = [record for row in rows for record in row.records]
        if not records:
            continue
        notes_on_items.append(
            f"{title}: {metric_name(rows[0].metric)} and loss on "
            f"{_every(record.data.get('evaluation_examples') for record in records)} items "
            f"({_every(record.evaluated_on for record in records)}) after training on "
            f"{_every(record.data.get('examples') for record in records)} examples of "
            f"{_every(record.dataset for record in records)} with {_every(record.model for record in records)}."
        )
    return notes_on_items


def _kinds(records: list[RunRecord]) -> set[str]:
    return {record.memory_kind for record in records if record.peak_memory_bytes is not None}


def _memory(records: list[RunRecord]) -> list[str]:
    kinds = [_MEMORY_KINDS[kind] for kind in sorted(_kinds(records))]
    if not kinds:
        return []
    return [
        f"Peak memory ({'; '.join(kinds)}) is that of the training loop alone; the evaluation has a separate peak. "
        "Memory above the model is what the loop added to the memory in use when it began."
    ]


def _versions(records: list[RunRecord]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record.versions)
    return [f"{name} {_every(record.versions.get(name) for record in records)}" for name in names]


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _every(values: Iterable[object]) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))
