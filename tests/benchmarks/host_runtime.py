"""The host in a GPU's place: what benchmarks.cuda does can be seen without one."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from benchmarks.provenance import provenance
from benchmarks.rows import Provenance


class HostEvent:
    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: HostEvent) -> float:
        return 1e3 * (end_event.seconds - self.seconds)


class HostRuntime:
    """``captures``: whether graphs can be; a replay computes anew and writes over what the capture returned."""

    device = "cpu"
    l2_bytes = 500

    def __init__(self, captures: bool = True) -> None:
        self.captures = captures
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
        return HostEvent()

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def occupy(self) -> None:
        self.log.append("occupy")

    def warm_up(self) -> None:
        self.log.append("warm up")

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], object], Any]:
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        results = run()

        def replay() -> None:
            for old, new in zip(
                torch.utils._pytree.tree_leaves(results), torch.utils._pytree.tree_leaves(run()), strict=True
            ):
                if isinstance(old, torch.Tensor):
                    old.detach().copy_(new.detach())

        return replay, results
