"""Shapes, memory layouts, dtypes and activations to test with, and tensors made of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from reference import Act
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
LOW_PRECISION = (torch.float16, torch.bfloat16)

# torch.nn.BatchNorm* takes `bias=` since 2.13; bnext's subclasses take what torch's take.
TORCH_HAS_BIAS_OPTION = "bias" in inspect.signature(torch.nn.BatchNorm1d).parameters

# Channel counts 1, 3, 5, 17, 130 are no multiple of any vector width; 64 is one of all. Spatial sizes: 1, odd,
# 7x7 (49 values: no row after the first is aligned), 14x14 (the first multiple of 4).
SHAPES: tuple[tuple[int, ...], ...] = (
    (2, 1),
    (2, 3),
    (7, 5),
    (33, 17),
    (19, 64),
    (16, 130),
    (2, 3, 1),
    (1, 3, 2),
    (3, 17, 5),
    (4, 5, 49),
    (2, 3, 1, 1),
    (5, 130, 1, 1),
    (1, 1, 9, 11),
    (3, 5, 5, 3),
    (4, 64, 7, 7),
    (2, 17, 14, 14),
    (5, 130, 3, 3),
    (2, 3, 2, 3, 5),
    (1, 17, 3, 2, 7),
    (2, 64, 2, 2, 2),
)

# One shape of each rank, for every stride pattern.
STRIDED_SHAPES: tuple[tuple[int, ...], ...] = ((33, 17), (6, 17, 5), (6, 5, 7, 3), (4, 5, 2, 3, 7))

DENSE_LAYOUTS = {
    2: ("contiguous",),
    3: ("contiguous", "channels_last"),
    4: ("contiguous", "channels_last"),
    5: ("contiguous", "channels_last_3d"),
}
STRIDED = ("offset", "sliced", "sliced_batch", "channel_slice", "transposed", "expanded", "expanded_channels")
STRIDED_LAYOUTS = {
    2: tuple(layout for layout in STRIDED if layout != "expanded"),
    3: STRIDED,
    4: (*STRIDED, "channels_last_offset"),
    5: STRIDED,
}


class Case(NamedTuple):
    shape: tuple[int, ...]
    layout: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))}-{self.layout}"


DENSE_CASES = [Case(shape, layout) for shape in SHAPES for layout in DENSE_LAYOUTS[len(shape)]]
STRIDED_CASES = [Case(shape, layout) for shape in STRIDED_SHAPES for layout in STRIDED_LAYOUTS[len(shape)]]
# Dense, but not aligned: kernels read them in place, whereas other stride patterns are copied first.
MISALIGNED_CASES = [case for case in STRIDED_CASES if case.layout.endswith("offset")]

# Each activation; with a negative slope the output of leaky_relu does not tell the sign of the pre-activation, and elu
# has a kink unless alpha is 1.
ACTS: tuple[Act, ...] = (
    "identity",
    "relu",
    "relu6",
    "leaky_relu",
    ("leaky_relu", -0.5),
    "silu",
    "gelu",
    "hardswish",
    "mish",
    "elu",
    ("elu", 0.5),
)
# One of each kind, for tests whose subject is not the activation: the identity; one that has specialised kernels; two
# with a mask, of one kink and of two; a smooth one; one that is smooth but for a kink.
FEW_ACTS: tuple[Act, ...] = ("identity", "relu", ("leaky_relu", -0.5), "relu6", "gelu", ("elu", 0.5))
# With a residual, their backward needs a mask.
RECTIFIERS = ("relu", "relu6", "leaky_relu")

# Every rank and dense layout once, for tests whose subject is not the shape.
FEW_CASES = [
    Case((7, 5), "contiguous"),
    Case((4, 3, 6), "contiguous"),
    Case((3, 5, 5, 3), "contiguous"),
    Case((3, 5, 5, 3), "channels_last"),
    Case((2, 3, 2, 3, 5), "channels_last_3d"),
    Case((6, 5, 7, 3), "sliced"),
]

EMPTY_CASES = [
    Case((0, 3), "contiguous"),
    Case((0, 3, 4, 5), "contiguous"),
    Case((0, 3, 4, 5), "channels_last"),
    Case((2, 3, 0), "contiguous"),
]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows, of one value from each axis, in which every two values of two axes meet: the same rows each time.

    There are hardly more of them than combinations of the two longest axes. Each row takes a pair that is in none
    before it, and along every other axis the value that completes most such pairs, among equals the rarest so far.
    """
    sizes = [range(len(axis)) for axis in axes]
    missing = {
        ((i, a), (j, b))
        for i, j in itertools.combinations(range(len(axes)), 2)
        for a, b in itertools.product(sizes[i], sizes[j])
    }
    order = sorted(missing)
    used = [[0] * len(axis) for axis in axes]
    rows = []
    while missing:
        first = next(pair for pair in order if pair in missing)
        row = dict(first)
        for i in (i for i in range(len(axes)) if i not in row):

            def completed(a: int, i: int = i, row: dict[int, int] = row) -> int:
                return sum(tuple(sorted(((i, a), other))) in missing for other in row.items())

            row[i] = max(sizes[i], key=lambda a, i=i: (completed(a), -used[i][a]))
        missing.difference_update(itertools.combinations(sorted(row.items()), 2))
        for i, a in row.items():
            used[i][a] += 1
        rows.append(tuple(axes[i][row[i]] for i in range(len(axes))))
    return rows


# Large enough to cross any internal chunk: a channel of more than 300,000 values; 5,000 rows of 70 channels; few
# channels with many values each, so that threads share a channel; and more channels than a tile is wide.
LARGE_CASES = [
    Case((3, 1, 331, 331), "contiguous"),
    Case((3, 1, 331, 331), "channels_last"),
    Case((50, 70, 10, 10), "channels_last"),
    Case((5000, 70), "contiguous"),
    Case((64, 2, 61, 67), "contiguous"),
    Case((64, 2, 61, 67), "channels_last"),
    Case((24, 1031, 3, 5), "contiguous"),
    Case((24, 1031, 3, 5), "channels_last"),
]

# Cases to run on each instruction set: more than 512 additions in either layout, and a tail shorter than any vector.
MEDIUM_CASES = [
    Case((9, 3, 41, 43), "contiguous"),
    Case((12, 70, 10, 10), "channels_last"),
    Case((1030, 37), "contiguous"),
]


def name(value: object) -> str:
    """A short id for a parameter: `float32` for torch.float32, `4x64x7x7-channels_last` for a case, `leaky_relu(-0.5)`
    for an activation with a slope."""
    if type(value) is tuple and value and isinstance(value[0], str):
        return f"{value[0]}({', '.join(map(str, value[1:]))})"
    return str(value).removeprefix("torch.")


def without_repeats(layout: str) -> str:
    """The layout, or contiguous in place of one that repeats values."""
    return "contiguous" if layout.startswith("expanded") else layout


def to_layout(values: Tensor, layout: str) -> Tensor:
    """The values with other strides.

    Uses only operations that autograd and vmap know in every mode, so that gradcheck can pass them. The expanded
    layouts repeat their first image or channel, hence change the values.
    """
    if layout == "contiguous":
        return values.contiguous()
    if layout in ("channels_last", "channels_last_3d"):
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "offset":  # one element off: no vector load is aligned
        return torch.cat([values.new_zeros(1), values.reshape(-1)])[1:].view(values.shape)
    if layout == "channels_last_offset":
        return to_layout(values.movedim(1, -1), "offset").movedim(-1, 1)
    if layout == "sliced":
        return torch.stack([values, values + 1], -1).flatten(-2)[..., ::2]
    if layout == "sliced_batch":
        return torch.stack([values, values + 1], 1).flatten(0, 1)[::2]
    if layout == "channel_slice":
        return torch.cat([values[:, :1] + 1, values, values[:, :1] - 1], 1)[:, 1:-1]
    if layout == "transposed":
        return values.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded":
        return values[:1].contiguous().expand(values.shape)
    if layout == "expanded_channels":
        return values[:, :1].contiguous().expand(values.shape)
    raise ValueError(f"layout: unknown {layout!r}")


def seed(number: int) -> None:
    """As torch.manual_seed, which also formats a stack trace for each kind of device that is not in use, and keeps it:
    half a millisecond, in each of thousands of tests."""
    if torch.cuda.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


def make_input(
    shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Normal values; each channel has its own mean in [-3, 3] and standard deviation in [0.5, 2]."""
    per_channel = (1, shape[1], *[1] * (len(shape) - 2))
    mean = torch.rand(per_channel, dtype=torch.float64) * 6 - 3
    std = torch.rand(per_channel, dtype=torch.float64) * 1.5 + 0.5
    values = torch.randn(shape, dtype=torch.float64) * std + mean
    return to_layout(values.to(device=device, dtype=dtype), layout)


def make_grad(
    shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """A grad_output: normal values, and a mean other than zero, so that no sum vanishes."""
    values = torch.randn(shape, dtype=torch.float64) + 0.25
    return to_layout(values.to(device=device, dtype=dtype), layout)


def make_residual(
    shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    """Normal values of standard deviation 3: with those of batch norm they fall on every side of every kink."""
    values = torch.randn(shape, dtype=torch.float64) * 3
    return to_layout(values.to(device=device, dtype=dtype), layout)


class Parameters(NamedTuple):
    """Parameters and running statistics of a call; those that are None are not passed."""

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None

    def clone(self) -> Parameters:
        return Parameters(*(None if tensor is None else tensor.detach().clone() for tensor in self))


def make_parameters(
    channels: int, dtype: torch.dtype | tuple[torch.dtype, ...] = torch.float32, device: str = "cpu"
) -> Parameters:
    """Weights of both signs and, from three channels on, one that is zero; `dtype` is one for all or one for each."""
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * 4
    weight = (torch.rand(channels, dtype=torch.float64) + 0.5) * (1 - 2 * (torch.arange(channels) % 2))
    if channels >= 3:
        weight[2] = 0
    bias = torch.randn(channels, dtype=torch.float64)
    running_mean = torch.randn(channels, dtype=torch.float64)
    running_var = torch.rand(channels, dtype=torch.float64) * 2 + 0.25
    values = (weight, bias, running_mean, running_var)
    return Parameters(*(v.to(device=device, dtype=d) for v, d in zip(values, dtypes, strict=True)))


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the kernels compute in and return parameter gradients as: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether shapes, dtypes and bit patterns agree: NaN equals NaN, -0 differs from +0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(integers), b.detach().contiguous().view(integers))
