"""Trains a model in a process of its own, as users do: with its own heap, page faults and peak of memory.

Models that take turns in one process keep one another's heap from being trimmed: there torch's layers cause no page
faults, where alone they cause tens of thousands a step.

The peak of memory on a CPU is resident memory, with what allocators cache. Before it is measured, the process returns
free memory to the system and resets its high-water mark, so the peak excludes that of compiling. What was resident
before the model was made is subtracted. On a GPU the peak is torch's own.
"""

import ctypes
import gc
import resource
import signal
import statistics
from collections.abc import Callable, Iterator
from concurrent import futures
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from timeit import Timer
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.command import end_with_parent, process_pool, submit
from benchmarks.memory import allocated
from benchmarks.models import make_model
from benchmarks.shares import step_shares
from benchmarks.suites import Case
from benchmarks.timing import Call
from benchmarks.training import Trainer, make_trainer

PRELOADED = ["benchmarks.preloaded"]
WARM_STEPS = 2  # the first makes gradients and the optimiser's buffers
STEPS = 2  # that are examined
TIMEOUT_S = 600

Result = TypeVar("Result")


class ProcessError(Exception):
    """The process failed, so there is no number; the message has one line."""


class TrainerProcess:
    """A provider's model in training, as training.Trainer; raises what is raised in the process.

    A stopwatch of its steps as well: the process times them, and counts their page faults.
    """

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.losses: tuple[float, ...] = ()
        self._pool = pool
        self._page_faults: list[float] = []

    def step(self) -> None:
        self.ask(time_here, 1)

    def prepared(self, operation: str) -> Call:
        return self.step

    def results(self) -> dict[str, Tensor]:
        self.losses = self.ask(losses_here)
        return {"losses": torch.tensor(self.losses)}

    def timeit(self, number: int) -> float:
        """The seconds that ``number`` steps take."""
        seconds, faults = self.ask(time_here, number)
        self._page_faults.append(faults / number)
        return seconds

    @property
    def page_faults(self) -> float:
        """The page faults of a step, the median over the rounds."""
        return statistics.median(self._page_faults)

    def ask(self, function: Callable[..., Result], *arguments: object) -> Result:
        """What one of the functions below returns in the process."""
        try:
            result: Result = submit(self._pool, function, *arguments).result(TIMEOUT_S)
            return result
        except futures.TimeoutError:  # not Python 3.10's own
            raise ProcessError(f"not done after {TIMEOUT_S} s") from None


@contextmanager
def trainer_process(case: Case, provider: str, device: str, threads: int) -> Iterator[TrainerProcess]:
    """A process for training, which is killed at the end of the block.

    It is forked from a process that has only imported what models need.
    """
    with process_pool(1, begin, threads, preload=PRELOADED) as pool:
        process = TrainerProcess(pool)
        process.ask(make_here, case, provider, device)
        yield process


# In the process.

_trainer: Trainer
_resident_before: int


def begin(threads: int) -> None:
    # Once the parent has ended, nothing reads the answer.
    end_with_parent(signal.SIGKILL)
    torch.set_num_threads(threads)


def make_here(case: Case, provider: str, device: str) -> None:
    global _trainer, _resident_before
    _resident_before = status_bytes("VmRSS") if device == "cpu" else 0
    _trainer = make_trainer(case, provider, make_model(case, device), device)


def losses_here() -> tuple[float, ...]:
    _trainer.results()
    return _trainer.losses


def time_here(number: int) -> tuple[float, int]:
    """The seconds that steps take, and their page faults."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    seconds = Timer(_trainer.step).timeit(number)
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def peak_here() -> int:
    """The peak of memory of a few more steps, in bytes."""
    on_gpu = torch.cuda.is_initialized()
    for _ in range(WARM_STEPS):
        _trainer.step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_high_water()
    for _ in range(STEPS):
        _trainer.step()
    return torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM") - _resident_before


def allocations_here() -> dict[str, float]:
    """What a step allocates, as fields of a row.

    The peak grows linearly with the batch, so a batch twice as large shows what an image takes.
    """
    found = []
    for trainer in (_trainer, _trainer.twice_as_large()):
        for _ in range(WARM_STEPS):
            trainer.step()
        found.append((allocated(trainer.forward).held, allocated(trainer.step).peak))
    (held, peak), (_, larger_peak) = found
    image = (larger_peak - peak) / len(_trainer.input)
    return {"held_bytes": held, "allocated_bytes": peak, "image_bytes": image}


def shares_here() -> dict[str, float]:
    return step_shares(_trainer.step, STEPS)


def status_bytes(name: str) -> int:
    """A line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise ProcessError(f"the system does not tell {name}")


def reset_high_water() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: the peak is what is resident now
