"""What is measured: the suites, their shapes and operations, and the bytes an operation has to move."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]

# Providers: what is compared on every case, and what is not measured everywhere.
TORCH, BNEXT, COPY = "torch", "bnext", "copy"
NO_CUDNN = "torch-no-cudnn"
TORCH_COMPILE = "torch-compile"
PLANNED = "bnext-"  # bnext as planned for a lesser device; benchmarks/cuda/providers.py

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
LAYOUTS = ("contiguous", "channels_last")

# On a CPU the C library maps every output above 32 MB afresh; below 1 MB a core's own cache holds the tensor.
MB = 1_000_000
LARGE_CLASS = "> 32 MB"
SIZE_CLASSES = ((LARGE_CLASS, 32 * MB), ("1-32 MB", MB), ("< 1 MB", 0))

# How often an operation has to pass over a tensor of the input's size when each is read or written once.
TENSOR_PASSES = {
    "forward": 2,  # input -> output, batch statistics, running statistics updated
    "backward": 3,  # input, grad_output -> grad_input, with grad_weight and grad_bias
    "eval": 2,  # input -> output, running statistics
    "forward_backward": 5,
}

# What a residual adds: it is read, or its gradient is written.
RESIDUAL_PASSES = {"forward": 1, "backward": 1, "eval": 1, "forward_backward": 2}

# How often a bit an element is written or read. Without a residual, backward computes from the input, which it reads
# anyway, what was positive; with one, it would have to read that too, and forward keeps the bits instead.
MASK_PASSES = {"forward": 1, "backward": 1, "eval": 0, "forward_backward": 2}

# Measuring a small tensor takes about as long as moving this many bytes: a round has a shortest length.
FIXED_WORK_BYTES = 10_000_000

# Making and checking a tensor takes about as long as timing an operation with so many passes over it.
CHECK_PASSES = 2

# The same for torch.compile on a case: four seconds or so, forward, backward and evaluation.
COMPILE_WORK_BYTES = 400_000_000

QUICK_MAX_ELEMENTS = 2_000_000


# In the order they are measured and shown in.
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}


class Epilogue(NamedTuple):
    """What follows the batch norm in the same call: the addition of a residual, an activation."""

    act: str = ""  # as batch_norm_act names it; none: a plain batch norm
    residual: bool = False

    def __str__(self) -> str:
        return f"add+{self.act}" if self.residual else self.act


PLAIN = Epilogue()
BN_RELU = Epilogue("relu")
BN_ADD_RELU = Epilogue("relu", residual=True)


@dataclass(frozen=True)
class Suite:
    """A list of input shapes, and the operations measured on each of them.

    ``compiled`` are those that torch.compile is measured on too, in ``compiled_dtypes``: it takes seconds a shape and
    layout. ``fused`` are shapes by what follows the batch norm. ``seconds``: the time budget of a suite that is
    measured only when it is asked for; all others share the device's.
    """

    shapes: tuple[Shape, ...] = ()
    operations: tuple[str, ...] = ("forward", "backward", "eval")
    compiled: tuple[Shape, ...] = ()
    compiled_dtypes: tuple[str, ...] = ("bfloat16",)
    fused: tuple[tuple[Epilogue, tuple[Shape, ...]], ...] = ()
    seconds: float | None = None

    def tensors(self) -> Iterator[tuple[Shape, Epilogue]]:
        for epilogue, shapes in ((PLAIN, self.shapes), *self.fused):
            for shape in shapes:
                yield shape, epilogue


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

# Those of them whose batch norm a ReLU follows at once, and those before which the shortcut is added.
_FUSED_CHANNELS_SIZE = {
    BN_RELU: ((64, 112), (64, 56), (128, 28), (256, 14), (512, 7)),
    BN_ADD_RELU: ((256, 56), (512, 28), (1024, 14), (2048, 7)),
}


def _resnet50(batch: int, channels_size: Iterable[tuple[int, int]] = _RESNET50_CHANNELS_SIZE) -> tuple[Shape, ...]:
    return tuple((batch, channels, size, size) for channels, size in channels_size)


def _fused(batch: int, compiled: Iterable[tuple[int, int]], dtypes: tuple[str, ...], seconds: float) -> Suite:
    """ResNet-50's layers; then a call that is mostly overhead, and the other activations on one shape."""
    layers = {epilogue: _resnet50(batch, shapes) for epilogue, shapes in _FUSED_CHANNELS_SIZE.items()}
    small: Shape = (8, 64, 14, 14)
    others = tuple((Epilogue(act), _resnet50(batch, [(128, 28)])) for act in ("silu", "hardswish", "gelu"))
    return Suite(
        operations=("forward", "backward", "eval", "forward_backward"),
        compiled=(*_resnet50(batch, compiled), small),
        compiled_dtypes=dtypes,
        fused=(*layers.items(), *((epilogue, (small,)) for epilogue in layers), *others),
        seconds=seconds,
    )


def is_fused_layer(shape: Shape, epilogue: Epilogue) -> bool:
    """Whether it is one of ResNet-50's, at any batch size."""
    return shape[1:3] in _FUSED_CHANNELS_SIZE.get(epilogue, ())


SUITES = {
    "resnet50": Suite(_resnet50(32)),
    "large": Suite(((8, 64, 224, 224), (128, 64, 32, 32))),
    # A small (N,C) call is mostly overhead, paid once for both directions together: hence forward_backward.
    "2d": Suite(
        ((1024, 1024), (4096, 256), (64, 512), (4, 8)),
        ("forward", "backward", "eval", "forward_backward"),
    ),
    # Compiled are, beside the small one, those that are above 32 MB in a dtype: to these the bars apply.
    "fused": _fused(32, ((64, 112), (256, 56), (512, 28)), ("float32", "bfloat16"), seconds=360),
}

_ALL_FUSED_CHANNELS_SIZE = sum(_FUSED_CHANNELS_SIZE.values(), ())

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
    "fused": _fused(32, _ALL_FUSED_CHANNELS_SIZE, ("bfloat16",), seconds=200),
    "fused-256": _fused(256, _ALL_FUSED_CHANNELS_SIZE, ("bfloat16",), seconds=240),
}

DEVICE_SUITES = {"cpu": SUITES, "cuda": CUDA_SUITES}

# Of the suites that are measured when none is named, all together; on CUDA compiling comes out of it.
DEFAULT_SECONDS = {"cpu": 110.0, "cuda": 150.0}


def default_suites(device: str) -> list[str]:
    return [name for name, suite in DEVICE_SUITES[device].items() if suite.seconds is None]


def default_seconds(device: str, suites: Collection[str]) -> float:
    """The time budget of the chosen suites of a device."""
    own = [DEVICE_SUITES[device][name].seconds for name in set(suites)]
    shared = DEFAULT_SECONDS[device] if None in own else 0.0
    return shared + sum(seconds or 0.0 for seconds in own)


@dataclass(frozen=True)
class Case:
    """One input tensor and the operations to measure on it."""

    suite: str
    shape: Shape
    dtype: str
    layout: str
    operations: tuple[str, ...]
    epilogue: Epilogue = PLAIN
    compiled: bool = False  # whether torch.compile is measured on it too

    @property
    def count(self) -> int:
        """Elements a channel."""
        return prod(self.shape) // self.shape[1]

    def __str__(self) -> str:
        return f"{self.suite} {tensor_label(self.shape, self.epilogue)} {self.dtype} {self.layout}"


def shape_label(shape: Shape) -> str:
    return "x".join(map(str, shape))


def tensor_label(shape: Shape, epilogue: Epilogue) -> str:
    """The shape, and what follows the batch norm, if anything does."""
    return f"{shape_label(shape)} {epilogue}".rstrip()


def tensor_bytes(shape: Shape, dtype: str) -> int:
    return prod(shape) * ITEM_BYTES[dtype]


def size_class(size: int) -> str:
    return next(name for name, above in SIZE_CLASSES if size > above)


def tensor_passes(operation: str, epilogue: Epilogue) -> int:
    return TENSOR_PASSES[operation] + (RESIDUAL_PASSES[operation] if epilogue.residual else 0)


def mask_bytes(operation: str, shape: Shape, epilogue: Epilogue) -> int:
    return MASK_PASSES[operation] * -(-prod(shape) // 8) if epilogue.residual else 0


def model_bytes(operation: str, shape: Shape, dtype: str, epilogue: Epilogue = PLAIN) -> int:
    """Bytes of the single-pass model: each tensor of the input's size, and the mask, is read or written once.

    The C-sized parameters and statistics are left out; they are at most a few per cent of any shape that is
    bound by memory.
    """
    passes = tensor_passes(operation, epilogue)
    return passes * tensor_bytes(shape, dtype) + mask_bytes(operation, shape, epilogue)


def estimated_work(operation: str, case: Case) -> int:
    """The share of the time budget, and of the progress bar, that a measurement gets; in bytes."""
    return FIXED_WORK_BYTES + model_bytes(operation, case.shape, case.dtype, case.epilogue)


def check_work(case: Case, with_compile: bool = True) -> int:
    """The same for making the tensors of a case, compiling, and comparing the results."""
    compiling = COMPILE_WORK_BYTES if with_compile and case.compiled else 0
    return CHECK_PASSES * tensor_bytes(case.shape, case.dtype) + compiling


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
            Case(
                name,
                shape,
                dtype,
                layout,
                chosen,
                epilogue,
                compiled=shape in suite.compiled and dtype in suite.compiled_dtypes,
            )
            for dtype in dtypes
            for layout in layouts
            for shape, epilogue in suite.tensors()
            if chosen
            and (layout == "contiguous" or len(shape) == 4)
            and not (quick and prod(shape) > QUICK_MAX_ELEMENTS)
        ]
    return cases
