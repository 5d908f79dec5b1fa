"""The study while it runs: the trials in work with their losses, and a bar over all trials. Only on a terminal."""

# The names of the study are Greek, and signs in what people read are the right ones.
# ruff: noqa: RUF001

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.tuning.settings import Point

REFRESH_S = 0.1
SPARKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 36


@dataclass
class Running:
    """A trial in work."""

    point: Point
    step: int = 0
    losses: list[float] = field(default_factory=list)


def spark(values: list[float]) -> str:
    """The last values as a line of blocks, from the lowest to the highest of them."""
    values = values[-SPARK_WIDTH:]
    low, high = min(values, default=0), max(values, default=0)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)


class Display:
    def __init__(self, total: int, steps: int, console: Console | None = None) -> None:
        self._steps = steps
        self._shown = -REFRESH_S
        self._bar = Progress(
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("trials"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._task = self._bar.add_task("", total=total)
        console = console or Console()
        self._live = Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> "Display":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, done: int, running: Iterable[Running], elsewhere: int) -> None:
        now = time.monotonic()
        if self._live is None or now - self._shown < REFRESH_S:
            return
        self._shown = now
        note = f"{elsewhere} more in work elsewhere" if elsewhere else ""
        self._bar.update(self._task, completed=done, description=note)
        self._live.update(self.picture(running), refresh=True)

    def picture(self, running: Iterable[Running]) -> RenderableType:
        table = Table(box=None, padding=(0, 2, 0, 0))
        for header in ("α", "β", "batch norm", "seed", "step", "loss"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for trial in running:
            point = trial.point
            table.add_row(
                f"{point.alpha:g}",
                f"{point.beta:g}",
                "with" if point.batch_norm else "without",
                f"{point.seed}",
                f"{trial.step}/{self._steps}",
                f"{trial.losses[-1]:.3g}" if trial.losses else "",
                spark(trial.losses),
            )
        return Group(table, self._bar)
