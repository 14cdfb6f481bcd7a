"""The picture of score against peak memory, with error bars and the Pareto front: one panel for each task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sbft.bench.report.comparison import Comparison, Row
from sbft.bench.report.labels import Box, Named, place
from sbft.bench.report.style import GREY, Look, figure, literal, looks, panels, settings, short
from sbft.bench.report.tables import front, metric_name
from sbft.native.sizes import GIB

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LABEL_SIZE = 9.0
_PANEL_HEIGHT = 3.7


def draw_scatter(comparison: Comparison, path: Path) -> list[list[Box]] | None:
    """Draw the picture, unless no row has both score and memory.

    Returns:
        The boxes of the names in each panel, in pixels; None if nothing was drawn.
    """
    shown = [(title, placed) for title, rows in comparison.groups() if (placed := _placed(rows))]
    if not shown:
        return None
    styles = looks(comparison.suite.ordered_methods())
    with settings():
        drawn = figure(_PANEL_HEIGHT * len(shown))
        all_axes = panels(drawn, len(shown), 1)
        named = [_draw(axes, title, rows, styles) for axes, (title, rows) in zip(all_axes, shown, strict=True)]
        drawn.draw_without_rendering()
        drawn.set_layout_engine("none")
        boxes = [
            place(axes, points, _LABEL_SIZE, stairs) for axes, (points, stairs) in zip(all_axes, named, strict=True)
        ]
        drawn.savefig(path)
    return boxes


def _placed(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.peak_bytes is not None and row.score is not None]


def _draw(axes: Axes, title: str, rows: list[Row], styles: dict[str, Look]) -> tuple[list[Named], list[Box]]:
    """Draw points and front of one panel; returns the points to name, and the lines of the front."""
    scale = 100.0 if rows[0].is_share else 1.0
    points = []
    for row in rows:
        score, memory, look = row.score, row.peak_bytes, styles[row.variant]
        assert score is not None and memory is not None
        error = scale * (score.standard_error or 0.0)
        x, y = memory / GIB, scale * score.mean
        axes.errorbar(
            x,
            y,
            yerr=error or None,
            fmt=look.marker,
            color=look.colour,
            markersize=9.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            capsize=3,
            elinewidth=1.3,
            zorder=3,
        )
        points.append(Named(x, y, short(row.variant) + row.seeds_short, look.colour, error))
    _limits(axes, points)
    best = front(rows)
    stairs = _draw_front(axes, best, scale) if best else []
    name = metric_name(rows[0].metric)
    axes.set(title=literal(title), xlabel="peak memory of the training loop, GiB")
    axes.set_ylabel(f"{name}, %" if rows[0].is_share else f"{name} (lower is better)")
    axes.grid(alpha=0.25, linewidth=0.6)
    return points, stairs


def _limits(axes: Axes, points: list[Named]) -> None:
    """Leave space around the points for their names."""
    left, right = min(point.x for point in points), max(point.x for point in points)
    low, high = min(point.y - point.error for point in points), max(point.y + point.error for point in points)
    across, up = (right - left) or 0.2 * right or 1.0, (high - low) or 0.2 * abs(high) or 1.0
    axes.set(xlim=(left - 0.12 * across, right + 0.22 * across), ylim=(low - 0.15 * up, high + 0.15 * up))


def _draw_front(axes: Axes, rows: list[Row], scale: float) -> list[Box]:
    """Draw the front as a step function: the best score for each amount of memory. It continues to the right edge."""
    at = [(row.peak_bytes / GIB, scale * row.score.mean) for row in rows if row.peak_bytes and row.score]
    worst = axes.get_ylim()[0 if rows[0].is_share else 1]
    xs = [at[0][0], *(x for x, _ in at), axes.get_xlim()[1]]
    ys = [worst, *(y for _, y in at), at[-1][1]]
    axes.step(xs, ys, where="post", color=GREY, linestyle="--", linewidth=1.2, zorder=1, label="Pareto front")
    # The front leaves this corner free.
    axes.legend(loc="lower right" if rows[0].is_share else "upper right", frameon=False)
    level = [(xs[i], ys[i], xs[i + 1], ys[i]) for i in range(len(xs) - 1)]
    upright = [(xs[i], ys[i - 1], xs[i], ys[i]) for i in range(1, len(xs))]
    return [*level, *upright]
