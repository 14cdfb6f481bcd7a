"""The pictures of memory by part, of validation scores against learning rates, and of training losses."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from sbft.bench.report.comparison import Comparison, Row
from sbft.bench.report.parts import names_of, parts_of_row
from sbft.bench.report.statistics import Estimate, smoothed
from sbft.bench.report.style import (
    BLUE,
    GREEN,
    ORANGE,
    SKY,
    VERMILLION,
    Look,
    figure,
    literal,
    looks,
    panels,
    settings,
    short,
)
from sbft.bench.report.tables import metric_name
from sbft.native.sizes import GIB, MIB

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHING = 0.1
"""Width of the window that training losses are averaged over, as a share of all tokens."""
_PART_COLOURS = ("#BBBBBB", BLUE, SKY, VERMILLION, ORANGE, GREEN)
_FEW_POINTS = 12


def draw_memory(comparison: Comparison, path: Path) -> bool:
    """Draw the parts of the peak memory, stacked: one bar for each variant. False where none was measured."""
    shown = []
    for title, rows in comparison.groups():
        measured = [(row, parts) for row in rows if (parts := parts_of_row(row)) is not None]
        if measured:
            shown.append((title, measured))
    if not shown:
        return False
    with settings():
        bars = sum(len(measured) for _, measured in shown)
        drawn = figure(0.9 + 0.7 * len(shown) + 0.34 * bars)
        all_axes = panels(drawn, len(shown), 1, sharex=True, height_ratios=[len(m) + 1.0 for _, m in shown])
        highest = max(sum(parts.values()) for _, measured in shown for _, parts in measured)
        for axes, (title, measured) in zip(all_axes, shown, strict=True):
            _stack(axes, measured, highest)
            axes.set(title=literal(title))
        all_axes[-1].set_xlabel(f"peak memory of the training loop, {_unit(highest)[1]}")
        _legend(drawn, all_axes, 3)
        drawn.savefig(path)
    return True


def _unit(highest: float) -> tuple[int, str]:
    return (GIB, "GiB") if highest >= GIB else (MIB, "MiB")


def _stack(axes: Axes, measured: list[tuple[Row, dict[str, float]]], highest: float) -> None:
    size, _ = _unit(highest)
    places = list(range(len(measured)))[::-1]
    begin = [0.0] * len(measured)
    for (part, name), colour in zip(names_of([row for row, _ in measured]).items(), _PART_COLOURS, strict=True):
        lengths = [parts[part] / size for _, parts in measured]
        # A part that no method has is not in the legend.
        if max(lengths) > 0:
            axes.barh(places, lengths, 0.66, left=begin, color=colour, edgecolor="white", linewidth=0.5, label=name)
        begin = [a + b for a, b in zip(begin, lengths, strict=True)]
    for place, total in zip(places, begin, strict=True):
        axes.text(
            total + 0.008 * highest / size, place, f"{total:.{2 if size == GIB else 0}f}", va="center", fontsize=9
        )
    axes.set(yticks=places, xlim=(0, 1.08 * highest / size), ylim=(-0.6, len(places) - 0.4))
    axes.set_yticklabels([short(row.variant) for row, _ in measured])
    axes.tick_params(axis="y", length=0)


def draw_rates(comparison: Comparison, path: Path) -> bool:
    """Draw validation scores against learning rates, a line for each variant. False where there are none."""
    shown = [(title, curves) for title, rows in comparison.groups() if (curves := [r for r in rows if _curve(r)])]
    if not shown:
        return False
    styles = looks(comparison.suite.ordered_methods())
    columns = min(2, len(shown))
    with settings():
        drawn = figure(1.0 + (3.4 if columns == 2 else 3.9) * -(-len(shown) // columns))
        all_axes = panels(drawn, len(shown), columns)
        for axes, (title, rows) in zip(all_axes, shown, strict=True):
            for row in rows:
                _draw_rates(axes, row, styles[row.variant])
            _mark_failures(axes, rows, styles)
            name = metric_name(rows[0].metric)
            axes.set(title=literal(title), xscale="log", xlabel="learning rate")
            axes.set_ylabel(f"{name} on validation{', %' if rows[0].is_share else ' (lower is better)'}")
            axes.grid(alpha=0.25, linewidth=0.6)
        _legend(drawn, all_axes, 4)
        drawn.savefig(path)
    return True


def _curve(row: Row) -> dict[float, Estimate]:
    """Score by learning rate, for rates at which no run failed."""
    return {rate.learning_rate: rate.score for rate in row.validations() if rate.score is not None}


def _draw_rates(axes: Axes, row: Row, look: Look) -> None:
    scale = 100.0 if row.is_share else 1.0
    curve = _curve(row)
    xs, ys = list(curve), [scale * value.mean for value in curve.values()]
    errors = [scale * (value.standard_error or 0.0) for value in curve.values()]
    axes.errorbar(
        xs, ys, yerr=errors if any(errors) else None, capsize=2, color=look.colour, marker=look.marker,
        linestyle=look.line, markersize=5.5, linewidth=1.4, label=short(row.variant),
    )  # fmt: skip
    if row.choice.rate in curve:
        axes.plot(
            row.choice.rate, scale * curve[row.choice.rate].mean, marker="o", markersize=12, fillstyle="none",
            color=look.colour, markeredgewidth=1.3,
        )  # fmt: skip


def _mark_failures(axes: Axes, rows: list[Row], styles: dict[str, Look]) -> None:
    """Draw a cross at the lower edge for each rate at which a run failed; crosses at the same rate are stacked."""
    seen: dict[float, int] = {}
    for row in rows:
        for rate in [validation.learning_rate for validation in row.validations() if validation.failure]:
            height = 0.03 + 0.045 * seen.setdefault(rate, 0)
            seen[rate] += 1
            axes.plot(
                rate, height, marker="x", color=styles[row.variant].colour, markersize=6, markeredgewidth=1.8,
                transform=axes.get_xaxis_transform(), clip_on=False,
            )  # fmt: skip


def draw_losses(comparison: Comparison, path: Path) -> bool:
    """Draw the training losses of the test runs by tokens, a line for each variant. False where there are none."""
    shown = [(title, curves) for title, rows in comparison.groups() if (curves := [r for r in rows if _losses(r)[0]])]
    if not shown:
        return False
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    styles = looks(comparison.suite.ordered_methods())
    columns = min(2, len(shown))
    with settings():
        drawn = figure(1.0 + (3.4 if columns == 2 else 3.9) * -(-len(shown) // columns))
        all_axes = panels(drawn, len(shown), columns)
        for axes, (title, rows) in zip(all_axes, shown, strict=True):
            values: list[float] = []
            for row in rows:
                tokens, losses = _losses(row)
                look, curve = styles[row.variant], smoothed(tokens, losses, SMOOTHING)
                values += curve
                axes.plot(
                    tokens, curve, color=look.colour, linestyle=look.line, linewidth=1.5, label=short(row.variant),
                    marker=look.marker, markersize=5, markevery=max(1, len(tokens) // _FEW_POINTS),
                )  # fmt: skip
            axes.set(title=literal(title), xlabel="tokens seen", ylabel="training loss, smoothed")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            if min(values) > 0 and max(values) > 5 * min(values):
                _log_scale(axes)
            axes.grid(alpha=0.25, linewidth=0.6)
        _legend(drawn, all_axes, 4)
        drawn.savefig(path)
    return True


def _log_scale(axes: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _losses(row: Row) -> tuple[list[float], list[float]]:
    """Tokens and losses of the logged steps, the mean over the seeds that logged the same steps as the first."""
    histories = [record.history for record in row.records if record.history]
    if not histories:
        return [], []
    steps = [entry["step"] for entry in histories[0]]
    alike = [history for history in histories if [entry["step"] for entry in history] == steps]
    # A record has None for a loss that was not finite.
    finite = [i for i in range(len(steps)) if all(history[i]["loss"] is not None for history in alike)]
    return (
        [fmean(history[i]["tokens"] for history in alike) for i in finite],
        [fmean(history[i]["loss"] for history in alike) for i in finite],
    )


def _legend(drawn: Figure, all_axes: list[Axes], columns: int) -> None:
    """One legend below all panels."""
    artists: dict[str, Artist] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            artists.setdefault(label, handle)
    drawn.legend(
        list(artists.values()),
        list(artists),
        loc="outside lower center",
        ncols=min(columns, len(artists)),
        frameon=False,
    )
