"""The memory that training takes at its peak, measured in a process that does nothing else.

On a CPU that is resident memory, as the system counts it: whatever an allocator keeps is in it. The process trains
until all is compiled and allocated, gives back to the system what is free, and resets its high-water mark; so the
peak of compiling is not in it, but what the compiler leaves behind is. From the mark of the next steps goes what was
resident before there was a model: the interpreter and the libraries. On a GPU it is torch's own peak.
"""

import ctypes
import gc
import os
import signal
from concurrent import futures
from pathlib import Path

from benchmarks.command import end_with_parent, error_summary, processes
from benchmarks.suites import Case

WARM_STEPS = 2  # the first makes gradients and the optimiser's buffers
STEPS = 2
TIMEOUT_S = 600


class PeakError(Exception):
    """There is no number; the message is one line."""


def measure_peak(case: Case, provider: str, device: str, threads: int) -> int:
    """The peak in bytes; raises PeakError. What is running when this is interrupted is ended."""
    with processes(peak_here, [(case, provider, device)], begin, threads) as (peak,):
        try:
            return peak.result(TIMEOUT_S)
        except futures.TimeoutError:  # not Python 3.10's own
            raise PeakError(f"not done after {TIMEOUT_S} s") from None
        except Exception as error:  # whatever torch raises there; or the process was killed, as where memory ran out
            raise PeakError(error_summary(error)) from None


def begin(threads: int) -> None:
    """In the new process, before anything else."""
    # Nobody is there to read the answer once the parent has ended, however it did.
    end_with_parent(signal.SIGKILL)
    # Compiling is a matter of looking into the cache that the parent has filled: no workers for it.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    import torch

    torch.set_num_threads(threads)


def status_bytes(name: str) -> int:
    """A line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    raise PeakError(f"the system does not tell {name}")


def reset_high_water() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # man 5 proc: the peak is what is resident now


def peak_here(case: Case, provider: str, device: str) -> int:
    """What ``measure_peak`` returns, of this process."""
    import torch

    from benchmarks.models import build, make_model
    from benchmarks.training import Trainer

    before = status_bytes("VmRSS")
    trainer = Trainer(case, build(case, provider, make_model(case, device), device), device)
    for _ in range(WARM_STEPS):
        trainer.step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_high_water()
    for _ in range(STEPS):
        trainer.step()
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM") - before
