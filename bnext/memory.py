"""Less memory between forward and backward: outputs that backward recomputes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from bnext import _C


@contextlib.contextmanager
def recompute() -> Iterator[None]:
    r"""Within this context outputs of batch norms that other operators save for backward are not kept, but recomputed.

    A network holds each activation twice: batch norm saves its input, and the next operator, a convolution say, saves
    its own input, which is batch norm's output

    .. math::
        y = \mathrm{act}\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    From :math:`x` and the statistics, which are kept, :math:`y` is recomputed in one pass over the tensor, with the
    same bits; so gradients have the same bits, too. If several operators need :math:`y`, it is recomputed once, and
    freed when the last has used it. ``convert(model, fuse=True, recompute=True)`` does this for every call of a model;
    the context by itself is for models of ``BatchNormAct`` layers, and for functions::

        with bnext.recompute():
            loss = criterion(model(input), target)
        loss.backward()

    - It recomputes outputs of :func:`bnext.functional.batch_norm`, :func:`~bnext.functional.batch_norm_act` and of all
      layers, synchronised ones too, in training and, where the input is kept, in evaluation; and slices and other views
      of them. So an output qualifies that goes unchanged into a convolution, a linear layer, a pooling or a product.
    - With a residual an output is recomputed only where something else keeps the residual, as the next convolution in a
      residual block does, or where the residual is recomputed, too.
    - The tensors that an output is recomputed from may be recomputed themselves, but only from kept ones: in a long row
      of residual blocks every third sum is kept.
    - Sums and concatenations of outputs, and all else that other operators compute, are kept as usual.
    - It applies to the thread that enters it. Other saved-tensor hooks that are entered inside, as those of activation
      checkpointing, take precedence; outer ones get all that is not recomputed, and what outputs are recomputed from.
    - It does nothing in what ``torch.compile`` compiles, where inductor itself chooses what to keep, while torch
      traces, and where torch disables such hooks, as in ``torch.func`` transforms (which raise if they are entered
      inside it).

    Parameters may be changed before backward, which has copies of the vectors. An output may be changed in place, too;
    but what is written to it without autograd's knowledge, by its ``data`` or by NumPy, is lost. After an in-place
    change of an input or a residual backward raises torch's error. See docs/memory.md for what it saves and costs.
    """
    if _stands_aside():
        yield
        return
    hooks = _C.SavedTensorHooks()

    # A Python function: compiled autograd calls the hook, and warns of functions that are not Python's.
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
