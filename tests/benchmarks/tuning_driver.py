"""python -m benchmarks tuning with trials that take a millisecond a step and need no torch, and without the report.

A program of its own: the workers import it as well, and find the real trials replaced.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import Connection

from benchmarks.tuning import __main__ as command
from benchmarks.tuning import workers
from benchmarks.tuning.results import Trial
from benchmarks.tuning.settings import Settings
from benchmarks.tuning.workers import Progress, Ready

MACHINE = dict.fromkeys(("device_name", "isa", "torch_version", "bnext_version", "commit", "date"), "imagined")


def pretend(pipe: Connection, settings: Settings) -> None:
    pipe.send(Ready(MACHINE))
    steps = settings.evaluations
    while True:
        point = pipe.recv()
        if settings.model != "mlp":
            raise NotImplementedError(settings.model)
        for before, step in zip([0, *steps], steps, strict=False):
            time.sleep((step - before) / 1000)
            pipe.send(Progress(step, 1.0))
        flat = [1.0] * len(steps)
        pipe.send(Trial(point, None, flat, [95] * len(steps), 100, [flat] * 3, travel=1.0, cpu_s=0.1))


workers._work = pretend
command.show = lambda *_: None

if __name__ == "__main__":
    sys.exit(command.main())
