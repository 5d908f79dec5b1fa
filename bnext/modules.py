"""Drop-in layers: subclasses of torch's own, with another ``forward``.

Constructor, attributes, ``repr``, parameters, buffers and state_dict are torch's, whatever its version; so a
checkpoint of one loads into the other, and ``isinstance(layer, torch.nn.BatchNorm2d)`` holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bnext import functional, ops


def _forward(self: torch.nn.modules.batchnorm._BatchNorm, input: Tensor) -> Tensor:
    """Normalise ``input``; see :func:`bnext.functional.batch_norm`.

    In training the running statistics and ``num_batches_tracked`` are updated in the same operator, once every
    argument has been checked. ``momentum=None`` is the cumulative average, its factor computed on the device.
    """
    self._check_input_dim(input)
    running_mean, running_var = self.running_mean, self.running_var
    if not self.training and (running_mean is not None or running_var is not None):
        return functional.eval_batch_norm(input, running_mean, running_var, self.weight, self.bias, self.eps)
    counter = None
    momentum = self.momentum
    if not (self.training and self.track_running_stats):
        running_mean = running_var = None
    else:
        counter = self.num_batches_tracked
        if counter is None and momentum is None:
            momentum = 0.0  # nothing to average over: torch keeps the running statistics as they are
    output: Tensor
    output, _ = ops.batch_norm_train(
        input, self.weight, self.bias, running_mean, running_var, counter, momentum, self.eps
    )
    return output


class BatchNorm1d(torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d`, fused: (N, C) or (N, C, L). See :func:`bnext.functional.batch_norm`."""

    forward = _forward


class BatchNorm2d(torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, fused: (N, C, H, W). See :func:`bnext.functional.batch_norm`."""

    forward = _forward


class BatchNorm3d(torch.nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d`, fused: (N, C, D, H, W). See :func:`bnext.functional.batch_norm`."""

    forward = _forward


# A lazy layer becomes cls_to_become in a hook of its first call, when that call's forward is already chosen.


class LazyBatchNorm1d(torch.nn.LazyBatchNorm1d):
    """:class:`BatchNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm1d
    forward = _forward


class LazyBatchNorm2d(torch.nn.LazyBatchNorm2d):
    """:class:`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d
    forward = _forward


class LazyBatchNorm3d(torch.nn.LazyBatchNorm3d):
    """:class:`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d
    forward = _forward
