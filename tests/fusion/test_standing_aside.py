"""Exports, tracers, transforms and torch's modes see the layers as they are, and give what they give of the plain
model; afterwards calls are fused again."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_close
from observe import assert_fuses, assert_same_steps, count, pair, sequential, small
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import bnext

Call = Callable[[nn.Module, Tensor], Any]


def net() -> nn.Module:
    return sequential(nn.Conv2d(3, 2, 1))


class Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(getattr(function, "__name__", "?"))
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def under(mode: Callable[[], Any], look: Callable[[Any], Any]) -> Call:
    def call(model: nn.Module, x: Tensor) -> Any:
        with mode() as entered:
            y = model(x)
        look(entered)
        return y

    return call


def sees(name: str) -> Callable[[Any], None]:
    def look(mode: Any) -> None:
        assert any(name in seen for seen in mode.seen), mode.seen

    return look


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


CALLS: dict[str, Call] = {
    "export": lambda m, x: torch.export.export(m.eval(), (x,)).module()(x),
    "export, training": lambda m, x: torch.export.export(m, (x,)).module()(x),
    "jit.trace": lambda m, x: torch.jit.trace(m.eval(), x)(x),
    "symbolic_trace": lambda m, x: fx.symbolic_trace(m)(x),
    "make_fx": lambda m, x: make_fx(m.eval())(x)(x),
    "vmap": lambda m, x: vmap(lambda one: m.eval()(one[None]))(x),
    "grad": lambda m, x: grad(lambda z: m.eval()(z).square().sum())(x),
    "jacrev": lambda m, x: jacrev(lambda z: m.eval()(z).sum((2, 3)))(x),
    "jvp": lambda m, x: jvp(lambda z: m.eval()(z), (x,), (x.cos(),)),
    "per-sample gradients": per_sample_gradients,
    "an ensemble": ensemble,
    "a function mode": under(Functions, sees("relu")),
    "a dispatch mode": under(Operators, sees("relu")),
    "a flop counter": under(lambda: FlopCounterMode(display=False), lambda mode: mode.get_total_flops()),
    "functional_call": lambda m, x: functional_call(m, {"0.weight": torch.ones(3, 3, 1, 1).to(x)}, (x,)),
    "functionalize": lambda m, x: torch.func.functionalize(lambda z: m.eval()(z))(x),
}


@pytest.mark.parametrize("called", [False, True], ids=["before a call", "after one"])
@pytest.mark.parametrize("name", CALLS)
def test_it_sees_the_plain_model(name: str, called: bool) -> None:
    original, fused = pair(net)
    x = small()
    if called:
        assert_same_steps(original, fused, x, modes=("training",), steps=1)
    original.train()
    fused.train()
    expected, actual = CALLS[name](original, x), CALLS[name](fused, x)
    assert_close(actual, expected, name)
    assert_close(state(fused), state(original), "parameters and buffers")
    assert_fuses(original.train(), fused.train(), x)


def test_a_mode_sees_the_operators_of_the_unfused_model() -> None:
    original, fused = pair(net)
    plain = bnext.convert(copy.deepcopy(original))
    for mode in (Functions, Operators):
        seen = []
        for model in (plain, fused):
            with mode() as entered:
                model(small())
            seen.append(entered.seen)
        assert seen[1] == seen[0]


def test_an_exported_graph_is_that_of_the_unfused_model() -> None:
    plain = bnext.convert(net().double())
    fused = bnext.convert(copy.deepcopy(plain), fuse=True)
    x = small()
    fused(x)
    graphs = []
    for model in (plain, fused):
        program = torch.export.export(model.eval(), (x,))
        graphs.append([(n.op, str(n.target)) for n in program.graph.nodes])
    assert graphs[1] == graphs[0]
    assert ("call_function", "aten.relu.default") in graphs[1]


def test_functional_call_with_plain_tensors_has_their_gradients() -> None:
    original, fused = pair(net)
    results = []
    for model in (original, fused):
        params = {k: (p.detach() * 1.5).requires_grad_() for k, p in model.named_parameters()}
        buffers = {k: b.clone() for k, b in model.named_buffers()}
        for _ in range(2):
            y = functional_call(model, (params, buffers), (small() * 0 + torch.arange(4.0).double(),))
        results.append([y, *torch.autograd.grad(y.square().sum(), list(params.values())), *buffers.values()])
        assert count(y) == (model is original)
    for actual, expected in zip(*reversed(results), strict=True):
        assert_close(actual, expected, "of functional_call")
    assert_close(state(fused), state(original), "the model's own")


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
        assert fused(mode.from_tensor(x)).shape == (2, 2, 4, 4)
    meta = copy.deepcopy(fused).to("meta")
    y = meta(x.to("meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 2, 4, 4))


class Tagged(torch.Tensor):
    """A subclass that carries something along."""

    note: str

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(function, types, args, kwargs)
        if isinstance(out, cls):
            out.note = next((a.note for a in args if isinstance(a, cls) and hasattr(a, "note")), "none")
        return out


def test_a_tensor_subclass_is_what_it_is_unfused() -> None:
    plain = bnext.convert(net().double())
    fused = bnext.convert(copy.deepcopy(plain), fuse=True)
    outputs = []
    for model in (plain, fused):
        x = torch.ones(2, 3, 2, 2, dtype=torch.float64).as_subclass(Tagged)
        x.note = "mine"
        outputs.append(model.eval()(x))
    assert type(outputs[1]) is type(outputs[0]) is Tagged
    assert outputs[1].note == outputs[0].note
    torch.testing.assert_close(outputs[1].as_subclass(Tensor), outputs[0].as_subclass(Tensor))


@pytest.mark.filterwarnings("ignore:Profiler clears events")
def test_the_profiler_and_anomaly_mode() -> None:
    original, fused = pair(net)
    with torch.autograd.set_detect_anomaly(True):
        assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    assert any("batch_norm" in event.key for event in profile.key_averages())
