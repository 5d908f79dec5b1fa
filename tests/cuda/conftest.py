"""Where the CUDA kernels run: in emulation, where every access is checked, and on a GPU where there is one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from marks import GPUS, SIMT
from simt.device import Limits, emulated
from ways import PlannedFor

import bnext


@pytest.fixture(params=[SIMT, *GPUS])
def planned_for(request: pytest.FixtureRequest) -> PlannedFor:
    """Makes a context in which kernels are planned for a device of these limits; it gives the device of the tensors.

    The seed is that of the emulator, for the order of execution.
    """

    @contextlib.contextmanager
    def plan(limits: Limits, seed: int = 0) -> Iterator[str]:
        if request.param == "simt":
            with emulated(limits, seed):
                yield "cpu"
            return
        bnext._C.cap_cuda_device(limits.sms, limits.shared_per_block, limits.max_cluster)
        try:
            yield request.param
        finally:
            bnext._C.cap_cuda_device()

    return plan
