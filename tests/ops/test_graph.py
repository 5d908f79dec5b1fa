"""What one operator gives: how little the graph holds, one node a direction, and a graph that the output may leave."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import reference
import torch
from cases import (
    FEW_ACTS,
    FEW_CASES,
    RECTIFIERS,
    Case,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    same_bits,
)
from checks import call
from marks import EVERY_ACT, FLAGS, MODES, PLAIN_OR_ACT, RESIDUAL, pairs
from reference import Act
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import bnext
from bnext.functional import batch_norm, batch_norm_act

NAMES = ("input", "weight", "bias")
ONE_SIDED = ("relu6", ("leaky_relu", -0.5))
SMOOTH = ("silu", ("elu", 0.5))
HELD_CASES = [
    Case((6, 5, 7, 3), "contiguous"),
    Case((6, 5, 7, 3), "channels_last"),
    Case((6, 5, 7, 3), "sliced"),
    Case((9, 21), "contiguous"),
    Case((2, 64, 16, 16), "contiguous"),
    Case((2, 64, 16, 16), "channels_last"),
]
HELD_DTYPES = (torch.float32, torch.bfloat16)


def saved_bytes(run: Callable[[], Tensor]) -> int:
    """Of the tensors that the graph of the result holds."""
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return total


@pairs(layout=("contiguous", "channels_last", "sliced"), dtype=HELD_DTYPES)
@pytest.mark.parametrize(
    ("training", "needs", "holds_input"),
    [
        (True, (True, True, True), True),
        (True, (True, False, False), True),
        (True, (False, True, False), True),
        (True, (False, False, True), False),
        (False, (True, True, True), True),
        (False, (False, True, False), True),
        (False, (True, False, True), False),
        (False, (True, False, False), False),
        (False, (False, False, True), False),
    ],
    ids=lambda v: "+".join(itertools.compress(NAMES, v)) if isinstance(v, tuple) else str(v),
)
def test_the_graph_holds_no_more_than_backward_needs(
    training: bool, needs: tuple[bool, ...], holds_input: bool, layout: str, dtype: torch.dtype, device: str
) -> None:
    x = make_input((6, 5, 7, 3), layout, dtype, device)
    p = make_parameters(5, device=device)
    x, weight, bias = (t.detach().requires_grad_(n) for t, n in zip((x, p.weight, p.bias), needs, strict=True))
    held = saved_bytes(lambda: batch_norm(x, p.running_mean, p.running_var, weight, bias, training))
    per_channel = 5 * (4 + 2 * 8)  # the weight, and save_stats
    activation = x.numel() * x.element_size()
    if holds_input:
        assert activation <= held <= activation + per_channel
    else:
        assert 0 < held <= per_channel


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


@pairs(case=HELD_CASES, dtype=HELD_DTYPES, training=FLAGS, has_residual=FLAGS)
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


@pairs(case=HELD_CASES, act=FEW_ACTS, dtype=HELD_DTYPES, training=FLAGS)
def test_without_a_residual_the_graph_holds_what_torchs_batch_norm_does(
    case: Case, dtype: torch.dtype, act: Act, training: bool
) -> None:
    run, x, _ = run_fused(case, dtype, act, training, has_residual=False)
    limit = held(x, case.layout)
    assert limit.activation <= saved_bytes(run) <= limit.activation + limit.vectors


@pairs(case=HELD_CASES, act=ONE_SIDED, dtype=HELD_DTYPES, training=FLAGS)
def test_with_a_residual_relu_holds_a_mask_more(case: Case, dtype: torch.dtype, act: Act, training: bool) -> None:
    run, x, _ = run_fused(case, dtype, act, training, has_residual=True)
    limit = held(x, case.layout)
    assert limit.activation <= saved_bytes(run) <= limit.activation + limit.vectors + limit.mask


@pairs(case=HELD_CASES, act=SMOOTH, dtype=HELD_DTYPES, training=FLAGS)
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


@pairs(case=HELD_CASES, needs=("input", "residual", "both"), act=ONE_SIDED, dtype=HELD_DTYPES, has_residual=FLAGS)
def test_frozen_batch_norm_holds_a_mask_and_no_activation(
    needs: str, case: Case, dtype: torch.dtype, act: Act, has_residual: bool
) -> None:
    # Backward of eval mode with frozen weight and bias is g*act'(z)*weight*invstd: of z, its sign.
    wanted = (needs != "residual" or not has_residual, False, False, needs != "input")
    run, x, _ = run_fused(case, dtype, act, False, has_residual, wanted)
    limit = held(x, case.layout)
    assert 0 < saved_bytes(run) <= limit.mask + limit.vectors


@pairs(act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_without_gradients_the_graph_holds_nothing(act: Act, training: bool, has_residual: bool, device: str) -> None:
    x, p = make_input((6, 5, 7, 3), device=device), make_parameters(5, device=device)
    residual = make_residual((6, 5, 7, 3), device=device) if has_residual else None

    def run() -> Tensor:
        y = call(x, p, p.weight, p.bias, training, residual=residual, act=act)
        assert y.grad_fn is None
        return y

    assert saved_bytes(run) == 0


@pairs(act=PLAIN_OR_ACT, training=FLAGS)
def test_output_changed_in_place_does_not_reach_backward(act: Act, training: bool, device: str) -> None:
    # Nothing of the output is kept: what follows may write to it, be it dropout, an in-place relu or a masked fill.
    x, residual, g = (make((6, 5, 7, 3), device=device) for make in (make_input, make_residual, make_grad))
    p = make_parameters(5, device=device)

    def gradients(inplace: bool) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in ((x, residual) if act else (x,))]
        y = call(leaves[0], p.clone(), p.weight, p.bias, training, residual=leaves[1] if act else None, act=act)
        y = torch.nn.functional.relu(y.mul_(2) if inplace else y * 2, inplace=inplace)
        return torch.autograd.grad(y, leaves, g)

    assert all(map(same_bits, gradients(True), gradients(False)))


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


@pairs(act=FEW_ACTS, training=FLAGS, has_residual=FLAGS)
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
