"""What only one operator can give: one rounding, what the graph holds, one node, the raw ops and their schemas."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import reference
import tolerances
import torch
from cases import (
    ACTS,
    FEW_ACTS,
    FEW_CASES,
    LOW_PRECISION,
    RECTIFIERS,
    Case,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    name,
    same_bits,
)
from reference import Act
from test_autograd import saved_bytes
from tolerances import assert_within
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import bnext
from bnext.functional import batch_norm, batch_norm_act

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
RESIDUAL = pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "plain"])
EVERY_ACT = pytest.mark.parametrize("act", ACTS, ids=name)
FEW = pytest.mark.parametrize("act", FEW_ACTS, ids=name)
ONE_SIDED = pytest.mark.parametrize("act", ["relu6", ("leaky_relu", -0.5)], ids=name)
SMOOTH = pytest.mark.parametrize("act", ["silu", ("elu", 0.5)], ids=name)
HELD_CASES = pytest.mark.parametrize(
    "case",
    [
        Case((6, 5, 7, 3), "contiguous"),
        Case((6, 5, 7, 3), "channels_last"),
        Case((6, 5, 7, 3), "sliced"),
        Case((9, 21), "contiguous"),
        Case((2, 64, 16, 16), "contiguous"),
        Case((2, 64, 16, 16), "channels_last"),
    ],
    ids=name,
)
HELD_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)


class Held(NamedTuple):
    """Upper bounds, in bytes, of what a graph may hold."""

    activation: int  # one tensor of the input's size
    mask: int
    vectors: int  # weight and bias in float32, save_stats in float64


def held(x: Tensor, layout: str) -> Held:
    """A mask is 1 bit an element; each plane (channels first) or pixel is rounded up to at most 8 bytes more."""
    channels, pixels = x.shape[1], x.numel() // x.shape[1]
    spatial = pixels // x.shape[0]
    in_planes = layout != "channels_last" and x.ndim > 2
    rows, row = (x.shape[0] * channels, spatial) if in_planes else (pixels, channels)
    return Held(x.numel() * x.element_size(), rows * (-(-row // 8) + 8), channels * (4 + 4 + 2 * 8))


def run_fused(
    case: Case,
    dtype: torch.dtype,
    act: Act,
    training: bool,
    has_residual: bool,
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True),
    run: Callable[..., Tensor] = batch_norm_act,
) -> tuple[Callable[[], Tensor], Tensor, Tensor | None]:
    """The call, its input and its residual; `needs` says which of input, weight, bias and residual need a gradient."""
    p = make_parameters(case.shape[1])
    values = (make_input(*case, dtype), p.weight, p.bias, make_residual(*case, dtype))
    x, weight, bias, residual = (v.detach().requires_grad_(n) for v, n in zip(values, needs, strict=True))
    added = residual if has_residual else None
    call = lambda: run(x, p.running_mean, p.running_var, weight, bias, added, training, act=act)  # noqa: E731
    return call, x, added


@MODES
@RESIDUAL
@HELD_DTYPES
@HELD_CASES
def test_identity_holds_what_plain_batch_norm_holds(
    case: Case, dtype: torch.dtype, has_residual: bool, training: bool
) -> None:
    def plain(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, *_: object, act: Act) -> Tensor:
        return batch_norm(x, mean, var, weight, bias, training)

    for needs in itertools.product((True, False), repeat=3):
        fused, expected = (
            run_fused(case, dtype, "identity", training, has_residual, (*needs, any(needs)), run)[0]
            for run in (batch_norm_act, plain)
        )
        assert saved_bytes(fused) == saved_bytes(expected), needs


@MODES
@FEW
@HELD_DTYPES
@HELD_CASES
def test_without_a_residual_the_graph_holds_what_torchs_batch_norm_does(
    case: Case, dtype: torch.dtype, act: Act, training: bool
) -> None:
    run, x, _ = run_fused(case, dtype, act, training, has_residual=False)
    limit = held(x, case.layout)
    assert limit.activation <= saved_bytes(run) <= limit.activation + limit.vectors


@MODES
@ONE_SIDED
@HELD_DTYPES
@HELD_CASES
def test_with_a_residual_relu_holds_a_mask_more(case: Case, dtype: torch.dtype, act: Act, training: bool) -> None:
    run, x, _ = run_fused(case, dtype, act, training, has_residual=True)
    limit = held(x, case.layout)
    assert limit.activation <= saved_bytes(run) <= limit.activation + limit.vectors + limit.mask


@MODES
@SMOOTH
@HELD_DTYPES
@HELD_CASES
def test_with_a_residual_smooth_activations_hold_the_users_own(
    case: Case, dtype: torch.dtype, act: Act, training: bool
) -> None:
    run, x, residual = run_fused(case, dtype, act, training, has_residual=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = run()
    limit = held(x, case.layout)
    total = sum(t.numel() * t.element_size() for t in kept)
    assert 2 * limit.activation <= total <= 2 * limit.activation + limit.vectors
    if case.layout != "sliced":
        pointers = {t.data_ptr() for t in kept}
        assert {x.data_ptr(), residual.data_ptr()} <= pointers
        assert y.data_ptr() not in pointers


@RESIDUAL
@ONE_SIDED
@HELD_DTYPES
@HELD_CASES
@pytest.mark.parametrize("needs", ["input", "residual", "both"])
def test_frozen_batch_norm_holds_a_mask_and_no_activation(
    needs: str, case: Case, dtype: torch.dtype, act: Act, has_residual: bool
) -> None:
    # Backward of eval mode with frozen weight and bias is g*act'(z)*weight*invstd: of z, its sign.
    wanted = (needs != "residual" or not has_residual, False, False, needs != "input")
    run, x, _ = run_fused(case, dtype, act, False, has_residual, wanted)
    limit = held(x, case.layout)
    assert 0 < saved_bytes(run) <= limit.mask + limit.vectors


@MODES
@RESIDUAL
@FEW
def test_without_gradients_the_graph_holds_nothing(act: Act, has_residual: bool, training: bool) -> None:
    run, _, _ = run_fused(FEW_CASES[2], torch.float32, act, training, has_residual, (False,) * 4)
    assert saved_bytes(run) == 0
    assert run().grad_fn is None


@MODES
@FEW
def test_output_changed_in_place_does_not_reach_backward(act: Act, training: bool) -> None:
    # Nothing of the output is kept: what follows may write to it, be it dropout, another relu or a masked fill.
    run, x, residual = run_fused(Case((6, 5, 7, 3), "contiguous"), torch.float32, act, training, has_residual=True)
    g = make_grad((6, 5, 7, 3))
    results = [
        torch.autograd.grad(change(run()), (x, residual), g) for change in (lambda y: y.mul_(2), lambda y: y * 2)
    ]
    assert all(map(same_bits, *results))


@MODES
@EVERY_ACT
def test_residual_changed_in_place_is_noticed_where_it_is_kept(act: Act, training: bool) -> None:
    run, x, residual = run_fused(Case((6, 5, 7, 3), "contiguous"), torch.float32, act, training, has_residual=True)
    g = make_grad((6, 5, 7, 3))
    expected = torch.autograd.grad(run(), (x, residual), g)
    y = run()
    with torch.no_grad():
        residual.mul_(2)
    if reference.named(act)[0] not in ("identity", *RECTIFIERS):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, (x, residual), g)
    else:
        assert all(map(same_bits, torch.autograd.grad(y, (x, residual), g), expected))


class Recorder(TorchDispatchMode):
    """The operators that reach the dispatcher below autograd."""

    def __enter__(self) -> Recorder:
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        if func not in (torch.ops.aten.detach.default, torch.ops.aten.empty.memory_format):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@MODES
@RESIDUAL
@FEW
def test_one_operator_and_one_node_a_direction(act: Act, has_residual: bool, training: bool) -> None:
    run, x, residual = run_fused(FEW_CASES[3], torch.float32, act, training, has_residual)
    with Recorder() as recorder:
        y = run()
    assert recorder.names == [f"bnext.batch_norm_{'train' if training else 'eval'}.default"]
    leaves = {node.variable for node, _ in y.grad_fn.next_functions if node is not None}
    assert {x, residual} - {None} <= leaves, "the output's own node reaches the leaves"
    g, wanted = make_grad(*FEW_CASES[3]), [x, *([residual] if has_residual else [])]
    with Recorder() as recorder:
        torch.autograd.grad(y, wanted, g)
    assert recorder.names == ["bnext.batch_norm_backward.default"]


@pytest.mark.usefixtures("fresh_compiler")
@RESIDUAL
@pytest.mark.parametrize("act", ["relu", "gelu"])
def test_one_operator_in_a_compiled_graph(act: Act, has_residual: bool) -> None:
    module = bnext.BatchNormAct2d(5, act=act)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph.code)
        return graph.forward

    args = [make_input((3, 5, 5, 3)) for _ in range(1 + has_residual)]
    compiled = torch.compile(module, fullgraph=True, backend=aot_autograd(fw_compiler=backend))
    with torch.no_grad():
        compiled(*args)
    (code,) = graphs
    assert code.count("torch.ops.bnext.") == 1
    assert not any(word in code for word in ("aten.add.Tensor", "aten.relu", "aten.gelu", "aten.erf"))


def every_finite(dtype: torch.dtype) -> Tensor:
    """All finite numbers of a 16-bit dtype, as (N, 1, H, W)."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()].reshape(2, 1, 8, -1)


def activated(z: Tensor, act: Act) -> Tensor:
    """act of pre-activations that are exact: with a weight of zero they are the residual."""
    zero, one = torch.zeros(z.shape[1], dtype=torch.float32), torch.ones(z.shape[1], dtype=torch.float32)
    return batch_norm_act(torch.ones_like(z), zero, one, zero, None, z, act=act)


# Below this exp and erfc may come to 0 in float32: a result may, too. bfloat16 reaches there, float16 does not.
FLOOR = 2.0**-118


@EVERY_ACT
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name)
def test_half_precision_is_right_to_one_ulp_at_every_number(dtype: torch.dtype, act: Act) -> None:
    z = every_finite(dtype)
    expected = reference.activate(reference.widen(z), act)
    y = activated(z, act)
    assert y.isfinite().all()
    assert_within(y, expected, tolerances.ulp(expected, dtype).clamp(min=FLOOR), "output")
    # To be off by more than half of it takes a tie within a few roundings of float32.
    off = (y != expected.to(dtype)) & (expected.abs() > FLOOR)
    assert off.double().mean() <= 2.0**-24 / torch.finfo(dtype).eps * 16


@EVERY_ACT
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name)
def test_half_precision_derivative_at_every_number(dtype: torch.dtype, act: Act) -> None:
    z = every_finite(dtype).requires_grad_()
    (grad,) = torch.autograd.grad(activated(z, act), z, torch.ones_like(z))
    wide = reference.widen(z)
    expected = reference.slope_at(wide, act)
    limit = tolerances.ulp(expected, dtype) + 4 * 2.0**-24 * (1 + wide.abs().clamp(max=40))
    assert_within(grad, expected, limit, "grad_residual")


@pytest.mark.parametrize(
    ("act", "low", "high", "exact"),
    [
        # z*(1 + erf(z/sqrt 2))/2 has lost every digit at z = -5.5: erfc has not.
        ("gelu", -8.0, 0.5, lambda v: v * math.erfc(-v * math.sqrt(0.5)) / 2),
        ("silu", -80.0, 0.5, lambda v: v / (1 + math.exp(-v))),
        ("mish", -80.0, 0.5, lambda v: v * math.tanh(math.log1p(math.exp(v)))),
        # e^z - 1 has lost half of them at z = -1e-4.
        ("elu", -1e-3, 1e-3, lambda v: max(v, math.expm1(min(v, 0.0)))),
    ],
    ids=["gelu", "silu", "mish", "elu"],
)
def test_small_values_keep_their_relative_accuracy(
    act: Act, low: float, high: float, exact: Callable[[float], float]
) -> None:
    for dtype, relative in ((torch.float32, 1e-5), (torch.float64, 1e-14)):
        z = torch.linspace(low, high, 4001, dtype=dtype)[:-1].reshape(4, 1, 1000)
        expected = torch.tensor([exact(v) for v in z.flatten().tolist()], dtype=torch.float64).reshape(z.shape)
        assert_within(activated(z, act), expected, relative * expected.abs(), "output")


@MODES
@FEW
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name)
def test_half_precision_output_is_rounded_once(dtype: torch.dtype, act: Act, training: bool) -> None:
    # The activation is monotone between z's two bounds but for a turning point, which is covered by the slack of z.
    for case in FEW_CASES:
        x, residual, p = make_input(*case, dtype), make_residual(*case, dtype), make_parameters(case.shape[1])
        frozen = {} if training else {"running_mean": p.running_mean, "running_var": p.running_var}
        fwd = reference.forward(x, p.weight, p.bias, **frozen, residual=residual, act=act)
        options = {"training": training, "has_residual": True, "act": act}
        error = tolerances.output(fwd, p.weight, p.bias, torch.float32, **options)
        error += tolerances.coarseness(act, dtype) * fwd.output.abs()
        low, high = (fwd.output - error).to(dtype), (fwd.output + error).to(dtype)
        y = batch_norm_act(x, p.running_mean, p.running_var, p.weight, p.bias, residual, training, act=act)
        assert ((low <= y) & (y <= high)).all(), case
