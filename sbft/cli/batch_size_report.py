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

# Shown in the column of tokens, which is wide enough.
_NO_FIGURE = {"out of memory": "out of memory", "over the limit": "over limit", "would not fit": "not run"}


def print_batch_sizes(console: Console, result: BatchSizes, command: str) -> None:
    """Print the curve, the answer, and what to type."""
    console.print()
    console.print(_table(result))
    console.print(f"\n{_answer(result)} {_why_it_ended(result)}", markup=False)
    for note in result.settings.notes:
        console.print(f"\n{note}", markup=False)
    # Wrapped only by the terminal, so that it can be copied as one line.
    console.print(f"\n{command}", markup=False, style="bold", soft_wrap=True)
    console.print()


def _table(result: BatchSizes) -> Table:
    timed = result.curve.timed
    columns = ["batch size", "tokens/step", "ms/step", "tokens/s", "share", "peak GiB"]
    with_flops = all(measured.flops_per_step is not None for measured in timed)
    with_mfu = with_flops and result.peak_flops is not None
    columns += ["TFLOP/s"] * with_flops + ["MFU"] * with_mfu
    table = Table(box=None, pad_edge=False, caption_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    best = result.curve.best()
    for measured in timed:
        cells = [
            str(measured.batch_size),
            f"{measured.tokens_per_step:.0f}",
            f"{1e3 * measured.step_s:.{0 if measured.step_s >= 0.1 else 1}f}",
            f"{measured.tokens_per_s:,.0f}",
            f"{100 * measured.tokens_per_s / best.tokens_per_s:.0f} %",
            f"{measured.peak_bytes / GIB:.2f}",
        ]
        if with_flops:
            cells.append(_teraflops(measured))
        mfu = result.mfu(measured)
        if mfu is not None:
            cells.append(f"{100 * mfu:.1f} %")
        table.add_row(*cells, style="bold" if measured == result.recommended else None)
    ending = result.curve.ending
    if ending.batch_size is not None:
        needed = "" if ending.needed_bytes is None else f"{ending.needed_bytes / GIB:.2f}"
        about = "~" if ending.reason == "would not fit" else ""
        table.add_row(str(ending.batch_size), _NO_FIGURE[ending.reason], "", "", "", about + needed, style="dim")
    return table


def _teraflops(measured: Timed) -> str:
    rate = (measured.flops_per_step or 0.0) / measured.step_s / 1e12
    return f"{rate:.{1 if rate >= 10 else 3}f}"


def _answer(result: BatchSizes) -> str:
    answer, best = result.recommended, result.curve.best()
    of_best = (
        "the best seen"
        if answer == best
        else f"{100 * answer.tokens_per_s / best.tokens_per_s:.0f} % of the best seen, at {best.batch_size}"
    )
    what = "the fastest that ran" if _may_rise(result) else "the smallest at full throughput"
    return (
        f"Batch size {answer.batch_size} is {what}: {answer.tokens_per_s:,.0f} tokens/s, {of_best}, on {result.device}."
    )


def _may_rise(result: BatchSizes) -> bool:
    """Whether the search ended before it was clear that larger sizes are no faster."""
    return result.curve.ending.reason != "no gain" and result.recommended == result.curve.timed[-1]


def _why_it_ended(result: BatchSizes) -> str:
    ending = result.curve.ending
    limit = "" if result.limit_bytes is None else gib(result.limit_bytes)
    needed = gib(ending.needed_bytes or 0)
    higher = " A larger one may be faster still." if _may_rise(result) else ""
    return {
        "no gain": (
            "Larger ones were not tried, because two doublings in a row gained no more than "
            f"{100 * (1 / result.share - 1):.0f} %."
        ),
        "largest": f"--max-batch-size ended the search.{higher}",
        "out of memory": f"At {ending.batch_size}, memory ran out.{higher}",
        "over the limit": f"Batch size {ending.batch_size} took {needed}, and {limit} is the limit.{higher}",
        "would not fit": (
            f"Batch size {ending.batch_size} was not run: it would need about {needed}, and {limit} is the "
            f"limit.{higher}"
        ),
    }[ending.reason]


def draw_batch_sizes(result: BatchSizes, path: Path) -> None:
    """Draw both curves, side by side.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    timed, recommended = result.curve.timed, result.recommended
    sizes = [measured.batch_size for measured in timed]
    with settings():
        drawn = figure(3.7)
        speed, memory = panels(drawn, 2, 2)
        speed.plot(sizes, [measured.tokens_per_s for measured in timed], color=BLUE, marker="o", linewidth=1.4)
        speed.plot(
            recommended.batch_size, recommended.tokens_per_s, "o", markersize=12, fillstyle="none", color=BLUE,
            label=f"chosen: {recommended.batch_size}",
        )  # fmt: skip
        enough = result.share * result.curve.best().tokens_per_s
        speed.axhline(enough, color=GREY, linestyle="--", linewidth=1, label=f"{100 * result.share:g} % of the best")
        speed.legend(frameon=False, loc="lower right")
        speed.set(ylabel="tokens/s", title="throughput")
        memory.plot(
            sizes, [measured.peak_bytes / GIB for measured in timed], color=VERMILLION, marker="s", linewidth=1.4
        )
        memory.set(ylabel="GiB", title="peak memory")
        _limit(result, memory)
        for axes in (speed, memory):
            axes.set_xscale("log", base=2)
            axes.set(xlabel="batch size, examples", xticks=sizes, xticklabels=sizes)
            axes.tick_params(axis="x", labelsize=8.5)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25, linewidth=0.6)
        drawn.suptitle(f"{result.recipe.model}, {result.recipe.method}, on {result.device}", fontsize=11)
        drawn.savefig(path)


def _limit(result: BatchSizes, axes: Axes) -> None:
    """The memory limit, where it was what ended the search."""
    if result.limit_bytes is not None and result.curve.ending.reason in ("over the limit", "would not fit"):
        axes.axhline(result.limit_bytes / GIB, color=GREY, linestyle="--", linewidth=1, label="limit")
        axes.legend(frameon=False, loc="center left")
