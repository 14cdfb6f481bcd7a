"""All pictures of a comparison: their files, what each shows, and its caption."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sbft.bench.report.charts import SMOOTHING, draw_losses, draw_memory, draw_rates
from sbft.bench.report.comparison import Comparison
from sbft.bench.report.scatter import draw_scatter


@dataclass(frozen=True)
class Picture:
    """A picture that has been drawn."""

    path: Path
    title: str
    caption: str


_SCATTER = (
    "Each point is the mean over the seeds, its bar one standard error (see the notes). The dashed stairs are the "
    "Pareto front: a method on them is beaten by none that needs as little memory. One of which a seed failed is not on "
    "them, and says behind its name how many seeds it is the mean of."
)
_MEMORY = (
    "Mean over the seeds; the figure at the end of a bar is the peak of the training loop. The optimizer's state, the "
    "gradients (with gradient release the largest one) and the adapters are known by their size; activations and temporaries "
    "are the rest of what the loop added."
)
_RATES = (
    "The validation part chooses the learning rate, which is ringed; bars are one standard error (see the notes). "
    "A flat line is a method that forgives a wrong one. Crosses at the lower edge: the run failed."
)
_LOSSES = (
    "Mean over the seeds of the loss on training data, which was logged every few steps; smoothed by averaging over "
    f"a window of {SMOOTHING:.0%} of all tokens."
)


def draw(comparison: Comparison) -> list[Picture]:
    """Draw what can be drawn from the runs there are, into the suite's folder.

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
            # One of runs that are no longer there.
            path.unlink(missing_ok=True)
    return pictures
