"""A table and a picture of the runs in a folder that is not a suite's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sbft.bench.report import formats
from sbft.bench.report.statistics import standard_error
from sbft.bench.report.style import BLUE, ORANGE, literal
from sbft.bench.report.tables import Table, metric_name
from sbft.errors import DataError
from sbft.native.sizes import MIB, gib, mib
from sbft.runs.record import FILE_NAME, Forgetting, RunRecord, forgetting

TABLE_FILE, PICTURE_FILE = "table.md", "picture.png"

_LONGEST_NAME = 30  # letters of a run's name in the picture
_HEAD = (
    "run", "learning rate", "exact match before", "after", "loss before", "after ", "peak memory", "above the model",
    "ms per step", "of which update", "trained weights",
)  # fmt: skip
_FORGETTING = "Forgetting: the metric after training minus that before, on data that the recipe watches."


def read_records(folder: Path) -> dict[str, RunRecord]:
    """The records below a folder, by the name of each run's folder, in the order in which they finished.

    Raises:
        DataError: if there is none.
    """
    paths = sorted(folder.glob(f"*/{FILE_NAME}"), key=lambda path: path.stat().st_mtime_ns)
    if not paths:
        raise DataError(
            f"There is no run in {folder}: expected {folder}/NAME/{FILE_NAME}. Make one with: sbft train RECIPE"
        )
    return {path.parent.name: RunRecord.load(path.parent) for path in paths}


def table(records: dict[str, RunRecord]) -> Table:
    """One row per run; the row of a failed run says why it failed."""
    watched = list(dict.fromkeys(name for record in records.values() for name in forgetting(record)))
    head = [*_HEAD, *(f"forgetting of {name}" for name in watched)]
    return Table(head, [_row(name, record, watched) for name, record in records.items()])


def _row(name: str, record: RunRecord, watched: list[str]) -> list[str]:
    if record.status != "ok":
        return [name, f"{record.learning_rate:g}", f"{record.status}: {formats.reason(record.error)}"]
    examples = record.data.get("evaluation_examples")
    above = record.memory.get("above_baseline")
    changes = forgetting(record)
    return [
        name,
        f"{record.learning_rate:g}",
        _share(record.metrics_before.get("exact_match"), None),
        _share(record.metrics.get("exact_match"), examples),
        _number(record.metrics_before.get("loss")),
        _number(record.metrics.get("loss")),
        "" if record.peak_memory_bytes is None else gib(record.peak_memory_bytes),
        "" if above is None else mib(above),
        _milliseconds(record.step_s.get("median")),
        _milliseconds(record.optimizer_s.get("median")),
        f"{record.trainable_parameters / 1e6:.1f} of {record.parameters / 1e6:.1f} M",
        *(_change(changes.get(name)) for name in watched),
    ]


def _change(forgotten: Forgetting | None) -> str:
    """The metric after training minus that before, with its name."""
    if forgotten is None:
        return ""
    return f"{forgotten.change:+.3f} {metric_name(forgotten.metric)}".replace("-", "−")


def footer(records: dict[str, RunRecord]) -> str:
    """What a table's results were measured with: data, machine, versions."""

    def every(values: Iterable[object]) -> str:
        return " / ".join(dict.fromkeys(str(value) for value in values))

    runs = list(records.values())
    packages = [
        f"{name} {every(run.versions[name] for run in runs if name in run.versions)}"
        for name in ("torch", "transformers", "peft")
        if any(name in run.versions for run in runs)
    ]
    lines = [
        f"{every(run.model for run in runs)}, {every(run.data.get('examples') for run in runs)} examples of "
        f"{every(run.dataset for run in runs)}, measured on "
        f"{every(run.data.get('evaluation_examples') for run in runs)} others "
        f"({every(run.evaluated_on for run in runs)}); ± is one standard error of that sample.",
        f"Peak memory ({every(run.memory_kind for run in runs)}) is that of the training loop. Memory above the model is what "
        "the loop added to the memory in use when it began.",
        *([_FORGETTING] if any(map(forgetting, runs)) else []),
        f"Machine: {formats.machines((run.device, None) for run in runs)}; {', '.join(packages)}.",
    ]
    return "\n".join(lines)


def measured(records: dict[str, RunRecord]) -> dict[str, RunRecord]:
    """The runs that the picture shows."""
    return {name: r for name, r in records.items() if r.status == "ok" and r.metrics.get("exact_match") is not None}


def draw(records: dict[str, RunRecord], path: Path) -> None:
    """Draw exact match before and after training, and peak memory above the loaded model, with one bar per run.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    names = list(records)
    figure = Figure(figsize=(9, 1.4 + 0.62 * len(names)), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = list(range(len(names)))[::-1]
    after = [100 * r.metrics["exact_match"] for r in records.values()]
    before = [100 * (r.metrics_before.get("exact_match") or 0.0) for r in records.values()]
    errors = [
        100 * standard_error(r.metrics["exact_match"], int(r.data["evaluation_examples"] or 1))
        for r in records.values()
    ]
    left.barh([p + 0.2 for p in places], before, 0.36, color="#BBBBBB", label="before training")
    left.barh([p - 0.2 for p in places], after, 0.36, xerr=errors, capsize=3, color=BLUE, label="after")
    for place, value, spread in zip(places, after, errors, strict=True):
        left.text(value + spread + 1.5, place - 0.2, f"{value:.0f}%", va="center", fontsize=9)
    left.set(xlim=(0, 112), xlabel="exact match, % (± one standard error)", yticks=places)
    # The name of a folder may be as long as the picture is wide.
    labels = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in names]
    left.set_yticklabels(list(map(literal, labels)))
    left.legend(
        loc="upper center", bbox_to_anchor=(0.5, 1.0 + 0.42 / (0.62 * len(names))), ncols=2, frameon=False, fontsize=9
    )
    memory = [(r.memory.get("above_baseline") or 0) / MIB for r in records.values()]
    right.barh(places, memory, 0.5, color=ORANGE)
    for place, value in zip(places, memory, strict=True):
        right.text(value + max(memory) * 0.02, place, f"{value:.0f}", va="center", fontsize=9)
    # Where memory was not measured, all bars are 0, and an axis cannot have length 0.
    right.set(xlim=(0, max(memory) * 1.2 or 1), xlabel="peak memory above the loaded model, MiB")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.savefig(path)


def _share(value: float | None, examples: int | None) -> str:
    if value is None:
        return ""
    text = f"{100 * value:.0f} %"
    return text if not examples else f"{text} ± {100 * standard_error(value, examples):.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.0f}"
