"""The progress bar of a run: by work, with what is being done and the time that is left."""

from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """A bar over ``total`` units of work; on anything but a terminal it shows nothing."""

    def __init__(self, total: int) -> None:
        columns = (
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        self._progress = Progress(*columns, transient=True)
        self._task = self._progress.add_task("", total=total)

    def advance(self, doing: str, finished: int) -> None:
        self._progress.update(self._task, description=doing, advance=finished)

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
