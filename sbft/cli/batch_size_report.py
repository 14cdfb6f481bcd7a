"""What `sbft batch-size` measured: the curve as a table and a picture, the answer, and the command that uses it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from sbft.bench.report.style import BLUE, GREY, VERMILLION, figure, panels, settings
from sbft.native.sizes import GIB, gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from sbft.planning.batch_size.curve import Timed
    from sbft.planning.batch_size.search import BatchSizes

# In the column of tokens, which is as wide.
_NO_FIGURE = {"out of memory": "out of memory", "over the limit": "over limit", "would not fit": "not run"}


def print_batch_sizes(console: Console, found: BatchSizes, command: str) -> None:
    """Print the curve, the answer, and what to type."""
    console.print()
    console.print(_table(found))
    console.print(f"\n{_answer(found)} {_why_it_ended(found)}", markup=False)
    for note in found.settings.notes:
        console.print(f"\n{note}", markup=False)
    # Wrapped by the terminal alone, so that it can be copied as one line.
    console.print(f"\n{command}", markup=False, style="bold", soft_wrap=True)
    console.print()


def _table(found: BatchSizes) -> Table:
    timed = found.curve.timed
    columns = ["batch size", "tokens a step", "ms a step", "tokens/s", "share", "peak GiB"]
    with_flops = all(one.flops_per_step is not None for one in timed)
    with_mfu = with_flops and found.peak_flops is not None
    columns += ["TFLOP/s"] * with_flops + ["MFU"] * with_mfu
    table = Table(box=None, pad_edge=False, caption_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    best = found.curve.best()
    for one in timed:
        cells = [
            str(one.batch_size),
            f"{one.tokens_per_step:.0f}",
            f"{1e3 * one.step_s:.{0 if one.step_s >= 0.1 else 1}f}",
            f"{one.tokens_per_s:,.0f}",
            f"{100 * one.tokens_per_s / best.tokens_per_s:.0f} %",
            f"{one.peak_bytes / GIB:.2f}",
        ]
        if with_flops:
            cells.append(_teraflops(one))
        mfu = found.mfu(one)
        if mfu is not None:
            cells.append(f"{100 * mfu:.1f} %")
        table.add_row(*cells, style="bold" if one == found.chosen else None)
    ending = found.curve.ending
    if ending.batch_size is not None:
        needed = "" if ending.needed_bytes is None else f"{ending.needed_bytes / GIB:.2f}"
        about = "~" if ending.reason == "would not fit" else ""
        table.add_row(str(ending.batch_size), _NO_FIGURE[ending.reason], "", "", "", about + needed, style="dim")
    return table


def _teraflops(one: Timed) -> str:
    rate = (one.flops_per_step or 0.0) / one.step_s / 1e12
    return f"{rate:.{1 if rate >= 10 else 3}f}"


def _answer(found: BatchSizes) -> str:
    chosen, best = found.chosen, found.curve.best()
    of_best = (
        "the best seen"
        if chosen == best
        else f"{100 * chosen.tokens_per_s / best.tokens_per_s:.0f} % of the best seen, at {best.batch_size}"
    )
    what = "the fastest that ran" if _may_rise(found) else "the smallest at full throughput"
    return (
        f"Batch size {chosen.batch_size} is {what}: {chosen.tokens_per_s:,.0f} tokens/s, {of_best}, on {found.device}."
    )


def _may_rise(found: BatchSizes) -> bool:
    """Whether the search was cut off before anything showed that larger sizes are no faster."""
    return found.curve.ending.reason != "no gain" and found.chosen == found.curve.timed[-1]


def _why_it_ended(found: BatchSizes) -> str:
    ending = found.curve.ending
    limit = "" if found.limit_bytes is None else gib(found.limit_bytes)
    needed = gib(ending.needed_bytes or 0)
    higher = " A larger one may be faster still." if _may_rise(found) else ""
    return {
        "no gain": (
            "Larger ones were not tried, as two doublings in a row had brought no more than "
            f"{100 * (1 / found.share - 1):.0f} %."
        ),
        "largest": f"--max-batch-size ended the search.{higher}",
        "out of memory": f"At {ending.batch_size}, memory ran out.{higher}",
        "over the limit": f"Batch size {ending.batch_size} took {needed}, and {limit} is the limit.{higher}",
        "would not fit": (
            f"Batch size {ending.batch_size} was not run: it would need about {needed}, and {limit} is the "
            f"limit.{higher}"
        ),
    }[ending.reason]


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
        memory.plot(sizes, [one.peak_bytes / GIB for one in timed], color=VERMILLION, marker="s", linewidth=1.4)
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
        axes.axhline(found.limit_bytes / GIB, color=GREY, linestyle="--", linewidth=1, label="limit")
        axes.legend(frameon=False, loc="center left")
