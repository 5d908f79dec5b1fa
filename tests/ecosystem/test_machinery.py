"""torch's machinery around a converted model: compiled autograd, functionalize, distributed tensors, other devices."""

from __future__ import annotations

import copy
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dtensor_jobs
import pytest
import torch
from cases import make_grad, make_input
from processes import Pool
from torch import Tensor, nn
from torch.autograd import forward_ad

import bnext

Converted = Callable[[nn.Module], nn.Module]


def gradients(model: nn.Module, image: Tensor, run: Callable[[Callable[[], None]], None]) -> list[Tensor]:
    """Of two forward calls that come before both backward calls, which `run` runs."""
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
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.LeakyReLU])
def test_compiled_autograd_over_an_eager_forward(
    act: type[nn.Module], network: nn.Module, converted: Converted, image: Tensor
) -> None:
    network[2], network[5] = act(), act()
    model = converted(network)
    want = gradients(copy.deepcopy(model), image, lambda backward: backward())
    for a, b in zip(gradients(model, image, compiled), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_compiled_autograd_through_a_second_derivative() -> None:
    def penalty(run: Callable[[Callable[[], None]], None]) -> list[Tensor]:
        torch.manual_seed(0)
        layer = bnext.BatchNormAct2d(3, act="silu").double()
        x = make_input((4, 3, 2, 2), dtype=torch.float64).requires_grad_()
        (first,) = torch.autograd.grad((layer(x) * make_grad((4, 3, 2, 2))).sum(), x, create_graph=True)
        run(first.square().sum().backward)
        return [x.grad, layer.weight.grad, layer.bias.grad]

    for a, b in zip(penalty(compiled), penalty(lambda backward: backward()), strict=True):
        torch.testing.assert_close(a, b)


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


def test_distributed_tensors(pools: Callable[[int], Pool]) -> None:
    pools(2).run(dtensor_jobs.same_as_torchs)


def test_a_device_without_kernels_has_torchs_batch_norm_and_one_warning(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run_python(str(Path(__file__).parent / "toy_device.py"))
    assert (done.returncode, done.stdout.strip()) == (0, "toy:0"), done.stderr
    assert done.stderr.count("bnext: bnext has no kernels for device toy") == 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_forward_mode_drops_no_tangent(name: str, training: bool) -> None:
    x = make_input((4, 3))
    statistics = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
    with forward_ad.dual_level():
        statistics[name] = forward_ad.make_dual(statistics[name], torch.ones(3))
        with pytest.raises(RuntimeError, match=f"expected {name} to have no tangent"):
            bnext.functional.batch_norm(x, **statistics, training=training)
