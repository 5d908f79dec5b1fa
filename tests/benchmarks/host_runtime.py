"""The host in a GPU's place: what benchmarks.cuda does can be seen without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.cuda.runtime import CudaRuntime
from benchmarks.provenance import provenance
from benchmarks.rows import Provenance


class HostEvent:
    def __init__(self, runtime: HostRuntime) -> None:
        self.runtime = runtime

    def record(self) -> None:
        self.runtime.log.append("record")
        self.seconds = self.runtime.clock()

    def synchronize(self) -> None:
        self.runtime.log.append("wait")

    def elapsed_time(self, end_event: HostEvent) -> float:
        return 1e3 * (end_event.seconds - self.seconds)


class HostRuntime(CudaRuntime):
    """``captures``: whether graphs can be; a replay computes anew and writes over what the capture returned."""

    def __init__(self, captures: bool = True, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.l2_bytes = "cpu", 500
        self.captures, self.clock = captures, clock
        self.log: list[str] = []

    def provenance(self, threads: int) -> Provenance:
        return replace(provenance(threads), device="cuda", device_name="Imagined GPU", isa="sm_90")

    def stream(self) -> AbstractContextManager[None]:
        return nullcontext()

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

    def warm_up(self) -> None:
        self.log.append("warm up")

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
