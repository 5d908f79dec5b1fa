"""The style of all pictures: sizes, colours that the colour-blind can tell apart, and the file format."""

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.rows import write_atomically

# Of Okabe and Ito's palette: they differ in lightness as well.
BLUE, SKY, ORANGE, BLACK = "#0072b2", "#7fc4ee", "#d55e00", "#222222"

WIDTH_INCHES = 8.0
DOTS_PER_INCH = 100  # 800 pixels in all
TITLE, LABEL, NUMBER = 11, 9.5, 8.5  # points


def panels(height: float, lines: int = 1, columns: int = 1, width: float = WIDTH_INCHES, **options: Any) -> Any:
    """A figure and its axes, (lines, columns); without pyplot, which needs a window system and keeps state."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes: np.ndarray = figure.subplots(lines, columns, squeeze=False, **options)
    for panel in axes.flat:
        panel.tick_params(labelsize=LABEL)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def ratio_axis(axes: Axes) -> None:
    """Logarithmic, so that twice as fast and half as fast are equally far from the line at 1."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.axvline(1, color=BLACK, linewidth=0.8)


def bar(axes: Axes, position: float, ratio: float, colour: str, height: float, beyond: float = 1.0) -> None:
    """A bar from 1, and its number, to the right of it and of ``beyond``."""
    axes.barh(position, ratio - 1, left=1, color=colour, height=height)
    place = (max(ratio, beyond), position)
    style = {"va": "center", "fontsize": NUMBER}
    axes.annotate(f"{ratio:.2f}", place, (4, 0), textcoords="offset points", **style)


def save(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH)
    write_atomically(path, buffer.getvalue())
