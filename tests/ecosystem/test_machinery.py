"""torch's machinery around a converted model: compiled autograd, functionalize, distributed tensors, other devices."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import make_grad, make_input
from processes import Pool, World
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.tensor import (
    DeviceMesh,
    Placement,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    init_device_mesh,
)

import bnext

Converted = Callable[[nn.Module], nn.Module]


def gradients(model: nn.Module, image: Tensor, run: Callable[[Callable[[], None]], None]) -> list[Tensor]:
    """The gradients after two forward calls and then two backward calls, which `run` runs."""
    x = image.clone().requires_grad_()
    losses = [model(x).square().sum(), model(x.sin()).exp().mean()]
    for loss in losses:
        run(loss.backward)
    return [x.grad, *(p.grad for p in model.parameters())]


def compiled(backward: Callable[[], None]) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: backward(), backend="eager")()


@pytest.mark.slow
@pytest.mark.parametrize(("fuse", "act"), [(False, nn.ReLU), (True, nn.ReLU), (True, nn.SiLU), (True, nn.LeakyReLU)])
def test_compiled_autograd_over_an_eager_forward(
    fuse: bool, act: type[nn.Module], network: nn.Module, image: Tensor
) -> None:
    network[2], network[5] = act(), act()
    model = bnext.convert(network, fuse=fuse)
    want = gradients(copy.deepcopy(model), image, lambda backward: backward())
    torch.testing.assert_close(gradients(model, image, compiled), want)


@pytest.mark.slow
def test_compiled_autograd_through_a_second_derivative() -> None:
    def penalty(run: Callable[[Callable[[], None]], None]) -> list[Tensor]:
        torch.manual_seed(0)
        layer = bnext.BatchNormAct2d(3, act="silu").double()
        x = make_input((4, 3, 2, 2), dtype=torch.float64).requires_grad_()
        (first,) = torch.autograd.grad((layer(x) * make_grad((4, 3, 2, 2))).sum(), x, create_graph=True)
        run(first.square().sum().backward)
        return [x.grad, layer.weight.grad, layer.bias.grad]

    torch.testing.assert_close(penalty(compiled), penalty(lambda backward: backward()))


@pytest.mark.parametrize("training", [False, True])
def test_functionalize(training: bool, network: nn.Module, converted: Converted, image: Tensor) -> None:
    models = [copy.deepcopy(network).train(training), converted(network).train(training)]
    buffers = [{name: b.clone() for name, b in model.named_buffers()} for model in models]
    outputs = []
    for model, state in zip(models, buffers, strict=True):

        def call(x: Tensor, state: dict[str, Tensor], model: nn.Module = model) -> Any:
            return torch.func.functional_call(model, state, (x,))

        outputs.append(torch.func.functionalize(call)(image, state))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(buffers[1], buffers[0])
    assert torch.equal(buffers[1]["1.running_mean"], network[1].running_mean) is not training


def distributed_step(model: nn.Module, mesh: DeviceMesh, placement: Placement) -> list[Tensor]:
    """Output, gradients and statistics of a model of distributed tensors, each as a whole."""
    vectors = Shard(0) if placement == Shard(1) else Replicate()

    def place(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, p in list(module._parameters.items()):
            module.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, [vectors])))
        for name, b in list(module._buffers.items()):
            module.register_buffer(name, distribute_tensor(b, mesh, [vectors if b.dim() else Replicate()]))

    torch.manual_seed(0)
    distribute_module(model, mesh, place)
    x = distribute_tensor(torch.randn(4, 6, 3, 3), mesh, [placement]).requires_grad_()
    y = model(x)
    (y * y.detach().sin()).sum().backward()
    results = [y, x.grad, model[0].weight.grad, model[0].bias.grad, model[0].running_mean, model[0].running_var]
    return [t.full_tensor() for t in results]


def compare_distributed_steps(world: World) -> None:
    mesh = init_device_mesh("cpu", (world.size,))
    for placement in (Replicate(), Shard(0), Shard(1)):
        model, outcomes = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()), []
        for each in (copy.deepcopy(model), bnext.convert(model)):
            try:
                outcomes.append(distributed_step(each, mesh, placement))
            except NotImplementedError as error:
                assert torch.__version__ < "2.13"  # torch 2.11 distributes no batch norm
                outcomes.append([str(error)])
        for theirs, ours in zip(*outcomes, strict=True):
            assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs, placement


def test_distributed_tensors_give_torchs_results(pools: Callable[[int], Pool]) -> None:
    pools(2).run(compare_distributed_steps)


def test_a_device_without_kernels_has_torchs_batch_norm_and_one_warning(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_python(str(Path(__file__).parent / "toy_device.py"))
    assert (done.returncode, done.stdout.strip()) == (0, "toy:0"), done.stderr
    assert done.stderr.count("bnext: bnext has no kernels for device toy") == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_tangents_of_statistics_are_refused(name: str, training: bool) -> None:
    x = make_input((4, 3))
    statistics = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    with forward_ad.dual_level():
        statistics[name] = forward_ad.make_dual(statistics[name], torch.ones(3))
        with pytest.raises(RuntimeError, match=f"expected {name} to have no tangent"):
            bnext.functional.batch_norm(x, **statistics, training=training)
