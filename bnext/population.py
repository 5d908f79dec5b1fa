"""Running statistics of a whole data set: every value that a layer sees counts once, in whichever batch it comes."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, distributed
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel

from bnext import native, ops, ragged
from bnext.batches import Batch
from bnext.freezing import mode_of, set_mode
from bnext.functional import DTYPES
from bnext.modules import Lengths

_logger = logging.getLogger("bnext")


@torch.no_grad()
def update_bn(loader: Iterable[Any], model: torch.nn.Module, device: int | str | torch.device | None = None) -> None:
    r"""Set the running statistics of a model's batch norms to those of all data of a loader together; takes the place
    of :func:`torch.optim.swa_utils.update_bn`, after weights were averaged, say.

    The model is called, in training and without gradients, on every batch. Of the :math:`n` values :math:`x_i` of a
    channel in all calls of a layer

    .. math::
        \mu_\text{running} = \frac{1}{n}\sum_i x_i \qquad
        \sigma^2_\text{running} = \frac{1}{n - 1}\sum_i (x_i - \mu_\text{running})^2

    whichever batches they came in: moments are merged, in float64, by Chan's formula. torch's function averages the
    means and variances of batches: a batch of 2 counts as much as one of 64, and the variance lacks the spread of the
    batches' means. With batches of equal size its mean is the same, and its variance smaller.

    Meanwhile every layer normalises by its batch's statistics, as it does in training, so that later layers see the
    inputs that they see in training. Statistics are written after the last batch. If the loader or the model raises
    before, they are as they were; modes and hooks are restored in any case.

    - It updates all instances of torch's batch norms that have running statistics and are in training after
      ``model.train()``; not those that :func:`bnext.freeze` froze. ``momentum`` does not matter, not even if 0.
    - A layer that is called several times, or shared, has the statistics of all its calls.
    - ``num_batches_tracked`` becomes the number of the layer's calls, in all processes.
    - A layer that no batch reaches keeps what it has, and is listed in one warning of the logger ``"bnext"``.
    - What ``torch.compile`` or ``bnext.convert(fuse=True)`` compiled runs eagerly meanwhile, in the whole process, and
      compiled again afterwards.
    - If ``torch.distributed`` is initialised, values of all its processes count, and all get the same statistics. Each
      process calls it with its own share of the data, and the same model. Numbers of batches may differ, and be 0,
      unless the model's forward has collectives, as with synchronised batch norms and sharded models. One collective at
      the end serves all layers. Of a ``DistributedDataParallel`` model the wrapped module is called.

    Args:
        loader: gives batches, of which a list's or tuple's first item is the input.
        model: called with that input alone.
        device: where the input is moved to, if given.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``, ``loader`` not iterable, or ``device`` no device.
        ValueError: a layer of a lazy class is not initialised yet; the message names it.
        What the loader and the model raise.

    Source: Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"expected model to be a torch.nn.Module, but got {type(model).__name__}")
    if not (hasattr(type(loader), "__iter__") or hasattr(type(loader), "__getitem__")):
        raise TypeError(f"expected loader to be iterable, but got {type(loader).__name__}")
    if not (device is None or isinstance(device, int | str | torch.device)):
        raise TypeError(f"expected device to be a torch.device, but got {type(device).__name__}")
    inner = _unwrapped(model)
    modes = {module: mode_of(module) for module in model.modules()}
    try:
        model.train()
        seen = [_Seen(name, module) for name, module in inner.named_modules() if _is_updated(module)]
        if not seen:
            return
        _check_initialized(seen)
        with _Uncompiled(), _observed(seen):
            for batch in loader:
                input = batch[0] if isinstance(batch, list | tuple) else batch
                inner(input if device is None else input.to(device))
    finally:
        for module, mode in modes.items():
            set_mode(module, mode)
    _write(seen, _merged_over_processes(seen))


def _is_updated(module: torch.nn.Module) -> bool:
    if not (isinstance(module, _BatchNorm) and module.training and module.track_running_stats):
        return False
    return module.running_mean is not None and module.running_var is not None


class _Seen:
    """What a layer has seen: for each channel the mean of all values and their sum of squared deviations from it, then
    the number of values, (2*C + 1,) in float64; and the number of calls."""

    def __init__(self, name: str, layer: torch.nn.Module) -> None:
        self.name = name or "(the module itself)"
        self.layer = cast(_BatchNorm, layer)
        self.input = list(inspect.signature(type(layer).forward).parameters)[1]
        self.moments: Tensor | None = None
        self.calls = 0
        self._lock = threading.Lock()  # replicas of the layer run in threads

    def before_forward(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        input = args[0] if args else kwargs[self.input]
        new = _moments(input, self.layer.eps, kwargs.get("lengths"), kwargs.get("mask"))
        with self._lock:
            self.moments = new if self.moments is None else _merge(self.moments, new.to(self.moments.device))
            self.calls += 1

    def channels(self) -> int:
        return cast(Tensor, self.layer.running_mean).numel()

    def buffers(self) -> list[Tensor]:
        found = (self.layer.running_mean, self.layer.running_var, self.layer.num_batches_tracked)
        return [buffer for buffer in found if buffer is not None]


def _check_initialized(seen: list[_Seen]) -> None:
    lazy = [s.name for s in seen if isinstance(s.layer, LazyModuleMixin) and s.layer.has_uninitialized_params()]
    if lazy:
        raise ValueError(f"expected a model that was called before, but these layers are lazy still: {', '.join(lazy)}")


@contextlib.contextmanager
def _observed(seen: list[_Seen]) -> Iterator[None]:
    """Within it the layers pass on their inputs; afterwards their buffers hold what they held before."""
    buffers = [(buffer, buffer.clone()) for s in seen for buffer in s.buffers()]
    hooks = [s.layer.register_forward_pre_hook(s.before_forward, with_kwargs=True) for s in seen]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in buffers:
            buffer.copy_(before)


def _moments(input: Tensor, eps: float, lengths: Lengths = None, mask: Tensor | None = None) -> Tensor:
    """The moments of one call's input, in the form in which ``_Seen`` has those of all calls."""
    if ragged.is_jagged(input):
        input = ragged.rows(input)[0]
    valid = Batch.of(input, lengths, mask).valid
    if not native.takes(input) and input.dtype in DTYPES:
        stats: Tensor = ops.batch_norm_stats(input, eps, valid)
        return stats
    # mps has no float64.
    wide = input.to("cpu" if input.device.type == "mps" else input.device, torch.float64).transpose(0, 1).flatten(1)
    if valid is not None:
        wide = wide[:, valid.flatten().to(wide.device)]
    count = wide.shape[1]
    if count == 0:
        return wide.new_zeros(2 * len(wide) + 1)
    var, mean = torch.var_mean(wide, 1, correction=0)
    return torch.cat([mean, var * count, mean.new_full((1,), count)])


def _merge(a: Tensor, b: Tensor) -> Tensor:
    """The moments of two sets of values together, by Chan's formula, as ``LocalStats::merge`` has it in C++."""
    (mean, m2), (other_mean, other_m2) = a[:-1].view(2, -1), b[:-1].view(2, -1)
    total = a[-1] + b[-1]
    share = b[-1] / total.clamp(min=1)
    delta = other_mean - mean
    # delta is not finite where a mean is infinite.
    merged = torch.where(delta.isfinite(), mean + delta * share, mean * (1 - share) + other_mean * share)
    return torch.cat([merged, m2 + other_m2 + delta * (delta * (a[-1] * share)), total[None]])


def _merged_over_processes(seen: list[_Seen]) -> list[tuple[Tensor, Tensor]]:
    """Each layer's moments and number of calls, of all processes, on the device that the collective runs on."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    on_cpu = not several or "cpu" in distributed.get_backend_config()
    device = torch.device("cpu") if on_cpu else cast(Tensor, seen[0].layer.running_mean).device
    sizes = [2 * s.channels() + 1 for s in seen]
    parts: list[Tensor] = []
    for s, size in zip(seen, sizes, strict=True):
        own = torch.zeros(size, dtype=torch.float64) if s.moments is None else s.moments
        parts += [own.to(device), torch.tensor([s.calls], dtype=torch.float64, device=device)]
    mine = torch.cat(parts)
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())] if several else [mine]
    if several:
        distributed.all_gather(everyone, mine)
    layers = torch.stack(everyone).split([size + 1 for size in sizes], dim=1)
    return [(functools.reduce(_merge, rows[:, :-1].unbind()), rows[:, -1].sum()) for rows in layers]


def _write(seen: list[_Seen], merged: list[tuple[Tensor, Tensor]]) -> None:
    unseen = []
    for s, (moments, calls) in zip(seen, merged, strict=True):
        if moments[-1] == 0:
            unseen.append(s.name)
            continue
        mean, m2 = moments[:-1].view(2, -1)
        values = (mean, m2 / (moments[-1] - 1), calls)
        for buffer, value in zip(s.buffers(), values, strict=False):
            buffer.copy_(value.view(buffer.shape))
    if unseen:
        _logger.warning(
            "update_bn left %d batch norm(s) as they were, which no batch reached: %s", len(unseen), ", ".join(unseen)
        )


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside ``DistributedDataParallel``, whose forward has collectives, and inside ``torch.compile``."""
    inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, torch.nn.Module) else model


class _Uncompiled:
    """Compiled models run eagerly, because compiled code may not call hooks that were added later. The compiler's
    stance is global to the process, so the first of several threads sets it, and the last restores it."""

    _lock = threading.Lock()
    _entered = 0
    _stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if _Uncompiled._entered == 0 and "torch._dynamo" in sys.modules:
                _Uncompiled._stance = torch.compiler.set_stance("force_eager")
            _Uncompiled._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            _Uncompiled._entered -= 1
            if _Uncompiled._entered == 0 and _Uncompiled._stance is not None:
                _Uncompiled._stance.__exit__(None, None, None)
                _Uncompiled._stance = None
