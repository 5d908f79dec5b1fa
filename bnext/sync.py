"""Batch norm over the batches of several processes together."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from bnext import modules
from bnext.activations import PLAIN, Act, Epilogue
from bnext.attached import detach_forward
from bnext.functional import Group
from bnext.modules import Lengths


def _group_of(process_group: Any) -> Group | None:
    """The group that shares a batch; None where that is one process alone."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    group: Any = distributed.group.WORLD if process_group is None else process_group
    outsider = group is distributed.GroupMember.NON_GROUP_MEMBER
    if not (outsider or isinstance(group, distributed.ProcessGroup)):
        raise TypeError(f"expected process_group to be a process group or None, but got {type(group).__name__}")
    size = distributed.get_world_size(group)
    return (size, group.group_name) if size > 1 else None


class SyncBatchNorm(modules.Activated, torch.nn.SyncBatchNorm):
    """:class:`torch.nn.SyncBatchNorm`, on CPU and CUDA: act(batch_norm(input) + residual) by the statistics of all
    processes of a group.

    In training each process normalises its own share of the batch, ``forward(input, residual=None)``, both of shape
    (N, C, ...), by the mean and variance of all shares together; in evaluation there is nothing to exchange. Shares may
    have different sizes, and be empty. Each direction has one collective: forward gathers 2·C + 1 float64 values from
    each process, its means, its sums of squared deviations from them and its count, which every process merges in the
    same order by Chan's formula; backward sums 2·C values over the processes. Gradients of weight and bias are those of
    the own share, as :class:`torch.nn.parallel.DistributedDataParallel` expects, which also keeps the parameters equal
    on all processes: the gradient of the input relies on it. All processes must take part in every collective: backward
    has one where the input requires a gradient, so the input must require one on all processes or on none.

    Derivatives of any order, and forward mode, are those of the sum of all processes' losses. They take collectives of
    their own, so all processes must run the same passes in the same order: a second backward pass, or a call with
    tangents, on all of them or on none. Where inputs require a gradient, processes may differentiate different
    parameters in tangents and second derivatives, not beyond.

    Args:
        num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype: as in
            :class:`torch.nn.SyncBatchNorm`. The group's backend must work on the input's device: gloo on the CPU,
            NCCL on CUDA.
        act: as in :class:`bnext.BatchNormAct2d`; None: the identity.

    Raises:
        ValueError: an unknown activation; an input of fewer than 2 dimensions or without channels.
        What torch raises when another process of the group fails or does not answer in time.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        act: Act = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, process_group, device, dtype, **kwargs
        )
        self.act = act
        _let_ddp_accept_cpu()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _let_ddp_accept_cpu()

    def extra_repr(self) -> str:
        plain: str = torch.nn.SyncBatchNorm.extra_repr(self)
        return plain if self.act is None else f"{plain}, act={self.__dict__['_activation']}"

    def normalize(
        self, input: Tensor, epilogue: Epilogue = PLAIN, lengths: Lengths = None, mask: Tensor | None = None
    ) -> Tensor:
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        group = _group_of(self.process_group) if self.training else None
        return modules.normalize(self, input, epilogue, group, lengths, mask)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """As :meth:`torch.nn.SyncBatchNorm.convert_sync_batchnorm`, in place: :func:`synchronize`."""
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"expected module to be a torch.nn.Module, but got {type(module).__name__}")
        synchronize(module, process_group)
        return module


# The key of the class that a layer had before it was synchronised.
_BEFORE = "_before_sync"

_SYNCHRONIZABLE: set[type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d,
    torch.nn.BatchNorm2d,
    torch.nn.BatchNorm3d,
    modules.BatchNorm1d,
    modules.BatchNorm2d,
    modules.BatchNorm3d,
    modules.BatchNormAct1d,
    modules.BatchNormAct2d,
    modules.BatchNormAct3d,
}


def synchronize(module: torch.nn.Module, process_group: Any = None) -> None:
    """Turn every batch norm of a known class into a :class:`SyncBatchNorm` of this group, in place."""
    _let_ddp_accept_cpu()
    for m in module.modules():
        if type(m) in _SYNCHRONIZABLE:
            m.__dict__[_BEFORE] = type(m)
        elif type(m) not in (torch.nn.SyncBatchNorm, SyncBatchNorm):
            continue
        m.__class__ = SyncBatchNorm
        m.process_group = process_group
        detach_forward(m)


def separate(module: torch.nn.Module) -> list[tuple[torch.nn.Module, Any]]:
    """Undo :func:`synchronize`. Returns the layers, and the groups that they had."""
    separated: list[tuple[torch.nn.Module, Any]] = []
    for m in module.modules():
        if type(m) is SyncBatchNorm and _BEFORE in m.__dict__:
            m.__class__ = m.__dict__.pop(_BEFORE)
            separated.append((m, m.__dict__.pop("process_group", None)))
    return separated


class _Others:
    """A model as torch's check sees it: without bnext's synchronised layers."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def modules(self) -> list[torch.nn.Module]:
        return [m for m in self._module.modules() if not isinstance(m, SyncBatchNorm)]


@functools.cache
def _let_ddp_accept_cpu() -> None:
    """Let ``DistributedDataParallel`` accept bnext's layers on the CPU, from the first of them on.

    It refuses every ``torch.nn.SyncBatchNorm`` there, because torch's forward needs CUDA. It asks ``isinstance``, to
    which a subclass cannot say no; so its check is replaced by one that does not see bnext's layers.
    """
    check = getattr(DistributedDataParallel, "_passing_sync_batchnorm_handle", None)
    if check is None:
        return

    def check_others(self: DistributedDataParallel, module: torch.nn.Module) -> None:
        check(self, _Others(module))

    DistributedDataParallel._passing_sync_batchnorm_handle = check_others  # type: ignore[method-assign]
