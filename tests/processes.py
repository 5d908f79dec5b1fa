"""Groups of processes over loopback, for tests of what several of them do together.

Importing torch takes seconds, so the workers of a `Pool` stay and are handed one job after the other: a function of a
module that they can import, called with the worker's `World` and the job's arguments. A worker ends with the test
process, however that ended.

No call waits forever: collectives have the group's timeout, and a job has a deadline. When a worker dies or does not
answer, all of them are killed, and the next job starts new ones.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from torch_warnings import all_but_torchs_own_are_errors

START_TIMEOUT = 120.0
# The seconds that the other workers get to finish once one has failed.
GRACE = 3.0


class World(NamedTuple):
    """The process group as a job sees it."""

    rank: int
    size: int


class WorkerError(AssertionError):
    """What went wrong in which worker, with its traceback."""


class _Worker:
    def __init__(self, rank: int, size: int, folder: Path, group_timeout: float) -> None:
        self.rank, self.log = rank, folder / f"rank{rank}.log"
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(
            target=_serve, args=(theirs, World(rank, size), folder, group_timeout), daemon=True
        )
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def where(self) -> str:
        """The stacks of this worker, which does not answer, and what it printed."""
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self.printed()

    def exit_code(self) -> int | None:
        self.process.join(GRACE)
        return self.process.exitcode

    def printed(self) -> str:
        return self.log.read_text(errors="replace")[-4000:] if self.log.exists() else ""


class Pool:
    """`size` workers with one gloo group, started when they are needed."""

    def __init__(self, size: int, group_timeout: float = 30.0) -> None:
        self.size = size
        self._group_timeout = group_timeout
        self._workers: list[_Worker] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start the workers, for which the first job pays otherwise."""
        if self._workers:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="bnext-processes-")
        folder = Path(self._folder.name)
        try:
            for rank in range(self.size):
                self._workers.append(_Worker(rank, self.size, folder, self._group_timeout))
            self._answers(START_TIMEOUT)
        except BaseException:
            self.close()
            raise

    def run(
        self, job: Callable[..., Any], *, seed: int = 0, timeout: float = 60.0, exits: Collection[int] = (), **args: Any
    ) -> list[Any]:
        """What the job returned in each worker, by rank; None for the ranks in `exits`, which are to die of it.

        Raises:
            WorkerError: a worker raised, died, lived on although it was to die, or did not answer in time.
        """
        self.start()
        message = pickle.dumps((job.__module__, job.__name__, seed, args))
        try:
            for worker in self._workers:
                # A worker that died since its last job is found below.
                with contextlib.suppress(OSError):
                    worker.connection.send_bytes(message)
            answers = self._answers(timeout, exits)
        except BaseException:
            # Also on an interrupt.
            self.close()
            raise
        if exits:
            self.close()
        failures = {rank: value for rank, (good, value) in answers.items() if not good}
        if failures:
            # All workers have answered, so none waits for another, and they can take the next job.
            raise WorkerError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return [answers[rank][1] if rank in answers else None for rank in range(self.size)]

    def close(self) -> None:
        """Ends the workers, whatever they are doing."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def _answers(self, timeout: float, exits: Collection[int] = ()) -> dict[int, tuple[bool, Any]]:
        """By the rank of each worker that answered: whether its job went well, and its result or traceback."""
        deadline = time.monotonic() + timeout
        answers: dict[int, tuple[bool, Any]] = {}
        dead: dict[int, str] = {}
        pending = {worker.connection: worker for worker in self._workers}
        while pending and (left := deadline - time.monotonic()) > 0:
            for connection in wait(list(pending), left):
                worker = pending.pop(connection)
                try:
                    answers[worker.rank] = pickle.loads(connection.recv_bytes())
                    failed = not answers[worker.rank][0]
                except (EOFError, OSError):
                    dead[worker.rank] = f"died, exit code {worker.exit_code()}\n{worker.printed()}"
                    failed = worker.rank not in exits
                if failed:
                    deadline = min(deadline, time.monotonic() + GRACE)
        problems = {rank: text for rank, text in dead.items() if rank not in exits}
        problems |= {rank: "lives, although it was to die" for rank in exits if rank not in dead}
        problems |= {worker.rank: f"did not answer\n{worker.where()}" for worker in pending.values()}
        if not problems:
            return answers
        problems |= {rank: text for rank, (good, text) in answers.items() if not good}
        raise WorkerError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(problems.items())))


def _die_with_the_tests() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _run(world: World, message: bytes) -> tuple[bool, Any]:
    import torch

    module, name, seed, arguments = pickle.loads(message)
    try:
        job = getattr(importlib.import_module(module), name)
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            all_but_torchs_own_are_errors()
            return True, job(world, **arguments)
    except BaseException:  # pytest's own failures are no Exception
        return False, traceback.format_exc()


def _serve(connection: Connection, world: World, folder: Path, group_timeout: float) -> None:
    os.setsid()  # Ctrl-C is for the test process, which then ends this one
    with (folder / f"rank{world.rank}.log").open("wb") as log:
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
    threading.Thread(target=_die_with_the_tests, daemon=True).start()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    if sys.platform == "linux":  # elsewhere loopback has another name, and gloo finds an interface by itself
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"

    import torch

    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=group_timeout)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group(
        "gloo", init_method=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        connection.send_bytes(pickle.dumps(_run(world, connection.recv_bytes())))
