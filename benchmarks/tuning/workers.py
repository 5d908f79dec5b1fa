"""Processes that train, each one trial after another. Only they import torch; the storage is their parent's alone.

A worker ends when its parent does, however that came about: its pipe is then closed at the other end.
"""

import contextlib
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from benchmarks.tuning.results import Trial
from benchmarks.tuning.settings import Point, Settings

# A worker is killed if it has not ended so long after it was asked to.
PATIENCE_S = 5.0
KEPT_FROM_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class WorkerError(Exception):
    """A worker died, or its code raised; the message is one line."""


@dataclass(frozen=True)
class Ready:
    machine: dict[str, Any]


@dataclass(frozen=True)
class Progress:
    step: int
    loss: float


@dataclass(frozen=True)
class Failure:
    trace: str


Message = Ready | Progress | Trial | Failure


def work(pipe: Connection, settings: Settings) -> None:
    """The worker's main function."""
    # Ended by the pipe's end alone; and nothing of what other processes' signals interrupt is left half done.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            _work(pipe, settings)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception:
            pipe.send(Failure(traceback.format_exc()))


def _work(pipe: Connection, settings: Settings) -> None:
    import torch

    from benchmarks.provenance import provenance
    from benchmarks.tuning.training import train

    torch.set_num_threads(1)
    pipe.send(Ready(asdict(provenance(threads=1))))
    while True:
        point: Point = pipe.recv()
        pipe.send(train(settings, point, lambda step, loss: pipe.send(Progress(step, loss))))


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """A process started meanwhile never sees them: Ctrl-C reaches all of a terminal's processes, and what becomes of
    the workers is the parent's to say."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_FROM_WORKERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Worker:
    def __init__(self, settings: Settings) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, settings), daemon=True)
        with _signals_blocked():
            self.process.start()
        theirs.close()

    def start(self, point: Point) -> None:
        # If it has just died, the next receive() says so.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(point)

    def receive(self) -> Message:
        try:
            message: Message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join(PATIENCE_S)
            raise WorkerError(f"a worker died (exit status {self.process.exitcode})") from None
        return message


class Workers:
    """A context; on leaving it no worker is left."""

    def __init__(self, count: int, settings: Settings) -> None:
        self._count = count
        self._settings = settings
        self._workers: list[Worker] = []

    def __enter__(self) -> "Workers":
        # Starting it unblocks signals in this thread, so it has to be there before a worker is started.
        resource_tracker.ensure_running()
        try:
            for _ in range(self._count):
                self._workers.append(Worker(self._settings))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers)

    def messages(self, timeout_s: float) -> Iterator[tuple[Worker, Message]]:
        """What the workers have to say; waits for the first for `timeout_s` at most."""
        talking = wait([worker.pipe for worker in self._workers], timeout_s)
        for worker in self._workers:
            if worker.pipe in talking:
                yield worker, worker.receive()

    def close(self) -> None:
        for worker in self._workers:
            worker.pipe.close()
            # They block SIGTERM, and there is nothing in a worker that would have to be put in order.
            worker.process.kill()
        for worker in self._workers:
            worker.process.join(PATIENCE_S)
            worker.process.close()
        self._workers.clear()


def thread_limits() -> dict[str, str]:
    """For the environment: as each worker has a core, no library starts threads of its own."""
    return {
        name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS") if name not in os.environ
    }
