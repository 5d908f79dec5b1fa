"""python -m benchmarks tuning with trials that take a millisecond a step and need no torch, and without the report.

This is a program, since the workers import it too, which replaces the real trials there.
"""

import os
import signal
import sys
import time

from studies.tuning import __main__ as command
from studies.tuning import study
from studies.tuning.results import Trial
from studies.tuning.settings import Point, Settings


def pretend(settings: Settings, point: Point) -> Trial:
    """A trial whose seconds are the number of its process, which tells who tried it."""
    if point.init == "torch":
        raise NotImplementedError(point.init)
    if settings.optimizer == "average":
        os._exit(3)
    steps = settings.evaluations
    for before, step in zip([0, *steps], steps, strict=False):
        time.sleep((step - before) / 1000)
    flat = [1.0] * len(steps)
    return Trial(point, None, flat, [95] * len(steps), 100, [flat] * 3, travel=1.0, cpu_s=os.getpid())


study.run_trial, study.this_machine, command.show = pretend, lambda: {"date": "imagined"}, lambda *_: None

if __name__ == "__main__":
    # A shell starts what runs in the background with Ctrl-C ignored, and what that starts inherits it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(command.main())
