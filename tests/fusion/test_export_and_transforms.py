"""Under torch.export, torch.jit, torch.fx, the transforms of torch.func and torch's modes nothing is fused: what they
return is that of the unfused model. Calls after them are fused again."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_close
from observe import Pair, assert_fuses, assert_same_results, assert_same_steps, count, net, pair, small
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import bnext

Call = Callable[[nn.Module, Tensor], Any]


class Operators(TorchDispatchMode):
    """Records the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def in_a_dispatch_mode(model: nn.Module, x: Tensor) -> Any:
    with Operators() as mode:
        y = model(x)
    assert "aten.relu.default" in mode.seen
    return y, mode.seen


def exported(model: nn.Module, x: Tensor) -> Any:
    program = torch.export.export(model, (x,))
    calls = [(n.op, str(n.target)) for n in program.graph.nodes]
    assert ("call_function", "aten.relu.default") in calls
    return program.module()(x), calls


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}


def per_sample_gradients(model: nn.Module, x: Tensor) -> Any:
    params = {k: p.detach() for k, p in model.named_parameters()}

    def loss(params: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model.eval(), params, (one[None],)).square().sum()

    return vmap(grad(loss), (None, 0))(params, x)


def ensemble(model: nn.Module, x: Tensor) -> Any:
    models = [model.eval(), copy.deepcopy(model)]
    params, buffers = stack_module_state(models)
    base = copy.deepcopy(model).to("meta")
    return vmap(lambda p, b: functional_call(base, (p, b), (x,)))(params, buffers)


def with_plain_tensors(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What the model computes with plain tensors for parameters and buffers: the output and the gradients of the second
    of two calls, and the buffers after both."""
    params = {k: (p.detach() * 1.5).requires_grad_() for k, p in model.named_parameters()}
    buffers = {k: b.clone() for k, b in model.named_buffers()}
    functional_call(model, (params, buffers), (x,))
    y = functional_call(model, (params, buffers), (x,))
    assert count(y) == (model._compiled_call_impl is None), "exactly the calls of the fused model are fused"
    return [y, *torch.autograd.grad(y.square().sum(), list(params.values())), *buffers.values()]


CALLS: dict[str, Call] = {
    "export": lambda m, x: exported(m.eval(), x),
    "jit.trace": lambda m, x: torch.jit.trace(m.eval(), x)(x),
    "symbolic_trace": lambda m, x: fx.symbolic_trace(m)(x),
    "make_fx": lambda m, x: make_fx(m.eval())(x)(x),
    "vmap": lambda m, x: vmap(lambda one: m.eval()(one[None]))(x),
    "jvp": lambda m, x: jvp(lambda z: m.eval()(z), (x,), (x.cos(),)),
    "per-sample gradients": per_sample_gradients,
    "an ensemble": ensemble,
    "a dispatch mode": in_a_dispatch_mode,
    "functional_call": lambda m, x: functional_call(m, {"0.weight": torch.ones(3, 3, 1, 1).to(x)}, (x,)),
    "functional_call, all of it": with_plain_tensors,
}


def models() -> Pair:
    """A model of bnext's layers, and its fused copy."""
    plain = bnext.convert(net().double())
    return plain, bnext.convert(copy.deepcopy(plain), fuse=True)


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after one"])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_the_plain_model(name: str, called: bool) -> None:
    plain, fused = models()
    x = small()
    if called:
        assert_same_steps(plain, fused, x, modes=("training",), steps=1)
    assert_same_results(plain.train(), fused.train(), lambda model: CALLS[name](model, x))
    assert_close(state(fused), state(plain), "parameters and buffers")
    assert_fuses(plain, fused, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_model_is_converted_without_harm() -> None:
    scripted = torch.jit.script(net().eval())
    x = torch.randn(2, 3, 4, 4)
    want = scripted(x)
    bnext.convert(scripted, fuse=True)
    torch.testing.assert_close(scripted(x), want)
    torch.jit.save(scripted, io.BytesIO())


def test_fake_tensors_and_meta() -> None:
    fused = bnext.convert(net(), fuse=True)
    x = torch.randn(2, 3, 4, 4)
    fused(x)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fused(mode.from_tensor(x)).shape == (2, 3, 4, 4)
    meta = copy.deepcopy(fused).to("meta")
    y = meta(x.to("meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 3, 4, 4))


@pytest.mark.filterwarnings("ignore:Profiler clears events")
def test_the_profiler_and_anomaly_mode() -> None:
    original, fused = pair()
    with torch.autograd.set_detect_anomaly(True):
        assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    assert any("batch_norm" in event.key for event in profile.key_averages())
