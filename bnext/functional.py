"""Batch normalisation as a function: ``torch.nn.functional.batch_norm``, fused."""

from __future__ import annotations

from torch import Tensor

from bnext import ops


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    r"""Normalise each channel of a batch; a drop-in for :func:`torch.nn.functional.batch_norm`.

    .. math::
        y = \gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    In training, :math:`\mu` and :math:`\sigma^2` are the mean and the biased variance of the channel's
    :math:`m` = N·spatial values, and the running statistics, where given, are updated in place:
    ``running_mean = (1 - momentum)*running_mean + momentum*mean`` and likewise ``running_var`` with the unbiased
    variance, ``var*m/(m - 1)``. In evaluation the running statistics take the place of the batch's.

    Args:
        input: shape (N, C), (N, C, L), (N, C, H, W) or (N, C, D, H, W), any strides; float32, float64, float16
            or bfloat16.
        running_mean, running_var: shape (C,). Both are needed in evaluation; None: not tracked.
        weight, bias: shape (C,), :math:`\gamma` and :math:`\beta`; None: 1 and 0.
        training: whether to use the batch's statistics.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance; positive in training, non-negative in evaluation.

    Each of the length-C tensors is of the input's dtype or float32, in any mix. Statistics are computed in at
    least float32 with sums in float64, and the mean carries more bits than the input, so data with a large offset
    keeps its accuracy. Every finite input is in range, on the CPU and on CUDA: sums that overflow float32 are taken
    again in float64. The result has the input's dtype and memory format, the same bits for any number of threads,
    and derivatives of every order in reverse and forward mode.

    Returns:
        A tensor of the input's shape.

    Raises:
        ValueError: the input has fewer than 2 dimensions, or one value a channel in training; eps is out of
            range; a length-C tensor has another rank.
        TypeError: a dtype is none of the above.
        RuntimeError: a length-C tensor has another length or device; evaluation lacks a running statistic.
        Nothing is read or written before the arguments are found good.

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", 2015, https://arxiv.org/abs/1502.03167.
    """
    if training:
        output: Tensor
        output, _ = ops.batch_norm_train(input, weight, bias, running_mean, running_var, None, momentum, eps)
        return output
    return eval_batch_norm(input, running_mean, running_var, weight, bias, eps)


def eval_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """:func:`batch_norm` in evaluation."""
    if running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(f"{missing} must be defined in evaluation mode, but got None")
    output: Tensor
    output, _ = ops.batch_norm_eval(input, weight, bias, running_mean, running_var, eps)
    return output
