"""The style of all pictures: size, colours that the colour-blind can distinguish, and a look for each variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito without yellow, which is hard to see on white.
BLUE, VERMILLION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#000000", "#8C8C8C"
_COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
# Their number and that of the colours have no common factor, so a pair only recurs after all others.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p")
_LINES = ("-", "--", ":", "-.")
WIDTH, _DOTS = 9.0, 150
_LONGEST_NAME = 34
_SETTINGS: dict[Any, Any] = {"font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9.5}


@dataclass(frozen=True)
class Look:
    """How a variant is drawn in every picture."""

    colour: str
    marker: str
    line: str


def looks(variants: Sequence[str]) -> dict[str, Look]:
    """A look for each variant, by its position among the suite's variants."""
    return {
        name: Look(_COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)], _LINES[i // len(_COLOURS) % len(_LINES)])
        for i, name in enumerate(variants)
    }


def short(name: str) -> str:
    """Shorten a name to fit beside a picture."""
    return literal(name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…")


def literal(text: str) -> str:
    """Escape dollar signs, which would otherwise start a formula in a picture."""
    return text.replace("$", r"\$")


def figure(height: float) -> Figure:
    """An empty figure, as wide as a README page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_SETTINGS):
        drawn = Figure(figsize=(WIDTH, height), dpi=_DOTS, layout="constrained")
        FigureCanvasAgg(drawn)
    return drawn


def settings() -> Any:
    """A context that sets the pictures' font sizes."""
    from matplotlib import rc_context

    return rc_context(_SETTINGS)


def panels(drawn: Figure, count: int, columns: int, **shared: Any) -> list[Axes]:
    """Divide a figure into `count` panels; positions left over stay empty."""
    rows = -(-count // columns)
    all_axes = drawn.subplots(rows, columns, squeeze=False, **shared).flatten().tolist()
    for axes in all_axes[count:]:
        axes.set_axis_off()
    for axes in all_axes[:count]:
        axes.spines[["top", "right"]].set_visible(False)
    return list(all_axes[:count])
