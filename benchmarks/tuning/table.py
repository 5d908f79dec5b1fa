"""The table: how much of the grid trains, how well, how fast; as cells, for the terminal and for Markdown."""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.tuning.analysis import GOAL, Side, effects, side
from benchmarks.tuning.results import Results

HEADERS = (
    "",
    f"≥ {GOAL:g} % at the end",
    "of the grid",
    "at some time",
    "diverged",
    "best",
    "at α, β",
    f"steps to {GOAL:g} %",
    "fewest",
)
WIDTH = 120
MOVE_HEADERS = ("β", "α", "without", "its seeds", "with", "its seeds")


def sides(results: Results) -> list[list[str]]:
    return [_cells(side(results, batch_norm)) for batch_norm in (False, True)]


def _cells(found: Side) -> list[str]:
    best = found.best
    return [
        "with batch norm" if found.batch_norm else "without",
        f"{found.at_goal} of {found.trials}",
        f"{100 * found.share:.0f} %",
        f"{found.reached}",
        f"{found.diverged}",
        f"{best.accuracy:.1f} %" if best else "",
        f"{best.alpha:g}, {best.beta:g}" if best else "",
        f"{found.steps:.0f}" if found.steps is not None else "",
        f"{found.fewest_steps}" if found.fewest_steps is not None else "",
    ]


def moves(results: Results) -> list[list[str]]:
    """A line a move and α: the change without and with batch norm, each beside what another seed changes."""
    found = {(e.move, e.alpha, e.batch_norm): e for e in effects(results)}
    lines = []
    for move, alpha in dict.fromkeys(key[:2] for key in found):
        cells = [f"{move[0]:g} → {move[1]:g}", f"{alpha:g}"]
        for batch_norm in (False, True):
            effect = found.get((move, alpha, batch_norm))
            cells.append(f"{effect.change:.2f}" if effect else "")
            cells.append(f"{effect.spread:.2f}" if effect and effect.spread is not None else "")
        lines.append(cells)
    return lines


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["--:"] * (len(headers) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headers, ruler, *lines))


def print_table(results: Results) -> None:
    table = Table(box=box.SIMPLE)
    for header in HEADERS:
        table.add_column(header, justify="right" if header else "left", no_wrap=not header)
    for cells in sides(results):
        table.add_row(*cells)
    console = Console()
    # What is not a terminal has no width to keep to.
    (console if console.is_terminal else Console(width=WIDTH)).print(table)
