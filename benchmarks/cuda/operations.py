"""What is timed on a GPU: each provider's operation, and the copy, going round sets of tensors."""

from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.cuda.rotation import Rotation
from benchmarks.operations import SEED, Tensors, make_tensors, provider_call
from benchmarks.providers import Provider
from benchmarks.suites import Case, model_bytes
from benchmarks.timing import Call


def make_sets(case: Case, device: str, number: int) -> list[Tensors]:
    """Sets with data and a gradient each of their own; the parameters, too small to matter, are shared."""
    first = make_tensors(case, device)
    generator = torch.Generator(device).manual_seed(SEED + 1)

    def like(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, requires_grad=False).normal_(generator=generator)

    sets = [first]
    for _ in range(number - 1):
        input, grad_output = like(first.input).requires_grad_(), like(first.grad_output)
        residual = tuple(like(tensor).requires_grad_() for tensor in first.residual)
        sets.append(replace(first, input=input, grad_output=grad_output, residual=residual))
    return sets


def provider_rotation(operation: str, provider: Provider, sets: list[Tensors]) -> Rotation:
    """For backward this makes the graphs, one a set."""
    with provider.context():
        calls = [provider_call(operation, provider.function, tensors) for tensors in sets]
    return Rotation(calls, provider.context)


def copy_rotation(operation: str, case: Case, device: str, sets: int) -> Rotation:
    """The floor: a copy that reads and writes as many bytes as the operation's single-pass model.

    Half of them are read and half written; flat, so that the layout plays no part; random, because what a GPU draws
    to move zeros is less, and its clock may be higher.
    """
    dtype: torch.dtype = getattr(torch, case.dtype)
    half = -(-model_bytes(operation, case.shape, case.dtype, case.epilogue) // (2 * dtype.itemsize))
    generator = torch.Generator(device).manual_seed(SEED)

    def copy() -> Call:
        source = torch.empty(half, dtype=dtype, device=device).normal_(generator=generator)
        target = torch.zeros_like(source)
        return lambda: target.copy_(source)

    return Rotation([copy() for _ in range(sets)])
