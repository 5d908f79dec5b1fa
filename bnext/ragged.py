"""Nested tensors of torch.jagged layout: batch norm of the values that they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bnext.activations import Epilogue


def is_jagged(input: object) -> bool:
    """Whether it is a nested tensor of torch.jagged layout."""
    return isinstance(input, Tensor) and input.is_nested and input.layout is torch.jagged


def on_values(
    function: Callable[..., Tensor],
    input: Tensor,
    vectors: tuple[Any, ...],
    settings: tuple[Any, ...],
    epilogue: Epilogue,
) -> Tensor:
    """Call ``function`` on the values, (sum of j, C), and give the result the input's structure.

    Raises:
        ValueError: the input has no channels before its ragged dimension, or a residual another structure.
    """
    values, offsets = rows(input)
    if epilogue and epilogue[0] is not None:
        residual, residual_offsets = rows(epilogue[0])
        if residual_offsets is not offsets:
            raise ValueError("expected residual to have the structure of input: to share its offsets, but it does not")
        epilogue = (residual, *epilogue[1:])
    output = function(values, *vectors, *settings, epilogue)
    return torch.nested.nested_tensor_from_jagged(output, offsets).transpose(1, 2)


def rows(nested: Tensor) -> tuple[Tensor, Tensor]:
    """The values, (sum of j, C), and the offsets of the sequences.

    Raises:
        ValueError: it is not nested, or not of shape (N, C, j).
    """
    if not is_jagged(nested) or nested.dim() != 3 or not isinstance(nested.shape[1], int):
        shape = tuple(nested.shape) if nested.is_nested else "a dense tensor"
        raise ValueError(f"expected a nested tensor of shape (N, C, j), as transpose(1, 2) makes it, but got {shape}")
    sequences: Any = nested.transpose(1, 2)
    return sequences.values(), sequences.offsets()
