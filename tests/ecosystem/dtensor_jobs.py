"""What tests of distributed tensors run in several processes."""

from __future__ import annotations

import copy

import torch
from processes import World
from torch import nn
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh

import bnext


def step(model: nn.Module, mesh: torch.distributed.DeviceMesh, placement: object) -> list[torch.Tensor]:
    """Output, gradients and statistics of a model of distributed tensors, each as a whole."""
    vectors = Shard(0) if placement == Shard(1) else Replicate()

    def place(_: str, module: nn.Module, mesh: torch.distributed.DeviceMesh) -> None:
        for name, p in list(module._parameters.items()):
            module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [vectors])))
        for name, b in list(module._buffers.items()):
            module.register_buffer(name, distribute_tensor(b, mesh, [vectors if b.dim() else Replicate()]))

    distribute_module(model, mesh, place)
    x = distribute_tensor(torch.randn(4, 6, 3, 3), mesh, [placement]).requires_grad_()
    y = model(x)
    (y * y.detach().sin()).sum().backward()
    found = [y, x.grad, model[0].weight.grad, model[0].bias.grad, model[0].running_mean, model[0].running_var]
    return [t.full_tensor() for t in found]


def outcome(model: nn.Module, mesh: torch.distributed.DeviceMesh, placement: object) -> list[torch.Tensor] | str:
    """What a step gives, or why it is not to be had: torch 2.11 distributes no batch norm."""
    try:
        return step(model, mesh, placement)
    except NotImplementedError as error:
        return str(error)


def same_as_torchs(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    for placement in (Replicate(), Shard(0), Shard(1)):
        model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
        found = []
        for converted in (copy.deepcopy(model), bnext.convert(model)):
            torch.manual_seed(0)
            found.append(outcome(converted, mesh, placement))
        if isinstance(found[0], str):
            assert found[1] == found[0], placement
            continue
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b), placement
