"""What the graph of a call holds, that it is one node, and that the output may be written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import reference
import torch
from cases import FEW_ACTS, FEW_CASES, RECTIFIERS, Case, make_grad, make_input, same_bits
from checks import call, make_inputs
from marks import EVERY_ACT, FLAGS, MODES, PLAIN_OR_ACT, RESIDUAL, pairs
from reference import Act
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import bnext

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


class Held(NamedTuple):
    """A call, and what its graph holds besides vectors: so many tensors of the input's size, and perhaps a mask."""

    act: Act
    training: bool
    has_residual: bool
    needs: str  # which of x (the input), w, b and r (the residual) need a gradient
    tensors: int
    mask: bool = False


class Graph:
    """A call, and what its graph holds. `needs` is that of Held."""

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        act: Act,
        training: bool,
        has_residual: bool,
        needs: str = "xwbr",
        device: str = "cpu",
    ) -> None:
        x, _, self.params, residual = make_inputs(*case, dtype, device, has_residual)
        values = zip("xwbr", (x, *self.params[:2], residual), strict=True)
        self.x, self.weight, self.bias, self.residual = (
            None if v is None else v.detach().requires_grad_(key in needs) for key, v in values
        )
        self.act, self.training, self.layout = act, training, case.layout

    def run(self) -> Tensor:
        vectors = (self.params, self.weight, self.bias)
        return call(self.x, *vectors, self.training, residual=self.residual, act=self.act)

    def kept(self) -> list[Tensor]:
        """The tensors that the graph holds."""
        kept: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            self.run()
        return kept

    @property
    def vectors(self) -> int:
        """The bytes of weight and bias in float32, and of save_stats in float64. A graph holds no other vectors."""
        return self.x.shape[1] * (4 + 4 + 2 * 8)

    @property
    def mask(self) -> int:
        """The most bytes of a mask: a byte for the elements that share one, and 8 bytes more for each plane (channels
        first) or pixel."""
        lanes = 8 if self.x.device.type == "cpu" else 16 // self.x.itemsize
        channels, pixels = self.x.shape[1], self.x.numel() // self.x.shape[1]
        in_planes = self.layout != "channels_last" and self.x.ndim > 2
        rows, row = (len(self.x) * channels, pixels // len(self.x)) if in_planes else (pixels, channels)
        return rows * (-(-row // lanes) + 8)


def plain(act: Act, has_residual: bool) -> list[Held]:
    """Without an activation the input is kept for grad_weight, and in training for its own gradient."""
    return [
        Held(act, training, has_residual, needs, tensors=int("w" in needs or (training and "x" in needs)))
        for training in FLAGS
        for needs in ("x", "w", "b", "xw", "xb", "wb", "xwb")
    ]


HELD = [
    *plain(None, False),
    *plain("identity", False),
    *plain("identity", True),
    # Without a residual the pre-activation is computed again from the input, which torch's batch norm keeps as well.
    *(Held(act, training, False, "xwb", tensors=1) for act in FEW_ACTS for training in FLAGS),
    # With a residual, rectifiers need a bit an element more, and smooth activations the user's own residual.
    *(Held(act, training, True, "xwbr", tensors=1, mask=True) for act in ONE_SIDED for training in FLAGS),
    *(Held(act, training, True, "xwbr", tensors=2) for act in SMOOTH for training in FLAGS),
    # In evaluation with frozen weight and bias, grad_input is g*act'(z)*weight*invstd, which needs the sign of z.
    *(Held(act, False, False, "x", tensors=0, mask=True) for act in ONE_SIDED),
    *(Held(act, False, True, needs, tensors=0, mask=True) for act in ONE_SIDED for needs in ("x", "r", "xr")),
]


@pairs(held=HELD, case=HELD_CASES, dtype=(torch.float32, torch.bfloat16))
def test_the_graph_holds_no_more_than_backward_needs(held: Held, case: Case, dtype: torch.dtype, device: str) -> None:
    graph = Graph(case, dtype, held.act, held.training, held.has_residual, held.needs, device)
    kept = graph.kept()
    size, least = sum(t.nbytes for t in kept), held.tensors * graph.x.nbytes
    assert size > 0
    assert least <= size <= least + graph.vectors + held.mask * graph.mask
    if case.layout != "sliced":  # of a sliced input the graph holds the copy that the kernels read
        given = [t.data_ptr() for t in (graph.x, graph.residual)[: held.tensors]]
        assert set(given) <= {t.data_ptr() for t in kept}


@pairs(act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_without_gradients_the_graph_holds_nothing(act: Act, training: bool, has_residual: bool, device: str) -> None:
    graph = Graph(HELD_CASES[0], torch.float32, act, training, has_residual, "", device)
    assert graph.run().grad_fn is None
    assert graph.kept() == []


@pairs(act=PLAIN_OR_ACT, training=FLAGS)
def test_output_changed_in_place_does_not_reach_backward(act: Act, training: bool, device: str) -> None:
    # Nothing of the output is kept: what follows may write to it, be it dropout, an in-place relu or a masked fill.
    x, g, p, residual = make_inputs((6, 5, 7, 3), device=device, has_residual=act is not None)

    def gradients(inplace: bool) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
        y = call(leaves[0], p.clone(), p.weight, p.bias, training, residual=leaves[1] if act else None, act=act)
        y = torch.nn.functional.relu(y.mul_(2) if inplace else y * 2, inplace=inplace)
        return torch.autograd.grad(y, leaves, g)

    assert all(map(same_bits, gradients(True), gradients(False)))


@MODES
@EVERY_ACT
def test_residual_changed_in_place_is_noticed_where_it_is_kept(act: Act, training: bool) -> None:
    graph = Graph(HELD_CASES[0], torch.float32, act, training, has_residual=True)
    g, leaves = make_grad((6, 5, 7, 3)), (graph.x, graph.residual)
    expected = torch.autograd.grad(graph.run(), leaves, g)
    y = graph.run()
    with torch.no_grad():
        graph.residual.mul_(2)
    if reference.named(act)[0] not in ("identity", *RECTIFIERS):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, leaves, g)
    else:
        assert all(map(same_bits, torch.autograd.grad(y, leaves, g), expected))


class Recorder(TorchDispatchMode):
    """The operators that reach the dispatcher below autograd, but for those that only handle tensors."""

    def __enter__(self) -> Recorder:
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: object = None) -> object:
        # A bias that is read again in backward is copied.
        aten = torch.ops.aten
        if func not in (aten.detach.default, aten.empty.memory_format, aten.clone.default):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pairs(act=FEW_ACTS, training=FLAGS, has_residual=FLAGS)
def test_one_operator_and_one_node_a_direction(act: Act, has_residual: bool, training: bool) -> None:
    graph = Graph(FEW_CASES[3], torch.float32, act, training, has_residual)
    g, wanted = make_grad(*FEW_CASES[3]), [t for t in (graph.x, graph.residual) if t is not None]
    with Recorder() as recorder:
        y = graph.run()
    assert recorder.names == [f"bnext.batch_norm_{'train' if training else 'eval'}.default"]
    leaves = {node.variable for node, _ in y.grad_fn.next_functions if node is not None}
    assert set(wanted) <= leaves, "another node lies between the output's node and the leaves"
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
