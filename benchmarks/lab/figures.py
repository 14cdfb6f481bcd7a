"""Figures and tables of the paper's experiments, from the runs that there are.

    python -m benchmarks.lab.figures runs/lab-cpu --output benchmarks/lab/results/DEVICE

FOLDER holds the runs and, in `suites`, what experiments.py wrote. For each experiment: a table, a picture, and their numbers in
a JSON file. A figure of which no run is done is left out.
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
    """What an optimizer came to at a batch size."""

    name: str
    batch: int
    rate: float | None
    edge: str | None
    loss: Estimate | None
    validation: dict[float, float | None]
    """Loss by learning rate, with the search seed."""
    failed: bool
    """A run of the figure did, or every one of the search for a learning rate."""
    seeds_short: str
    """How many of its seeds the figure is the mean of, where some failed or are missing."""

    @property
    def shown(self) -> Estimate | None:
        """Loss of its seeds; where none is done, that of the search at the rate which it chose."""
        tried = None if self.rate is None else self.validation.get(self.rate)
        return self.loss if self.loss is not None or tried is None else Estimate(tried)


FARTHEST = 1.5
"""Nats above the best where the colours of the heat maps end."""

BY_NAME = ("rounding", "schedule")
"""Experiments whose variants are not points of a line over the batch size."""


def points(suite: Path, folder: Path) -> list[Point]:
    """One for each variant of a suite, whose names end in their batch size."""
    return [_point(row) for row in compare(load_suite(suite), folder).rows if row.task == TASK]


def _point(row: Row) -> Point:
    found = re.fullmatch(r"(.+)-(\d+)", row.variant)
    assert found is not None, row.variant
    tried = {one.learning_rate: None if one.score is None else one.score.mean for one in row.validations()}
    failed = bool(row.failed) or (row.choice.decided and row.choice.rate is None)
    return Point(found[1], int(found[2]), row.choice.rate, row.choice.edge, row.loss, tried, failed, row.seeds_short)


def seed_noise(found: list[Point]) -> tuple[float, int] | None:
    """How far the loss of one seed lies from another's: standard deviation, and number of variants that it is told from.

    Each variant has the run that chose its learning rate and, with other seeds, those of its figure. The median, so that the
    few that hardly train do not decide.
    """
    differences = [
        abs(one.loss.mean - tried) / math.sqrt(1 + 1 / one.loss.count)
        for one in found
        if one.loss is not None and one.rate is not None and (tried := one.validation.get(one.rate)) is not None
    ]
    return (1.4826 * statistics.median(differences), len(differences)) if differences else None


def with_reference(found: list[Point]) -> list[Point]:
    """With the point that both lines of the half-life experiment share: the fixed beta2 has that half-life there, and the two
    are one run."""
    ours, fixed = dict.fromkeys(one.name for one in found)
    made = {one.batch for one in found if one.name == fixed}
    return [*found, *(replace(one, name=fixed) for one in found if one.name == ours and one.batch not in made)]


def lines_against_batch(found: list[Point], axes: Axes) -> None:
    """Loss over batch size, a line for each optimizer."""
    style = looks(list(dict.fromkeys(one.name for one in found)))
    for name in dict.fromkeys(one.name for one in found):
        its = sorted((one for one in found if one.name == name and one.shown is not None), key=lambda one: one.batch)
        if not its:
            continue
        axes.errorbar(
            [one.batch for one in its],
            [one.shown.mean for one in its if one.shown],
            [one.shown.standard_error or 0.0 for one in its if one.shown],
            label=name, color=style[name].colour, marker=style[name].marker, linestyle=style[name].line, capsize=2,
            linewidth=1.2,
        )  # fmt: skip
        searched = [one for one in its if one.loss is None]
        axes.plot(
            [one.batch for one in searched],
            [one.shown.mean for one in searched if one.shown],
            color=style[name].colour, marker=style[name].marker, markerfacecolor="white", linestyle="none", zorder=3,
        )  # fmt: skip
    if any(one.loss is None and one.shown is not None for one in found):
        axes.set_title("hollow: the seed that chose the learning rate", fontsize=8, loc="right")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({one.batch for one in found}), [str(b) for b in sorted({one.batch for one in found})])
    axes.set_xlabel(f"batch size, sequences of {LENGTH} tokens")
    axes.set_ylabel("validation loss, nats a token")
    axes.legend(frameon=False, fontsize=8)


def dots(found: list[Point], axes: Axes) -> None:
    """Loss of each variant."""
    its = [one for one in found if one.shown is not None][::-1]
    axes.errorbar(
        [one.shown.mean for one in its if one.shown],
        range(len(its)),
        xerr=[one.shown.standard_error or 0.0 for one in its if one.shown],
        fmt="o", capsize=2,
    )  # fmt: skip
    axes.set_yticks(range(len(its)), [f"{one.name}-{one.batch}{_seeds(one)}" for one in its])
    axes.set_xlabel("validation loss, nats a token")


def table(found: list[Point]) -> str:
    """Loss of each optimizer at each batch size, its learning rate below."""
    batches = sorted({one.batch for one in found})
    lines = [
        "| optimizer | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "|---" * (len(batches) + 1) + "|",
    ]
    for name in dict.fromkeys(one.name for one in found):
        cells = [next((_cell(one) for one in found if (one.name, one.batch) == (name, batch)), "") for batch in batches]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(one: Point) -> str:
    if one.shown is None:
        return "failed" if one.failed else "not run"
    error = "" if one.shown.standard_error is None else f" ± {one.shown.standard_error:.3f}"
    mark = "" if one.edge is None else f", {one.edge} of its grid"
    return f"{one.shown.mean:.3f}{error}{_seeds(one)} ({one.rate:g}{mark})"


def _seeds(one: Point) -> str:
    return one.seeds_short if one.loss is not None else " (of the search)"


def heat_maps(found: list[Point], path: Path) -> None:
    """Validation loss over learning rate and beta1, a panel for each batch size, coloured by the distance to its best."""
    batches = sorted({one.batch for one in found})
    drawn, all_axes = plt.subplots(
        1, len(batches), figsize=(4.2 * len(batches), 3.4), layout="constrained", squeeze=False
    )
    for axes, batch in zip(all_axes[0], batches, strict=True):
        its = sorted((one for one in found if one.batch == batch), key=lambda one: _beta1(one))
        rates = sorted({rate for one in its for rate in one.validation})
        grid = [[one.validation.get(rate) for rate in rates] for one in its]
        best = min((value for row in grid for value in row if value is not None), default=0.0)
        image = axes.imshow(
            [[math.nan if value is None else value - best for value in row] for row in grid],
            vmin=0.0, vmax=FARTHEST, cmap="viridis_r", aspect="auto",
        )  # fmt: skip
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                shown = "failed" if value is None else f"{value:.2f}"
                # A failed one is not coloured in.
                light = value is None or value - best < FARTHEST / 2
                axes.text(j, i, shown, ha="center", va="center", fontsize=8, color="black" if light else "white")
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(its)), [f"{_beta1(one):g}" for one in its])
        axes.set_xlabel("learning rate")
        axes.set_ylabel("beta1")
        axes.set_title(f"batch {batch}: validation loss", fontsize=10)
    drawn.colorbar(image, ax=all_axes[0].tolist(), label="above the best of the panel", extend="max")
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def _beta1(one: Point) -> float:
    return float(one.name.rpartition("-")[2])


def draw(folder: Path, output: Path) -> None:
    """Write table, picture and records of every suite in `folder`/suites."""
    output.mkdir(parents=True, exist_ok=True)
    text = ["Validation loss, nats a token. In brackets the learning rate, chosen with a seed of its own."]
    everything: dict[tuple[str, int], Point] = {}
    for suite in sorted((folder / "suites").glob("*.yaml")):
        found = points(suite, folder)
        everything |= {(one.name, one.batch): one for one in found}
        stem = suite.stem
        record: list[dict[str, Any]] = [asdict(one) for one in found]
        (output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        if stem == "half-life":
            found = with_reference(found)
        if not any(one.shown for one in found):
            continue
        text += [f"## {stem}", load_suite(suite).summary, table(found), f"![{stem}]({stem}.png)"]
        path = output / f"{stem}.png"
        if stem == "robustness":
            heat_maps(found, path)
            continue
        drawn, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        (dots if stem in BY_NAME else lines_against_batch)(found, axes)
        drawn.savefig(path, dpi=150)
        plt.close(drawn)
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
