"""What the peak memory of a run is made of."""

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
"""The parts in their order, and what people read."""


def names_of(rows: list[Row]) -> dict[str, str]:
    """What people read where these rows are shown: on a GPU there is no Python."""
    return {**NAMES, PROCESS: "held before by others"} if any(row.is_on_gpu for row in rows) else NAMES


def parts_of(record: RunRecord, is_adapter: bool) -> dict[str, float] | None:
    """Bytes by part, which add up to the peak; None where they were not measured.

    Gradients and activations need not be at their highest at once: where together they would be more than the loop
    has added, the gradients get what the optimizer's state leaves.
    """
    memory, peak = record.memory, record.peak_memory_bytes
    baseline, above, held = memory.get("baseline"), memory.get("above_baseline"), memory.get("weights")
    if peak is None or baseline is None or above is None or held is None:
        return None
    gradients, state = memory.get("gradients") or 0, memory.get("optimizer_state") or 0
    # Weights that are mapped from a file need not all be resident.
    held = min(held, baseline)
    # The adapters, and nothing else, have gradients; these have their size.
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
    """The mean over the seeds of each part."""
    measured = [parts for record in row.records if (parts := parts_of(record, row.is_adapter)) is not None]
    if not measured:
        return None
    return {name: fmean(parts[name] for parts in measured) for name in NAMES}


def prediction_of_row(row: Row) -> tuple[float, float] | None:
    """The predicted and the measured bytes, means over the seeds: on a GPU of the peak, elsewhere above the loaded model."""
    found = [pair for record in row.records if (pair := _prediction_of(record)) is not None]
    if not found:
        return None
    return fmean(predicted for predicted, _ in found), fmean(measured for _, measured in found)


def _prediction_of(record: RunRecord) -> tuple[int, int] | None:
    if record.memory_kind == "cuda_allocated":
        predicted, measured = record.memory.get("predicted_peak"), record.peak_memory_bytes
    else:
        predicted, measured = record.memory.get("predicted_above_baseline"), record.memory.get("above_baseline")
    return (predicted, measured) if predicted and measured else None
