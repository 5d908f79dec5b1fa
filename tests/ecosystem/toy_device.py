"""A device for which bnext has no kernels: torch's private one, whose tensors hold others on the CPU. Registering it
changes torch for good, so that it is a program of its own: it prints what a converted model gives there."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import bnext


class ToyTensor(Tensor):
    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> ToyTensor:
        wrapper = Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), dtype=held.dtype, device="toy:0")
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return fallback(op, *args, **(kwargs or {}))


def fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = tree_map_only(ToyTensor, lambda t: t.held, (args, kwargs))
    if "device" in kwargs:
        kwargs["device"] = "cpu"
    return tree_map_only(Tensor, ToyTensor, op(*args, **kwargs))


def main() -> None:
    _setup_privateuseone_for_python_backend("toy")
    library = torch.library.Library("_", "IMPL")
    library.fallback(fallback, "PrivateUse1")
    logging.basicConfig(format="%(name)s: %(message)s")
    torch.manual_seed(0)
    model = bnext.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    expected = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    for layer in (model[0], model[2]):
        layer._parameters = {k: ToyTensor(p.detach()) for k, p in layer._parameters.items()}
        layer._buffers = {k: ToyTensor(b) for k, b in layer._buffers.items()}
    x = torch.randn(4, 3, 5, 5)
    for training in (True, False):
        y = model.train(training)(ToyTensor(x))
        torch.testing.assert_close(y.held, expected.train(training)(x))
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(model.get_buffer(name).held, buffer)
    print(y.device)


if __name__ == "__main__":
    main()
