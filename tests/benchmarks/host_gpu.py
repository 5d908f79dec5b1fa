"""The host in a GPU's place: what benchmarks.cuda does can be seen without one."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.cuda.measure import Gpu
from benchmarks.provenance import provenance
from benchmarks.rows import Provenance


class HostEvent:
    def __init__(self, gpu: "HostGpu") -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.gpu.log.append("record")
        self.seconds = self.gpu.clock()

    def synchronize(self) -> None:
        self.gpu.log.append("wait")

    def elapsed_time(self, end_event: "HostEvent") -> float:
        return 1e3 * (end_event.seconds - self.seconds)


class HostGpu(Gpu):
    """``captures``: whether graphs can be; a replay computes anew and writes over what the capture returned."""

    tensors, l2_bytes = "cpu", 500

    def __init__(self, captures: bool = True, clock: Callable[[], float] = time.perf_counter) -> None:
        self.captures, self.clock = captures, clock
        self.log: list[str] = []

    @contextmanager
    def ready(self) -> Iterator[None]:
        yield

    def provenance(self, threads: int) -> Provenance:
        return replace(provenance(threads), device="cuda", device_name="Imagined GPU", isa="sm_90")

    def free_bytes(self) -> int:
        return 2**30

    def last_plan(self) -> str:
        return "cluster of 8, read once"

    def event(self) -> Any:
        return HostEvent(self)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def occupy(self) -> None:
        self.log.append("occupy")

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        if not self.captures:
            try:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            finally:  # torch's own way out of a capture that has failed raises as well
                raise RuntimeError("capture_end")
        results = run()

        def replay() -> None:
            for old, new in zip(tree_leaves(results), tree_leaves(run()), strict=True):
                if isinstance(old, torch.Tensor):
                    old.detach().copy_(new.detach())

        return replay, results
