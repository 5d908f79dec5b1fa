"""Less memory between forward and backward: outputs that are made again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from bnext import _C


@contextlib.contextmanager
def recompute() -> Iterator[None]:
    r"""Within it, the output of a batch norm that others save for backward is not kept: backward makes it again.

    A network holds each activation twice: batch norm saves its input, and what comes next, a convolution say, its own
    input, which is batch norm's output

    .. math::
        y = \mathrm{act}\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    By :math:`x`, which is kept, and the statistics, which are kept too, :math:`y` is made again in one pass over the
    tensor, with the same bits; so gradients are the same bits, too. Asked for by several, it is made once, and freed
    when the last has used it. ``convert(model, fuse=True, recompute=True)`` does it for every call of a model; by
    itself it is for models of ``BatchNormAct`` layers, and for functions::

        with bnext.recompute():
            loss = criterion(model(input), target)
        loss.backward()

    - Made again are outputs of :func:`bnext.functional.batch_norm`, :func:`~bnext.functional.batch_norm_act` and of all
      layers, synchronised ones too, in training and, where the input is kept, in evaluation; and slices and other views
      of them. So an output counts that goes into a convolution, a linear layer, a pooling or a product as it is.
    - With a residual an output is made again only where something else keeps the residual, as the next convolution in a
      residual block does, or where that is made again, too.
    - What an output is made from may be made again itself, but from what is kept: in a long row of residual blocks
      every third sum is kept.
    - Sums and concatenations of outputs, and all else that other operators compute, are kept as ever.
    - It is for the thread that enters it. Where other hooks of saved tensors are at work inside, as those of activation
      checkpointing, they have their way; those outside get all that is not made again, and what outputs are made from.
    - It does nothing in what ``torch.compile`` compiles, where inductor chooses for itself what to keep, while torch
      traces, and where torch allows no such hooks, as in ``torch.func`` transforms (which for their part raise inside
      it).

    Parameters may be changed before backward: it has copies of the vectors. An output may be changed in place, too; but
    what is written to it past autograd, by its ``data`` or by NumPy, is lost. An input or a residual that is changed in
    place is torch's error in backward. See docs/memory.md for what it saves and costs.
    """
    if _stands_aside():
        yield
        return
    hooks = _C.SavedTensorHooks()

    # Compiled autograd calls it, and warns of functions that are not Python's.
    def unpack(packed: Any) -> torch.Tensor:
        return hooks.unpack(packed)

    with torch.autograd.graph.saved_tensors_hooks(hooks.pack, unpack):
        hooks.enter()
        try:
            yield
        finally:
            hooks.exit()


def _stands_aside() -> bool:
    return (
        torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or not _C.SavedTensorHooks.allowed()
    )
