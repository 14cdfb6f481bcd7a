"""The parts of a run's peak memory."""

from __future__ import annotations

from statistics import fmean

from sbft.bench.report.comparison import Row
from sbft.runs.record import RunRecord

PROCESS = "process"
NAMES = {
    PROCESS: "Python and libraries",
    "weights": "weights",
    "adapters": "adapters",
    "optimizer_state": "optimizer state",
    "gradients": "gradients",
    "rest": "activations and temporaries",
}
"""The parts in their order, and their names for people."""


def names_of(rows: list[Row]) -> dict[str, str]:
    """Names of the parts for these rows. Python and libraries are not in a GPU's memory."""
    return {**NAMES, PROCESS: "in use before"} if any(row.is_on_gpu for row in rows) else NAMES


def parts_of(record: RunRecord, is_adapter: bool) -> dict[str, float] | None:
    """Bytes by part, which add up to the peak; None where they were not measured.

    Gradients and activations need not peak at the same time. Where the parts would exceed what the loop added, the gradients
    get what the optimizer's state leaves.
    """
    memory, peak = record.memory, record.peak_memory_bytes
    baseline, above, held = memory.get("baseline"), memory.get("above_baseline"), memory.get("weights")
    if peak is None or baseline is None or above is None or held is None:
        return None
    gradients, state = memory.get("gradients") or 0, memory.get("optimizer_state") or 0
    # Weights mapped from a file need not all be resident.
    held = min(held, baseline)
    # Only the adapters have gradients, of the same size.
    adapters = min(gradients, held) if is_adapter else 0
    state = min(state, above)
    gradients = min(gradients, above - state)
    return {
        PROCESS: baseline - held,
        "weights": held - adapters,
        "adapters": adapters,
        "optimizer_state": state,
        "gradients": gradients,
        "rest": above - state - gradients,
    }


def parts_of_row(row: Row) -> dict[str, float] | None:
    """Each part's mean over the seeds."""
    measured = [parts for record in row.records if (parts := parts_of(record, row.is_adapter)) is not None]
    if not measured:
        return None
    return {name: fmean(parts[name] for parts in measured) for name in NAMES}


def prediction_of_row(row: Row) -> tuple[float, float] | None:
    """Predicted and measured bytes, means over the seeds: of the peak on a GPU, elsewhere of memory above the loaded model."""
    pairs = [pair for record in row.records if (pair := _prediction_of(record)) is not None]
    if not pairs:
        return None
    return fmean(predicted for predicted, _ in pairs), fmean(measured for _, measured in pairs)


def _prediction_of(record: RunRecord) -> tuple[int, int] | None:
    if record.memory_kind == "cuda_allocated":
        predicted, measured = record.memory.get("predicted_peak"), record.peak_memory_bytes
    else:
        predicted, measured = record.memory.get("predicted_above_baseline"), record.memory.get("above_baseline")
    return (predicted, measured) if predicted and measured else None
