"""The hard cases of ``python -m benchmarks numerics``: the inputs of a batch norm, and their memory layouts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from zlib import crc32

import torch
from torch import Tensor

from benchmarks.operators import EPS, MEMORY_FORMATS, Tensors
from benchmarks.traffic import PLAIN, Epilogue, Shape

# 16,384 values a channel, as in the accuracy tests
SHAPE = (16, 8, 32, 32)
LONG_SHAPE = (16, 2, 512, 512)  # 4,194,304 values a channel

# An (N,C) tensor is contiguous, but bnext and torch run other code for it than for images.
ROWS = "(N,C)"
PATHS = (*MEMORY_FORMATS, ROWS)


@dataclass(frozen=True)
class Case:
    """A name, and what it stands for."""

    name: str
    make: Callable[[Shape, torch.Generator], Tensor]  # the input, float64, rounded to the dtype afterwards
    dtype: str = "float32"
    shape: Shape = SHAPE
    eps: float = EPS
    training: bool = True
    epilogue: Epilogue = PLAIN
    constant: bool = False  # each channel has one value: xhat is exactly 0


def normal(shape: Shape, generator: torch.Generator, *, mean: float = 0.0, std: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).mul_(std).add_(mean)


def constants(shape: Shape, generator: torch.Generator) -> Tensor:
    """0.1 and the like: values whose sums and quotients round."""
    values = torch.tensor([0.1, 1 / 3, -3.7, 1e-3, 100.1, 1e4 + 1 / 3, -1e5 / 7, 1e6 / 3], dtype=torch.float64)
    return values[: shape[1]].view(1, -1, 1, 1).expand(shape)


def first_image_unlike(shape: Shape, generator: torch.Generator) -> Tensor:
    """An image of padding before data far from it."""
    values = normal(shape, generator, mean=1e4)
    values[0] = 0
    return values


def outlier(shape: Shape, generator: torch.Generator) -> Tensor:
    values = normal(shape, generator)
    values[shape[0] // 2, :, 0, 0] = 1e6
    return values


def scales(shape: Shape, generator: torch.Generator) -> Tensor:
    """Channels of standard deviation 1e-6 to 1e6, as far from zero as they are wide."""
    size = torch.logspace(-6, 6, shape[1], dtype=torch.float64).view(1, -1, 1, 1)
    return normal(shape, generator, mean=1.0) * size


CASES = (
    Case("mean 0", normal),
    Case("mean 1e2", partial(normal, mean=1e2)),
    Case("mean 1e4", partial(normal, mean=1e4)),
    Case("mean 1e5", partial(normal, mean=1e5)),
    Case("mean 1e2, std 0.01", partial(normal, mean=1e2, std=0.01)),
    # A small eps, which does not hide that the squares lie below float32's range.
    Case("scale 1e-20, eps 1e-43", partial(normal, std=1e-20), eps=1e-43),
    Case("scale 1e15", partial(normal, std=1e15)),
    Case("scale 1e30", partial(normal, std=1e30)),
    Case("constant channels", constants, constant=True),
    Case("first image 0, others mean 1e4", first_image_unlike),
    Case("one value 1e6", outlier),
    Case("channels of std 1e-6 to 1e6", scales),
    Case("4 million values, mean 0", normal, shape=LONG_SHAPE),
    Case("4 million values, mean 10", partial(normal, mean=10.0), shape=LONG_SHAPE),
    Case("4 million values, relu", normal, shape=LONG_SHAPE, epilogue=Epilogue("relu", False)),
    Case("mean 10", partial(normal, mean=10.0), dtype="float16"),
    Case("mean 10", partial(normal, mean=10.0), dtype="bfloat16"),
    Case("eval, mean 1e5", partial(normal, mean=1e5), training=False),
    Case("eval, mean 0", normal, training=False),
    Case("residual + relu", partial(normal, mean=1.0), epilogue=Epilogue("relu", True)),
    Case("residual + relu", partial(normal, mean=1.0), dtype="bfloat16", epilogue=Epilogue("relu", True)),
)


def make_arguments(case: Case) -> Tensors:
    """Arguments, the same at every call with any number of threads, without gradients. Data are (N, C, H, W),
    contiguous.

    Parameters and running statistics are float32. In evaluation the running statistics are roughly those of the data,
    as after training. The mean of grad_output is not 0, so that its sum does not vanish.
    """
    generator = torch.Generator().manual_seed(crc32(f"{case.name} {case.dtype}".encode()))
    dtype: torch.dtype = getattr(torch, case.dtype)
    channels = case.shape[1]

    def vector(low: float, high: float) -> Tensor:
        return torch.empty(channels).uniform_(low, high, generator=generator)

    values = case.make(case.shape, generator).to(dtype)
    weight = vector(0.5, 1.5) * (1 - 2 * (torch.arange(channels) % 2))
    bias = vector(-1, 1)
    running_mean, running_var = torch.zeros(channels), torch.ones(channels)
    if not case.training:
        running_mean += values.double().mean((0, 2, 3)).float() + vector(-0.1, 0.1)
        running_var = vector(0.5, 2)
    return Tensors(
        input=values.contiguous(),
        weight=weight,
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        grad_output=normal(case.shape, generator, mean=0.25).to(dtype),
        residual=(normal(case.shape, generator).to(dtype),) if case.epilogue.residual else (),
    )


def in_path(values: Tensor, path: str) -> Tensor:
    """The values of (N, C, H, W) in a path's layout; for (N,C) the pixels are the rows."""
    if path == ROWS:
        return values.permute(0, 2, 3, 1).reshape(-1, values.shape[1]).contiguous()
    return values.contiguous(memory_format=MEMORY_FORMATS[path])


def by_channel(tensor: Tensor) -> Tensor:
    """Data as (C, count), in the same order for each path."""
    return tensor.detach().transpose(0, 1).flatten(1)
