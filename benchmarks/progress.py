"""The progress bar of a run, in units of work, with the current task and the time that is left."""

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar(Progress):
    """A context with a bar over ``total`` units of work; on anything but a terminal it shows nothing."""

    def __init__(self, total: float) -> None:
        columns = (
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        super().__init__(*columns, transient=True)
        self.add_task("", total=total)

    def show(self, doing: str | None, finished: float) -> None:
        """``doing``: None for the same as before; ``finished``: units since the last call."""
        self.update(self.task_ids[0], description=doing, advance=finished)

    def show_total(self, doing: str, finished: float) -> None:
        self.update(self.task_ids[0], description=doing, completed=finished)
