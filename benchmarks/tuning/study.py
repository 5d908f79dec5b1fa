"""Runs a study: hands the open points to the workers until every point of the grid has a result."""

import os
import random
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType

from benchmarks.tuning.display import Display, Running
from benchmarks.tuning.results import Trial
from benchmarks.tuning.settings import Settings
from benchmarks.tuning.storage import Claim, SharedStudy
from benchmarks.tuning.workers import Failure, Message, Progress, Ready, Worker, WorkerError, Workers, thread_limits

# How often the storage is asked what others did, at the least; and how long a look at the workers may take.
POLL_S = 0.5
TICK_S = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """Inside, a signal to end is noted and nothing is torn in the middle; the same signal again ends at once."""

    def __init__(self) -> None:
        self.came: int | None = None

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.came = number
        signal.signal(number, self._before[signal.Signals(number)])

    def __enter__(self) -> "Interrupts":
        # Under nohup, a terminal's end is to be ignored.
        heard = [number for number in SIGNALS if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN)]
        self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Run:
    """One process's part in a study."""

    def __init__(self, study: SharedStudy, display: Display) -> None:
        self._study = study
        self._display = display
        self._claims: dict[Worker, Claim] = {}
        self._running: dict[Worker, Running] = {}
        self._ready: set[Worker] = set()

    def to_the_end(self, workers: Workers, stopped: Callable[[], bool]) -> None:
        """Until every point has a result, here or elsewhere, or `stopped` says so."""
        total = len(self._study.settings.points)
        done = elsewhere = 0
        asked = -POLL_S
        try:
            while not stopped():
                if time.monotonic() - asked >= POLL_S:
                    done, elsewhere = self._study.done(), self._study.reopen_abandoned()
                    if done == total:
                        return
                    self._hand_out(workers)
                    asked = time.monotonic()
                self._display.show(done, self._running.values(), elsewhere)
                for worker, message in workers.messages(TICK_S * random.uniform(0.5, 1.5)):
                    if self._take(worker, message):
                        asked = -POLL_S
                self._study.beat()
        finally:
            self._study.give_up_all()

    def _hand_out(self, workers: Workers) -> None:
        for worker in workers:
            if worker not in self._ready or worker in self._claims:
                continue
            claim = self._study.claim()
            if claim is None:
                return
            self._claims[worker] = claim
            self._running[worker] = Running(claim.point)
            worker.start(claim.point)

    def _take(self, worker: Worker, message: Message) -> bool:
        """What a worker said; tells whether it waits for a point now."""
        match message:
            case Progress(step, loss):
                self._running[worker].step = step
                self._running[worker].losses.append(loss)
                return False
            case Ready(machine):
                self._ready.add(worker)
                self._study.add_machine(machine)
            case Trial():
                self._study.finish(self._claims.pop(worker), message)
                del self._running[worker]
            case Failure(trace):
                where = self._claims[worker].point if worker in self._claims else "its start"
                raise WorkerError(f"a worker failed at {where}: {trace.strip().splitlines()[-1]}")
        return True


def run(study: SharedStudy, jobs: int) -> int | None:
    """Runs the study with `jobs` workers; the number of the signal that ended it early, if one did."""
    settings: Settings = study.settings
    with Interrupts() as interrupts:
        os.environ.update(thread_limits())
        missing = len(settings.points) - study.done()
        if missing:
            with (
                Workers(min(jobs, missing), settings) as workers,
                Display(len(settings.points), settings.steps) as display,
            ):
                Run(study, display).to_the_end(workers, lambda: interrupts.came is not None)
    return interrupts.came
