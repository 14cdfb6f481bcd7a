"""Draws figures and tables of the paper's experiments from the runs that have been made.

    python -m benchmarks.lab.figures runs/lab-cpu --output benchmarks/lab/results/DEVICE

FOLDER holds the runs and, in `suites`, what experiments.py wrote. Each experiment gets a table, a picture, and a JSON
file with their numbers. A figure without any finished run is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.lab.experiments import LENGTH, TASK

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from sbft.bench.report.comparison import Row, compare
from sbft.bench.report.statistics import Estimate
from sbft.bench.report.style import looks
from sbft.bench.suite import load_suite


@dataclass(frozen=True)
class Point:
    """The result of an optimizer at a batch size."""

    name: str
    batch: int
    rate: float | None
    edge: str | None
    loss: Estimate | None
    validation: dict[float, float | None]
    """Loss by learning rate, with the search seed."""
    failed: bool
    """Whether a run of the figure failed, or all runs of the search for a learning rate."""
    seeds_short: str
    """How many seeds the figure is the mean of, if some failed or are missing."""

    @property
    def shown(self) -> Estimate | None:
        """Loss over the seeds; if none is done, that of the search at the chosen rate."""
        tried = None if self.rate is None else self.validation.get(self.rate)
        return self.loss if self.loss is not None or tried is None else Estimate(tried)


FARTHEST = 1.5
"""Nats above the best at which the colours of the heat maps end."""

BY_NAME = ("rounding", "schedule")
"""Experiments whose variants do not form lines over the batch size."""


def load_points(suite: Path, folder: Path) -> list[Point]:
    """A point for each variant of a suite; the variants' names end in their batch size."""
    return [_point(row) for row in compare(load_suite(suite), folder).rows if row.task == TASK]


def _point(row: Row) -> Point:
    name = re.fullmatch(r"(.+)-(\d+)", row.variant)
    assert name is not None, row.variant
    tried = {run.learning_rate: None if run.score is None else run.score.mean for run in row.validations()}
    failed = bool(row.failed) or (row.choice.decided and row.choice.rate is None)
    return Point(name[1], int(name[2]), row.choice.rate, row.choice.edge, row.loss, tried, failed, row.seeds_short)


def seed_noise(points: list[Point]) -> tuple[float, int] | None:
    """How far the losses of two seeds are apart: standard deviation, and the number of variants that it comes from.

    Each variant has a run that chose its learning rate and, with other seeds, the runs of its figure. The median is used, so
    that the few variants that hardly train do not decide.
    """
    differences = [
        abs(point.loss.mean - tried) / math.sqrt(1 + 1 / point.loss.count)
        for point in points
        if point.loss is not None and point.rate is not None and (tried := point.validation.get(point.rate)) is not None
    ]
    return (1.4826 * statistics.median(differences), len(differences)) if differences else None


def with_reference(points: list[Point]) -> list[Point]:
    """Adds the point that both lines of the half-life experiment share: there the fixed beta2 has that half-life, so the two
    are the same run."""
    ours, fixed = dict.fromkeys(point.name for point in points)
    made = {point.batch for point in points if point.name == fixed}
    return [
        *points,
        *(replace(point, name=fixed) for point in points if point.name == ours and point.batch not in made),
    ]


def lines_against_batch(points: list[Point], axes: Axes) -> None:
    """Draws loss over batch size, with a line for each optimizer."""
    style = looks(list(dict.fromkeys(point.name for point in points)))
    for name in dict.fromkeys(point.name for point in points):
        shown_points = sorted(
            (point for point in points if point.name == name and point.shown is not None), key=lambda point: point.batch
        )
        if not shown_points:
            continue
        axes.errorbar(
            [point.batch for point in shown_points],
            [point.shown.mean for point in shown_points if point.shown],
            [point.shown.standard_error or 0.0 for point in shown_points if point.shown],
            label=name, color=style[name].colour, marker=style[name].marker, linestyle=style[name].line, capsize=2,
            linewidth=1.2,
        )  # fmt: skip
        searched = [point for point in shown_points if point.loss is None]
        axes.plot(
            [point.batch for point in searched],
            [point.shown.mean for point in searched if point.shown],
            color=style[name].colour, marker=style[name].marker, markerfacecolor="white", linestyle="none", zorder=3,
        )  # fmt: skip
    if any(point.loss is None and point.shown is not None for point in points):
        axes.set_title("hollow: the seed that chose the learning rate", fontsize=8, loc="right")
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        sorted({point.batch for point in points}), [str(b) for b in sorted({point.batch for point in points})]
    )
    axes.set_xlabel(f"batch size, sequences of {LENGTH} tokens")
    axes.set_ylabel("validation loss, nats a token")
    axes.legend(frameon=False, fontsize=8)


def dots(points: list[Point], axes: Axes) -> None:
    """Draws the loss of each variant."""
    shown_points = [point for point in points if point.shown is not None][::-1]
    axes.errorbar(
        [point.shown.mean for point in shown_points if point.shown],
        range(len(shown_points)),
        xerr=[point.shown.standard_error or 0.0 for point in shown_points if point.shown],
        fmt="o", capsize=2,
    )  # fmt: skip
    axes.set_yticks(range(len(shown_points)), [f"{point.name}-{point.batch}{_seeds(point)}" for point in shown_points])
    axes.set_xlabel("validation loss, nats a token")


def table(points: list[Point]) -> str:
    """Loss of each optimizer at each batch size, its learning rate below."""
    batches = sorted({point.batch for point in points})
    lines = [
        "| optimizer | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for name in dict.fromkeys(point.name for point in points):
        cells = [
            next((_cell(point) for point in points if (point.name, point.batch) == (name, batch)), "")
            for batch in batches
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(point: Point) -> str:
    if point.shown is None:
        return "failed" if point.failed else "not run"
    error = "" if point.shown.standard_error is None else f" ± {point.shown.standard_error:.3f}"
    mark = "" if point.edge is None else f", {point.edge} of its grid"
    return f"{point.shown.mean:.3f}{error}{_seeds(point)} ({point.rate:g}{mark})"


def _seeds(point: Point) -> str:
    return point.seeds_short if point.loss is not None else " (of the search)"


def heat_maps(points: list[Point], path: Path) -> None:
    """Draws validation loss over learning rate and beta1, a panel per batch size, coloured by the distance to its best."""
    batches = sorted({point.batch for point in points})
    figure, all_axes = plt.subplots(
        1, len(batches), figsize=(4.2 * len(batches), 3.4), layout="constrained", squeeze=False
    )
    for axes, batch in zip(all_axes[0], batches, strict=True):
        shown_points = sorted((point for point in points if point.batch == batch), key=lambda point: _beta1(point))
        rates = sorted({rate for point in shown_points for rate in point.validation})
        grid = [[point.validation.get(rate) for rate in rates] for point in shown_points]
        best = min((value for row in grid for value in row if value is not None), default=0.0)
        image = axes.imshow(
            [[math.nan if value is None else value - best for value in row] for row in grid],
            vmin=0.0, vmax=FARTHEST, cmap="viridis_r", aspect="auto",
        )  # fmt: skip
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                shown = "failed" if value is None else f"{value:.2f}"
                # The cell of a failed run has no colour.
                light = value is None or value - best < FARTHEST / 2
                axes.text(j, i, shown, ha="center", va="center", fontsize=8, color="black" if light else "white")
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(shown_points)), [f"{_beta1(point):g}" for point in shown_points])
        axes.set_xlabel("learning rate")
        axes.set_ylabel("beta1")
        axes.set_title(f"batch {batch}: validation loss", fontsize=10)
    figure.colorbar(image, ax=all_axes[0].tolist(), label="above the best of the panel", extend="max")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _beta1(point: Point) -> float:
    return float(point.name.rpartition("-")[2])


def draw(folder: Path, output: Path) -> None:
    """Writes the table, the picture and the numbers of every suite in `folder`/suites."""
    output.mkdir(parents=True, exist_ok=True)
    text = ["Validation loss, nats a token. In brackets the learning rate, chosen with a seed of its own."]
    everything: dict[tuple[str, int], Point] = {}
    for suite in sorted((folder / "suites").glob("*.yaml")):
        points = load_points(suite, folder)
        everything |= {(point.name, point.batch): point for point in points}
        stem = suite.stem
        record: list[dict[str, Any]] = [asdict(point) for point in points]
        (output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        if stem == "half-life":
            points = with_reference(points)
        if not any(point.shown for point in points):
            continue
        text += [f"## {stem}", load_suite(suite).summary, table(points), f"![{stem}]({stem}.png)"]
        path = output / f"{stem}.png"
        if stem == "robustness":
            heat_maps(points, path)
            continue
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        (dots if stem in BY_NAME else lines_against_batch)(points, axes)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    if (noise := seed_noise(list(everything.values()))) is not None:
        text[0] += (
            f" From one seed to another it varies by {noise[0]:.3f} (standard deviation, told from {noise[1]} variants)."
        )
    (output / "tables.md").write_text("\n\n".join(text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    draw(arguments.folder, arguments.output)


if __name__ == "__main__":
    main()
