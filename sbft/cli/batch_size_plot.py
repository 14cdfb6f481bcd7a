"""The picture of `sbft batch-size`: throughput and memory by batch size, the chosen one marked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sbft.bench.report.style import BLUE, GREY, VERMILLION, figure, panels, settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbft.planning.batch_size import BatchSizes

_GIB = 2**30


def draw_batch_sizes(found: BatchSizes, path: Path) -> None:
    """Draw both curves, side by side.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    timed, chosen = found.curve.timed, found.chosen
    sizes = [one.batch_size for one in timed]
    with settings():
        drawn = figure(3.7)
        speed, memory = panels(drawn, 2, 2)
        speed.plot(sizes, [one.tokens_per_s for one in timed], color=BLUE, marker="o", linewidth=1.4)
        speed.plot(
            chosen.batch_size, chosen.tokens_per_s, "o", markersize=12, fillstyle="none", color=BLUE,
            label=f"chosen: {chosen.batch_size}",
        )  # fmt: skip
        enough = found.share * found.curve.best().tokens_per_s
        speed.axhline(enough, color=GREY, linestyle="--", linewidth=1, label=f"{100 * found.share:g} % of the best")
        speed.legend(frameon=False, loc="lower right")
        speed.set(ylabel="tokens/s", title="throughput")
        memory.plot(sizes, [one.peak_bytes / _GIB for one in timed], color=VERMILLION, marker="s", linewidth=1.4)
        memory.set(ylabel="GiB", title="peak memory")
        _limit(found, memory)
        for axes in (speed, memory):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="batch size, examples", xticks=sizes, xticklabels=sizes)
            axes.tick_params(axis="x", labelsize=8.5)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25, linewidth=0.6)
        drawn.suptitle(f"{found.recipe.model}, {found.recipe.method}, on {found.device}", fontsize=11)
        drawn.savefig(path)


def _limit(found: BatchSizes, axes: Axes) -> None:
    """The memory limit, where it was what ended the search."""
    if found.limit_bytes is not None and found.curve.ending.reason in ("over the limit", "would not fit"):
        axes.axhline(found.limit_bytes / _GIB, color=GREY, linestyle="--", linewidth=1, label="limit")
        axes.legend(frameon=False, loc="center left")
