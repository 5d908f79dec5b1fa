"""Batch normalisation as functions: ``torch.nn.functional.batch_norm``, and the same with residual and activation."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from bnext import _C, activations, native, ops, ragged
from bnext.activations import PLAIN, Act, Activation, Epilogue
from bnext.batches import WHOLE, Batch

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Processes that share a batch: how many, and the name of their torch.distributed group.
Group = tuple[int, str]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    virtual_batch_size: int | None = None,
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
        running_mean, running_var: C values, of shape (C,) as a rule. Both are needed in evaluation; None: not tracked.
        weight, bias: C values, :math:`\gamma` and :math:`\beta`; None: 1 and 0.
        training: whether to use the batch's statistics.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance; positive in training, non-negative in evaluation.
        lengths: of the sequences of an (N, C, L) input, N whole numbers from 0 to L: a list, or an int64 or int32
            tensor. What lies beyond a sequence's length is padding. Lengths on a GPU are waited for, to be checked;
            those on the CPU are not.
        mask: of bool and shape (N, \*spatial), in place of lengths: where it is False there is padding.
        virtual_batch_size: in training, normalise so many consecutive images at a time, each part of the batch by its
            own statistics (ghost batch normalisation); the last part may be smaller. None: all images together.

    Padding is ignored, whatever values it holds: statistics, :math:`m` and gradients are those of the other values
    alone, and at padding the result and the input's gradient are 0. A batch (or part) of nothing but padding is
    counted, and changes no running statistic; with a single value the variance is 0, and the running variance stays.
    Running statistics are updated by one part after another, as calls with one part each would update them.
    A nested input (of torch.jagged layout and shape (N, C, j)) is normalised over the values that it has.

    Each of the tensors of C values is of the input's dtype or float32, in any mix. Statistics are computed in at
    least float32 with sums in float64, and the mean carries more bits than the input, so data with a large offset
    keeps its accuracy. Every finite input is in range, on the CPU and on CUDA: sums that overflow float32 are taken
    again in float64. The result has the input's dtype and memory format, the same bits for any number of threads,
    and derivatives of every order in reverse and forward mode.

    Returns:
        A tensor of the input's shape.

    In graphs that other tools read, for tensor subclasses and on devices without kernels, torch's own function runs:
    see :func:`bnext.convert`.

    Raises:
        ValueError: the input has fewer than 2 dimensions, or one value a channel (of a part) in training; eps is out
            of range; lengths and mask are both given, of another shape, or a length is out of range;
            virtual_batch_size is below 1.
        TypeError: a dtype is none of the above; training is no bool, momentum no number, or virtual_batch_size no int.
        RuntimeError: a tensor of C values has another number of them, or is on another device; evaluation lacks a
            running statistic.
        All arguments are checked before anything is read or written.

    Sources: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal
    Covariate Shift", 2015, https://arxiv.org/abs/1502.03167; of ghost batches Hoffer, Hubara and Soudry, "Train longer,
    generalize better", 2017, https://arxiv.org/abs/1705.08741.
    """
    _check_settings(training, momentum)
    batch = WHOLE
    if lengths is not None or mask is not None or virtual_batch_size is not None:
        batch = Batch.of(input, lengths, mask, virtual_batch_size)
    if training:
        return train_batch_norm(input, running_mean, running_var, None, weight, bias, momentum, eps, batch=batch)
    return eval_batch_norm(input, running_mean, running_var, weight, bias, eps, valid=batch.valid)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: Act = "relu",
    *,
    lengths: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
    virtual_batch_size: int | None = None,
) -> Tensor:
    r"""Normalise each channel, add a residual and apply an activation, in one pass forward and one backward.

    .. math::
        y = \mathrm{act}\left(\gamma\,\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta + r\right)

    Only the result is rounded to the input's dtype. Backward recomputes the pre-activation from the input, or reads
    bits instead, so the graph holds, besides per-channel vectors and the input:

    ========================  ===================  ======================================================
    activation                without residual     with residual
    ========================  ===================  ======================================================
    identity                  nothing              nothing
    relu, relu6, leaky_relu   nothing              a bit an element (CUDA: a byte for every 16 bytes)
    all others                nothing              the residual
    ========================  ===================  ======================================================

    In evaluation with a frozen weight, relu, relu6 and leaky_relu hold the bits and no input.

    Args:
        input, running_mean, running_var, weight, bias, training, momentum, eps, lengths, mask, virtual_batch_size: as
            in :func:`batch_norm`. At padding the result is 0, whatever the residual.
        residual: of the input's shape, dtype and device, any strides; None: 0.
        act: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01) or ``("leaky_relu", slope)``,
            ``"silu"``, ``"gelu"`` (the exact one, by erf), ``"hardswish"``, ``"mish"``, ``"elu"`` (alpha 1) or
            ``("elu", alpha)``; None: the identity. At a kink the derivative is torch's: 0 at both of relu6's, and at
            zero the negative side's.

    Returns:
        A tensor of the input's shape.

    Raises:
        ValueError: act is none of the above, or the residual has another shape.
        TypeError: the residual has another dtype, or is no tensor.
        RuntimeError: the residual is on another device. And what :func:`batch_norm` raises.
        All arguments are checked before anything is read or written.
    """
    _check_settings(training, momentum)
    epilogue = (residual, *activations.parse(act))
    batch = WHOLE
    if lengths is not None or mask is not None or virtual_batch_size is not None:
        batch = Batch.of(input, lengths, mask, virtual_batch_size)
    if training:
        return train_batch_norm(
            input, running_mean, running_var, None, weight, bias, momentum, eps, epilogue, batch=batch
        )
    return eval_batch_norm(input, running_mean, running_var, weight, bias, eps, epilogue, batch.valid)


def _check_settings(training: object, momentum: object) -> None:
    """Check, as torch does, also what the operators do not get: training, and the momentum of an evaluation."""
    if not isinstance(training, bool):
        raise TypeError(f"expected training to be a bool, but got {type(training).__name__}")
    if not isinstance(momentum, (float, int, fx.Proxy)) and not hasattr(type(momentum), "__float__"):
        raise TypeError(f"expected momentum to be a float, but got {type(momentum).__name__}")


def train_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    epilogue: Epilogue = PLAIN,
    group: Group | None = None,
    batch: Batch = WHOLE,
) -> Tensor:
    """:func:`batch_norm` or :func:`batch_norm_act` in training, which also counts the batch.

    ``momentum=None`` is the cumulative average of the batches counted, its factor computed on the device. With a
    ``group`` the statistics are those of the batches of all its processes together.

    Raises:
        ValueError: a group is given, and a batch in parts.
    """
    arguments = (input, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    compiling = torch.compiler.is_compiling()
    output: Tensor | None
    if group is None and batch is WHOLE and not compiling:
        output = _C.batch_norm_train(*arguments, *epilogue)
        if output is not None:
            return output
    # torch cannot export a cumulative average, whose factor it computes on the host.
    exportable = momentum is not None or not (compiling and native.is_exporting())
    if group is None and exportable and native.takes(input):
        vectors = (running_mean, running_var, num_batches_tracked, weight, bias)
        if ragged.is_jagged(input):
            return ragged.on_values(train_batch_norm, input, vectors, (momentum, eps), epilogue)
        return native.batch_norm(input, *vectors, True, momentum, eps, epilogue, *batch[:2])
    if num_batches_tracked is not None and not (
        num_batches_tracked.dtype is torch.int64 and num_batches_tracked.device == input.device
    ):
        # A counter that only torch takes: of another dtype, from an averaged state_dict, or left on another device.
        counted = num_batches_tracked + 1
        factor = 1.0 / float(counted) if momentum is None else momentum
        output = train_batch_norm(
            input, running_mean, running_var, None, weight, bias, factor, eps, epilogue, group, batch
        )
        num_batches_tracked.copy_(counted)
        return output
    if group is not None:
        output = ops.batch_norm_sync(*arguments, *group, *epilogue, **batch.of_group())
    elif batch is WHOLE:
        output, _, _ = ops.batch_norm_train(*arguments, *epilogue)
    else:
        output, _, _ = ops.batch_norm_train(*arguments, *epilogue, **batch._asdict())
    return output


def eval_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue = PLAIN,
    valid: Tensor | None = None,
) -> Tensor:
    """:func:`batch_norm` or :func:`batch_norm_act` in evaluation."""
    if running_mean is None or running_var is None:
        missing = "running_mean" if running_mean is None else "running_var"
        raise RuntimeError(f"{missing} must be defined in evaluation mode, but got None")
    vectors = (weight, bias, running_mean, running_var)
    compiling = torch.compiler.is_compiling()
    output: Tensor | None
    if valid is None and not compiling:
        output = _C.batch_norm_eval(input, *vectors, eps, *epilogue)
        if output is not None:
            return output
    if native.takes(input):
        parameters, statistics = vectors[:2], vectors[2:]
        if ragged.is_jagged(input):
            return ragged.on_values(eval_batch_norm, input, (*statistics, *parameters), (eps,), epilogue)
        return native.batch_norm(input, *statistics, None, *parameters, False, 0.0, eps, epilogue, valid)
    if compiling and not keeps_operators() and _is_arithmetic(input, vectors, eps, epilogue):
        output = _composed_eval(input, running_mean, running_var, weight, bias, eps, epilogue)
        return output if valid is None else torch.where(valid.unsqueeze(1), output, 0)
    options = {} if valid is None else {"valid": valid}
    output, _, _ = ops.batch_norm_eval(input, *vectors, eps, *epilogue, **options)
    return output


class _Capture(threading.local):
    """What a graph that is being captured in this thread is for."""

    eager = False  # to run as it is, operator by operator


capture = _Capture()


def keeps_operators() -> bool:
    """Whether a captured graph should hold bnext's operators rather than arithmetic: if it runs as it is."""
    return capture.eager


def _is_arithmetic(input: Tensor, vectors: tuple[Tensor | None, ...], eps: float, epilogue: Epilogue) -> bool:
    """Whether to show a compiler the arithmetic of an evaluation: only if no gradient will be asked for, whose sums the
    operator computes faster, and if arithmetic does not broadcast or promote arguments that the operator refuses."""
    residual = epilogue[0] if epilogue else None
    if input.dim() < 2 or input.dtype not in DTYPES or eps < 0:
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (input, *vectors[:2], residual)):
        return False
    if residual is not None and (residual.shape != input.shape or residual.dtype != input.dtype):
        return False
    return all(
        t is None
        or (t.shape == input.shape[1:2] and t.dtype in (torch.float32, input.dtype) and t.device == input.device)
        for t in vectors
    )


def _composed_eval(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    epilogue: Epilogue,
) -> Tensor:
    """:func:`eval_batch_norm` composed of torch's operators, for compilers, which fuse pointwise arithmetic with what
    precedes and follows it; equal to bnext's operator up to rounding."""
    y = native.normalized_by(input, running_mean, running_var, weight, bias, eps)
    residual, name, slope = epilogue or (None, "identity", 0.0)
    if residual is not None:
        y = y + residual.to(y.dtype)
    output: Tensor = activations.compose(y, Activation(name, slope)).to(input.dtype)
    return output
