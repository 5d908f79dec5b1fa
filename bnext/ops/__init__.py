"""The operators ``torch.ops.bnext.*``: what torch must know about them besides their C++ kernels.

Importing this package loads the extension, which registers the operators and their derivatives, and then their fake
kernels (shapes and strides without data, for torch.compile and torch.export) and their batching rules for
``torch.func.vmap``.
"""

from bnext.ops import fake, vmap
from bnext.ops.operators import (
    all_reduce_sum,
    batch_norm_backward,
    batch_norm_eval,
    batch_norm_gathered,
    batch_norm_recompute,
    batch_norm_stats,
    batch_norm_sync,
    batch_norm_sync_backward,
    batch_norm_train,
    bind,
    sequence_mask,
)

__all__ = [
    "all_reduce_sum",
    "batch_norm_backward",
    "batch_norm_eval",
    "batch_norm_gathered",
    "batch_norm_recompute",
    "batch_norm_stats",
    "batch_norm_sync",
    "batch_norm_sync_backward",
    "batch_norm_train",
    "bind",
    "fake",
    "sequence_mask",
    "vmap",
]
