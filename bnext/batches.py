"""Which values of a batch are normalised together, and which are padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnext import native, ops


class Batch(NamedTuple):
    """What an operator is told of a batch; the fields are keyword arguments of the operators."""

    valid: Tensor | None = None  # bool, (N, *spatial): False at padding; None: there is none
    virtual_batch_size: int = 0  # images that are normalised together; 0: all
    update_in_backward: bool = True  # whether a call in a backward pass updates running statistics

    @classmethod
    def of(
        cls,
        input: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        virtual_batch_size: int | None = None,
        update_in_backward: bool = True,
    ) -> Batch:
        """From the arguments that users pass.

        Raises:
            ValueError, TypeError, RuntimeError: :func:`bnext.functional.batch_norm` says when.
        """
        return cls(_valid(input, lengths, mask), part_size(virtual_batch_size), update_in_backward)

    def of_group(self) -> dict[str, Any]:
        """The operator's arguments for a batch that several processes share.

        Raises:
            ValueError: the batch has parts.
        """
        if self.virtual_batch_size:
            raise ValueError(
                "expected no virtual_batch_size where several processes share a batch, but got "
                f"{self.virtual_batch_size}"
            )
        return {"valid": self.valid, "update_in_backward": self.update_in_backward}


WHOLE = Batch()


def part_size(virtual_batch_size: int | None) -> int:
    if virtual_batch_size is None:
        return 0
    if not isinstance(virtual_batch_size, int) or isinstance(virtual_batch_size, bool):
        raise TypeError(f"expected virtual_batch_size to be an int or None, but got {virtual_batch_size!r}")
    if not 1 <= virtual_batch_size < 2**63:
        raise ValueError(f"expected virtual_batch_size to be at least 1 and below 2**63, but got {virtual_batch_size}")
    return virtual_batch_size


def _valid(input: Tensor, lengths: Tensor | Sequence[int] | None, mask: Tensor | None) -> Tensor | None:
    if lengths is None and mask is None:
        return None
    if lengths is not None and mask is not None:
        raise ValueError("expected lengths or mask, but got both")
    if not isinstance(input, Tensor):
        raise TypeError(f"expected input to be a tensor, but got {type(input).__name__}")
    if input.is_nested:
        raise ValueError("expected no lengths and no mask with a nested input, which has no padding")
    if mask is not None:
        return _checked_mask(input, mask)
    if input.dim() != 3:
        raise ValueError(f"expected an input of shape (N, C, L) with lengths, but got {input.shape}")
    if not isinstance(lengths, Tensor):
        if not isinstance(lengths, (list, tuple)):
            raise TypeError(f"expected lengths to be a tensor or a list of ints, but got {type(lengths).__name__}")
        if any(type(length) is not int for length in lengths):
            raise TypeError(f"expected lengths to be a tensor or a list of ints, but got the list {lengths!r}")
        lengths = torch.tensor(lengths, dtype=torch.int64)
    if not (lengths.is_cpu or lengths.device == input.device):
        raise RuntimeError(
            f"expected lengths on the CPU or on the device of input, {input.device}, but got {lengths.device}"
        )
    if native.takes(input):
        return torch.arange(input.shape[2], device=input.device) < lengths.to(input.device).unsqueeze(1)
    valid: Tensor = ops.sequence_mask(lengths, input.shape[0], input.shape[2], input.device)
    return valid


def _checked_mask(input: Tensor, mask: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"expected mask to be a tensor of bool, but got {got}")
    if mask.device != input.device:
        raise RuntimeError(f"expected mask on the device of input, {input.device}, but got {mask.device}")
    expected = (*input.shape[:1], *input.shape[2:])
    if mask.shape != expected:
        raise ValueError(
            "expected mask to have the shape of input without its channels, "
            f"{torch.Size(expected)}, but got {mask.shape}"
        )
    return mask
