"""Drop-in layers: subclasses of torch's own, with another ``forward``.

Constructor, attributes, ``repr``, parameters, buffers and state_dict are torch's, whatever its version; so a
checkpoint of one loads into the other, and ``isinstance(layer, torch.nn.BatchNorm2d)`` holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bnext import activations, functional
from bnext.activations import PLAIN, Act, Activation, Epilogue
from bnext.attached import without_attached
from bnext.batches import WHOLE, Batch
from bnext.functional import Group

BatchNorm = torch.nn.modules.batchnorm._BatchNorm


Lengths = Tensor | Sequence[int] | None

# Attributes by which a layer may differ from torch's, with their defaults. They may be set on every layer whose forward
# is bnext's; convert sets those that it is asked for.
SINGLE_VALUE = "single_value"  # "running": a training batch of one value a channel takes the running statistics
VIRTUAL_BATCH_SIZE = "virtual_batch_size"  # None
UPDATE_IN_BACKWARD = "update_in_backward"  # True


def normalize(
    self: BatchNorm,
    input: Tensor,
    epilogue: Epilogue = PLAIN,
    group: Group | None = None,
    lengths: Lengths = None,
    mask: Tensor | None = None,
) -> Tensor:
    """What every layer does with its input; ``group``: the processes that share a training batch."""
    self._check_input_dim(input)
    running_mean, running_var = self.running_mean, self.running_var
    training = self.training
    policy, size, update_in_backward = _options(self)
    if policy is not None and training and group is None and running_mean is not None:
        training = not _takes_running(policy, input)
    if not training and (running_mean is not None or running_var is not None):
        valid = None if lengths is None and mask is None else Batch.of(input, lengths, mask).valid
        return functional.eval_batch_norm(
            input, running_mean, running_var, self.weight, self.bias, self.eps, epilogue, valid
        )
    counter = None
    momentum = self.momentum
    if not (training and self.track_running_stats):
        running_mean = running_var = None
    else:
        counter = self.num_batches_tracked
        if counter is None and momentum is None:
            momentum = 0.0  # nothing to average over: torch keeps the running statistics as they are
    batch = WHOLE
    if lengths is not None or mask is not None or size is not None or not update_in_backward:
        batch = Batch.of(input, lengths, mask, size, update_in_backward)
    return functional.train_batch_norm(
        input, running_mean, running_var, counter, self.weight, self.bias, momentum, self.eps, epilogue, group, batch
    )


def _options(self: BatchNorm) -> tuple[str | None, int | None, bool]:
    """The values of the attributes above."""
    if torch.compiler.is_compiling():
        # torch._dynamo would keep a layer alive whose __dict__ is read, until the garbage collector runs.
        return (
            getattr(self, SINGLE_VALUE, None),
            getattr(self, VIRTUAL_BATCH_SIZE, None),
            getattr(self, UPDATE_IN_BACKWARD, True),
        )
    own = self.__dict__  # getattr would look for a missing attribute in three more places
    return own.get(SINGLE_VALUE), own.get(VIRTUAL_BATCH_SIZE), own.get(UPDATE_IN_BACKWARD, True)


def _takes_running(policy: str, input: Tensor) -> bool:
    """Whether a training batch has one value a channel, to which the policy applies.

    Raises:
        ValueError: the policy is unknown.
    """
    check_single_value(policy)
    return not input.is_nested and input.dim() >= 2 and input.numel() == input.shape[1]


def check_single_value(policy: object) -> None:
    """
    Raises:
        ValueError: it is none of the policies for a training batch of one value a channel.
    """
    if policy not in (None, "running"):
        raise ValueError(f'expected single_value to be "running" or None, but got {policy!r}')


def is_traced(input: object) -> bool:
    """Whether the input is a proxy of a ``torch.fx`` tracer."""
    return isinstance(input, fx.Proxy) and isinstance(input.tracer, fx.Tracer)


def _leaf(layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """Record the call as one node of the graph that a ``torch.fx`` tracer builds. A tracer takes torch's own layers for
    leaves by the name of their module; it would trace into ours, and bake in what depends on ``training``."""
    tracer = args[0].tracer
    given = {name: value for name, value in kwargs.items() if value is not None}
    output: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(layer), args, given)
    return output


def _forward(self: BatchNorm, input: Tensor, *, lengths: Lengths = None, mask: Tensor | None = None) -> Tensor:
    """Normalise ``input``; see :func:`bnext.functional.batch_norm`, also for ``lengths=`` and ``mask=``.

    In training the running statistics and ``num_batches_tracked`` are updated in the same operator, once every
    argument has been checked. ``momentum=None`` is the cumulative average, its factor computed on the device.
    """
    if is_traced(input):
        return _leaf(self, input, lengths=lengths, mask=mask)
    return normalize(self, input, lengths=lengths, mask=mask)


def _scriptable(self: BatchNorm) -> torch.nn.Module:
    """What ``torch.jit.script`` takes in the layer's place: torch's layer with the same parameters and buffers."""
    if type(self).forward is not _forward:
        return self  # a subclass with a forward of its own
    plain = without_attached(self)
    plain.__class__ = next(base for base in type(self).__mro__ if base.__module__.startswith("torch.nn."))
    return plain


class BatchNorm1d(torch.nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d`, fused: (N, C) or (N, C, L). See :func:`bnext.functional.batch_norm`."""

    forward = _forward
    __prepare_scriptable__ = _scriptable


class BatchNorm2d(torch.nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d`, fused: (N, C, H, W). See :func:`bnext.functional.batch_norm`."""

    forward = _forward
    __prepare_scriptable__ = _scriptable


class BatchNorm3d(torch.nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d`, fused: (N, C, D, H, W). See :func:`bnext.functional.batch_norm`."""

    forward = _forward
    __prepare_scriptable__ = _scriptable


# A lazy layer turns into cls_to_become in a hook of its first call, which then still runs the lazy class's forward.


class _Lazy:
    """What the lazy layers share: torch passes all arguments of a first call to ``initialize_parameters``."""

    def initialize_parameters(self, input: Tensor, lengths: Lengths = None, mask: Tensor | None = None) -> None:
        super().initialize_parameters(input)  # type: ignore[misc]


class LazyBatchNorm1d(_Lazy, torch.nn.LazyBatchNorm1d):
    """:class:`BatchNorm1d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm1d
    forward = _forward
    __prepare_scriptable__ = _scriptable


class LazyBatchNorm2d(_Lazy, torch.nn.LazyBatchNorm2d):
    """:class:`BatchNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm2d
    forward = _forward
    __prepare_scriptable__ = _scriptable


class LazyBatchNorm3d(_Lazy, torch.nn.LazyBatchNorm3d):
    """:class:`BatchNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = BatchNorm3d
    forward = _forward
    __prepare_scriptable__ = _scriptable


class Activated(BatchNorm):
    """A batch norm with an activation: what all such layers share."""

    @property
    def act(self) -> Act:
        """The activation, as the constructor takes it; may be set."""
        act: Act = self.__dict__.get("_act")
        return act

    @act.setter
    def act(self, act: Act) -> None:
        self.__dict__["_activation"] = activations.parse(act)
        self.__dict__["_act"] = act

    def normalize(
        self, input: Tensor, epilogue: Epilogue = PLAIN, lengths: Lengths = None, mask: Tensor | None = None
    ) -> Tensor:
        """Normalise ``input``, followed by ``epilogue`` in place of the layer's activation."""
        return normalize(self, input, epilogue, lengths=lengths, mask=mask)

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        *,
        lengths: Lengths = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """act(batch_norm(input) + residual); see :func:`bnext.functional.batch_norm_act`, also for ``lengths=`` and
        ``mask=``."""
        if is_traced(input):
            return _leaf(self, input, *([] if residual is None else [residual]), lengths=lengths, mask=mask)
        # A layer that became one by a change of class has no activation yet.
        activation: Activation = self.__dict__.get("_activation", activations.IDENTITY)
        return self.normalize(input, (residual, *activation), lengths, mask)

    def __prepare_scriptable__(self) -> torch.nn.Module:
        raise NotImplementedError(
            f"bnext.{type(self).__name__} cannot be scripted: expected a layer that torch.jit.script knows, such as "
            "bnext.BatchNorm2d and torch.nn.ReLU (or use torch.jit.trace, or torch.export)"
        )


class _BatchNormAct(Activated):
    """act(batch_norm(input) + residual): what the three ranks share."""

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        act: Act = "relu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self.act = act

    def extra_repr(self) -> str:
        plain: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, act={self.__dict__['_activation']}"


_ACT_DOC = """act(batch_norm(input) + residual) in one operator; see :func:`bnext.functional.batch_norm_act`.

    A :class:`{base}`, with its parameters, buffers and state_dict keys, that takes the place of
    ``nn.Sequential({base}(C), nn.ReLU())``. ``forward(input, residual=None)``, both of shape {shape}.

    Args:
        num_features, eps, momentum, affine, track_running_stats, device, dtype: as in :class:`{base}`.
        act: ``"identity"``, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` or ``("leaky_relu", slope)``, ``"silu"``,
            ``"gelu"``, ``"hardswish"``, ``"mish"``, ``"elu"`` or ``("elu", alpha)``, or None for the identity; the
            attribute ``act`` may be set later.

    Raises:
        ValueError: an unknown activation.

    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` takes it for a plain batch norm and drops the activation.
    """


class BatchNormAct1d(_BatchNormAct, BatchNorm1d):
    __doc__ = _ACT_DOC.format(base="torch.nn.BatchNorm1d", shape="(N, C) or (N, C, L)")


class BatchNormAct2d(_BatchNormAct, BatchNorm2d):
    __doc__ = _ACT_DOC.format(base="torch.nn.BatchNorm2d", shape="(N, C, H, W)")


class BatchNormAct3d(_BatchNormAct, BatchNorm3d):
    __doc__ = _ACT_DOC.format(base="torch.nn.BatchNorm3d", shape="(N, C, D, H, W)")
