"""All pictures of a comparison, with their files, titles and captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sbft.bench.report.charts import SMOOTHING, draw_losses, draw_memory, draw_rates
from sbft.bench.report.comparison import Comparison
from sbft.bench.report.scatter import draw_scatter


@dataclass(frozen=True)
class Picture:
    """A drawn picture."""

    path: Path
    title: str
    caption: str


_SCATTER = (
    "Each point is the mean over the seeds; bars are one standard error (see the notes). The dashed line is the Pareto "
    "front: no method that needs as little memory beats a method on it. A method with a failed seed is never on it, and its "
    "name says how many seeds its mean is taken over."
)
_MEMORY = (
    "Means over the seeds; the number at the end of a bar is the peak of the training loop. Optimizer state, gradients (with "
    "gradient release, the largest one) and adapters are computed from their sizes. Activations and temporaries are the rest "
    "of what the loop added."
)
_RATES = (
    "The learning rate that validation chose has a ring; bars are one standard error (see the notes). A flat line means that "
    "the method tolerates a poor learning rate. Crosses at the lower edge are failed runs."
)
_LOSSES = (
    "Mean over the seeds of the training loss, which was logged every few steps, averaged over a window of "
    f"{SMOOTHING:.0%} of all tokens."
)


def draw(comparison: Comparison) -> list[Picture]:
    """Draw every picture for which there are results, into the suite's folder.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    drawings = (
        ("accuracy-memory.png", "Score against peak memory", _SCATTER, draw_scatter),
        ("memory-parts.png", "Peak memory by part", _MEMORY, draw_memory),
        ("learning-rates.png", "Robustness to the learning rate", _RATES, draw_rates),
        ("training-loss.png", "Training loss", _LOSSES, draw_losses),
    )
    pictures = []
    for name, title, caption, draw_one in drawings:
        path = comparison.folder / name
        if draw_one(comparison, path):
            pictures.append(Picture(path, title, caption))
        else:
            # A picture from runs that no longer exist.
            path.unlink(missing_ok=True)
    return pictures
