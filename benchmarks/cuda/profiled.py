"""Six kernels for a profiler: plain batch norm in both layouts, and with a residual and ReLU, forward and backward.

    ncu --profile-from-start off ... python -m benchmarks.cuda.profiled

Each kernel runs once to warm up, and once between cudaProfilerStart and cudaProfilerStop. The tensors are larger than
the L2 cache of any GPU, so that no input is in it.
"""

from collections.abc import Iterator

import torch

from benchmarks.operators import functions, make_tensors, provider_call
from benchmarks.suites import BNEXT, Case
from benchmarks.timing import Call
from benchmarks.traffic import BN_ADD_RELU, PLAIN

IMAGES = (
    ((256, 56, 56), "contiguous", PLAIN),
    ((512, 28, 28), "channels_last", PLAIN),
    ((256, 56, 56), "contiguous", BN_ADD_RELU),
)
BATCH = 256


def kernels(device: str, batch: int) -> Iterator[tuple[str, Call]]:
    """Each kernel's name, and the call that launches it."""
    for image, layout, epilogue in IMAGES:
        case = Case("profiled", (batch, *image), "bfloat16", layout, epilogue=epilogue)
        tensors = make_tensors(case, device)
        for operation in ("forward", "backward"):
            call = provider_call(operation, functions(epilogue)[BNEXT], tensors)
            yield " ".join(filter(None, (str(case.shape), layout, str(epilogue), operation))), call


def main() -> None:
    """Run them, and say which they are, in this order."""
    for name, call in kernels("cuda", BATCH):
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        print(name)


if __name__ == "__main__":
    main()
