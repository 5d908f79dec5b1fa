"""What is measured: the suites, their shapes and operations, and the bytes an operation has to move."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from math import prod

Shape = tuple[int, ...]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
LAYOUTS = ("contiguous", "channels_last")

# How often an operation has to pass over a tensor of the input's size when each is read or written once.
TENSOR_PASSES = {
    "forward": 2,  # input -> output, batch statistics, running statistics updated
    "backward": 3,  # input, grad_output -> grad_input, with grad_weight and grad_bias
    "eval": 2,  # input -> output, running statistics
    "forward_backward": 5,
}

# Measuring a small tensor takes about as long as moving this many bytes: a round has a shortest length.
FIXED_WORK_BYTES = 10_000_000

# Making and checking a tensor takes about as long as timing an operation with so many passes over it.
CHECK_PASSES = 2

QUICK_MAX_ELEMENTS = 2_000_000


# In the order they are measured and shown in.
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}


@dataclass(frozen=True)
class Suite:
    """A list of input shapes, and the operations measured on each of them.

    ``compiled`` are those that torch.compile is measured on too: it takes seconds a shape and layout.
    """

    shapes: tuple[Shape, ...]
    operations: tuple[str, ...] = ("forward", "backward", "eval")
    compiled: tuple[Shape, ...] = ()


# (C, H) of every distinct BatchNorm input of ResNet-50 on 224x224 images, in the order of the network.
_RESNET50_CHANNELS_SIZE = (
    (64, 112),
    (64, 56),
    (256, 56),
    (128, 56),
    (128, 28),
    (512, 28),
    (256, 28),
    (256, 14),
    (1024, 14),
    (512, 14),
    (512, 7),
    (2048, 7),
)


def _resnet50(batch: int, channels_size: Iterable[tuple[int, int]] = _RESNET50_CHANNELS_SIZE) -> tuple[Shape, ...]:
    return tuple((batch, channels, size, size) for channels, size in channels_size)


SUITES = {
    "resnet50": Suite(_resnet50(32)),
    "large": Suite(((8, 64, 224, 224), (128, 64, 32, 32))),
    # A small (N,C) call is mostly overhead, paid once for both directions together: hence forward_backward.
    "2d": Suite(
        ((1024, 1024), (4096, 256), (64, 512), (4, 8)),
        ("forward", "backward", "eval", "forward_backward"),
    ),
}

CUDA_SUITES = {
    # A training step's batch: most of these tensors are far larger than a GPU's L2 cache.
    "resnet50-256": Suite(
        _resnet50(256),
        compiled=_resnet50(256, ((64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))),
    ),
    # Here launches, and how many blocks share a channel, decide.
    "resnet50-32": Suite(_resnet50(32)),
    "2d": Suite(
        ((32768, 1024), (4096, 1024), (1024, 1024), (4096, 256), (64, 512), (4, 8)),
        ("forward", "backward", "eval", "forward_backward"),
    ),
}

DEVICE_SUITES = {"cpu": SUITES, "cuda": CUDA_SUITES}


@dataclass(frozen=True)
class Case:
    """One input tensor and the operations to measure on it."""

    suite: str
    shape: Shape
    dtype: str
    layout: str
    operations: tuple[str, ...]

    @property
    def count(self) -> int:
        """Elements a channel."""
        return prod(self.shape) // self.shape[1]

    def __str__(self) -> str:
        return f"{self.suite} {shape_label(self.shape)} {self.dtype} {self.layout}"


def shape_label(shape: Shape) -> str:
    return "x".join(map(str, shape))


def tensor_bytes(shape: Shape, dtype: str) -> int:
    return prod(shape) * ITEM_BYTES[dtype]


def model_bytes(operation: str, shape: Shape, dtype: str) -> int:
    """Bytes of the single-pass model: each tensor of the input's size is read or written once.

    The C-sized parameters and statistics are left out; they are at most a few per cent of any shape that is
    bound by memory.
    """
    return TENSOR_PASSES[operation] * tensor_bytes(shape, dtype)


def estimated_work(operation: str, case: Case) -> int:
    """The share of the time budget, and of the progress bar, that a measurement gets; in bytes."""
    return FIXED_WORK_BYTES + model_bytes(operation, case.shape, case.dtype)


def check_work(case: Case) -> int:
    """The same for making the tensors of a case and comparing the results on them."""
    return CHECK_PASSES * tensor_bytes(case.shape, case.dtype)


def case_work(case: Case) -> int:
    return check_work(case) + sum(estimated_work(operation, case) for operation in case.operations)


def select_cases(
    suites: Collection[str],
    dtypes: Collection[str],
    layouts: Collection[str],
    operations: Collection[str] = tuple(TENSOR_PASSES),
    quick: bool = False,
    device: str = "cpu",
) -> list[Case]:
    """The cases of the chosen suites of a device, in their order, with what they do not have in common left out.

    An (N,C) tensor has one layout, contiguous. ``quick`` leaves out what is above ``QUICK_MAX_ELEMENTS``.
    """
    cases = []
    for name, suite in DEVICE_SUITES[device].items():
        if name not in suites:
            continue
        chosen = tuple(operation for operation in suite.operations if operation in operations)
        cases += [
            Case(name, shape, dtype, layout, chosen)
            for dtype in dtypes
            for layout in layouts
            for shape in suite.shapes
            if chosen
            and (layout == "contiguous" or len(shape) == 4)
            and not (quick and prod(shape) > QUICK_MAX_ELEMENTS)
        ]
    return cases
