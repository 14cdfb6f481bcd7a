"""What the figures of a comparison are: where, with what and how they were measured."""

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
    """The suite's own line, and how far it is."""
    made = comparison.made()
    records = [one.record for one in made if one.record is not None]
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
    """What to type to make the same runs."""
    folder = _relative(comparison.folder)
    jobs = _most_at_once(comparison)
    on_cpu = not any(one.record.memory_kind == "cuda_allocated" for one in comparison.made() if one.record is not None)
    # On GPUs sbft bench makes as many runs at once as there are, by itself.
    at_once = f" --jobs {jobs}" if on_cpu and jobs is not None and jobs > 1 else ""
    return f"sbft bench {shlex.quote(_source(comparison.suite, folder))} --output-dir {shlex.quote(folder)}{at_once}"


def _most_at_once(comparison: Comparison) -> int | None:
    """The most runs that a runner made at a time; None where that is not known."""
    known = [count for one in comparison.made() if one.record is not None and (count := one.at_once) is not None]
    return max(known, default=None)


def _source(suite: Suite, folder: str) -> str:
    """The name of the suite if it ships with sbft and was run as it is, else the copy that lies with its runs."""
    return next((name for name in suite_names() if load_suite(name) == suite), f"{folder}/{SUITE_FILE}")


def _relative(folder: Path) -> str:
    path = os.path.relpath(folder)
    return str(folder) if path.startswith("..") else path


def notes(comparison: Comparison) -> list[str]:
    """A list of sentences, each about one thing."""
    suite = comparison.suite
    made = [one for one in comparison.made() if one.record is not None]
    records = [one.record for one in made if one.record is not None]
    found = [
        f"Seeds {_listed(suite.seeds)} for the figures; they decide the order of the examples and, unless a task has a "
        f"data.seed, which these are: the same for every method. Seeds {_listed(suite.search_seeds)} for the choice of the "
        "learning rate, on the validation part.",
        "± is one standard error: over the seeds, the sample standard deviation over the root of their number; with "
        "one seed that of a share of that many items, and none for a loss. So it is for the validation scores, over the "
        "search seeds or the items of the validation part.",
        *_items(comparison),
    ]
    if (uneven := uneven_grids(suite)) is not None:
        found.append(uneven)
    if not records:
        return found
    found += _memory(records)
    found.append(
        "ms a step is the median over the steps of a run; a step is one update, with accumulation of several batches. "
        "It and tokens/s are the best of the runs at the chosen learning rate, because other load on the machine only "
        "ever slows a run. Total time is that of the quickest test run, from reading the data to the last measurement."
    )
    most = _most_at_once(comparison)
    if most is not None and most > 1:
        where = (
            "each on a GPU of its own or sharing one" if "cuda_allocated" in _kinds(records) else "sharing its cores"
        )
        found.append(
            f"Up to {most} runs at a time were on the machine, {where}: times are longer than those of one alone."
        )
    elif most is not None:
        found.append("Each runner made one run at a time.")
    found.append(f"Machine: {formats.machines((one.record.device, one.cores) for one in made if one.record)}.")
    found.append(f"Versions: {', '.join(_versions(records))}.")
    found.append(f"Commits: {_every(record.git_commit for record in records) or 'not run from a checkout'}.")
    return found


def _items(comparison: Comparison) -> list[str]:
    told = []
    for title, rows in comparison.groups():
        records = [record for row in rows for record in row.records]
        if not records:
            continue
        told.append(
            f"{title}: {metric_name(rows[0].metric)} and loss on "
            f"{_every(record.data.get('evaluation_examples') for record in records)} items "
            f"({_every(record.evaluated_on for record in records)}) after training on "
            f"{_every(record.data.get('examples') for record in records)} examples of "
            f"{_every(record.dataset for record in records)} with {_every(record.model for record in records)}."
        )
    return told


def _kinds(records: list[RunRecord]) -> set[str]:
    return {record.memory_kind for record in records if record.peak_memory_bytes is not None}


def _memory(records: list[RunRecord]) -> list[str]:
    kinds = [_MEMORY_KINDS[kind] for kind in sorted(_kinds(records))]
    if not kinds:
        return []
    return [
        f"Peak memory ({'; '.join(kinds)}) is that of the training loop alone, the evaluation's stands beside it; "
        "above the model: what the loop added to what was held when it began."
    ]


def _versions(records: list[RunRecord]) -> list[str]:
    names = dict.fromkeys(name for record in records for name in record.versions)
    return [f"{name} {_every(record.versions.get(name) for record in records)}" for name in names]


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _every(values: Iterable[object]) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))
