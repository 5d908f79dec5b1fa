"""Padding, given by a mask or by lengths; and nested tensors, which have none."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from batches import check_batch, make_padded, positions, random_mask, with_garbage
from cases import DTYPES, Case, make_grad, make_input, make_parameters, same_bits, seed
from checks import make_inputs
from marks import FLAGS, PLAIN_OR_ACT, pairs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import bnext
from bnext.functional import batch_norm, batch_norm_act

# Every rank and layout; planes and rows that fill registers and that do not; more than one chunk of a reduction.
CASES = [
    Case((33, 17), "contiguous"),
    Case((6, 17, 5), "contiguous"),
    Case((6, 17, 5), "channels_last"),
    Case((5, 130, 40), "channels_last"),
    Case((4, 64, 7, 7), "contiguous"),
    Case((4, 64, 7, 7), "channels_last"),
    Case((12, 5, 3, 3), "contiguous"),
    Case((5, 2, 130, 110), "contiguous"),
    Case((5, 2, 130, 110), "channels_last"),
    Case((2, 3, 2, 3, 5), "channels_last_3d"),
    Case((6, 5, 7, 3), "sliced"),
]


@pairs(case=CASES, dtype=DTYPES, act=PLAIN_OR_ACT, has_residual=FLAGS, training=FLAGS)
def test_padding_is_as_if_it_were_not_there(
    case: Case, dtype: torch.dtype, act: Any, has_residual: bool, training: bool
) -> None:
    inputs = make_inputs(*case, dtype, has_residual=has_residual, grad_layout=case.layout)
    check_batch(inputs, random_mask(case.shape), training=training, act=act)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_instruction_set(layout: str, isa: str) -> None:
    for dtype in DTYPES:
        inputs = make_inputs((6, 7, 9, 11), layout, dtype, has_residual=True)
        check_batch(inputs, random_mask(inputs.input.shape), act="relu")


@pytest.mark.parametrize("offset", [1e4, 1e30], ids="mean={}".format)
def test_sums_that_float32_does_not_hold(offset: float) -> None:
    # The shift is taken from samples, which must not be padding; values of 1e30 are reduced again in float64.
    shape = (6, 5, 9, 11)
    for layout in ("contiguous", "channels_last"):
        inputs = make_inputs(shape, layout)
        check_batch(inputs._replace(input=(inputs.input + 1.0) * offset), random_mask(shape))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, list], ids=str)
def test_lengths_give_the_bits_of_a_mask(layout: str, dtype: Any) -> None:
    shape, lengths = (5, 7, 13), [13, 0, 4, 12, 1]
    given = lengths if dtype is list else torch.tensor(lengths, dtype=dtype)
    valid = torch.arange(13) < torch.tensor(lengths)[:, None]
    x, p = make_padded(shape, valid, layout), make_parameters(7)
    for training in FLAGS:
        outputs = []
        for options in ({"lengths": given}, {"mask": valid}):
            stats = p.clone()
            y = batch_norm(x, *stats[2:], *stats[:2], training, **options)
            outputs.append([y, *stats[2:]])
        assert all(map(same_bits, *outputs))
        assert outputs[0][0][:, :, 12].nonzero()[:, 0].unique().tolist() == [0]


@pytest.mark.parametrize("shape", [(40, 5, 70), (40, 64, 6, 6)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_depend_on_neither_threads_nor_what_padding_holds(
    shape: tuple[int, ...], layout: str, set_threads: Callable[[int], None]
) -> None:
    valid, results = random_mask(shape), []
    x, g = make_input(shape, layout), make_grad(shape, layout)
    for count, garbage in ((1, False), (3, True)):
        set_threads(count)
        for size in (None, 2):
            seed(0)
            p = make_parameters(shape[1])
            leaf, grad = (with_garbage(t, valid) if garbage else t for t in (x, g))
            leaf = leaf.detach().requires_grad_()
            y = batch_norm_act(leaf, *p[2:], *p[:2], training=True, mask=valid, virtual_batch_size=size)
            results.append((y, *torch.autograd.grad(y, leaf, grad), *p[2:]))
    for one, other in zip(results[:2], results[2:], strict=True):
        assert all(map(same_bits, one, other))


def test_nothing_but_padding_and_a_single_value() -> None:
    x, p = make_input((4, 3, 5)).requires_grad_(), make_parameters(3)
    for valid_values in (0, 1):
        valid = torch.zeros(4, 5, dtype=torch.bool)
        valid.view(-1)[7 : 7 + valid_values] = True
        layer = bnext.BatchNorm1d(3)
        layer.load_state_dict({**layer.state_dict(), **p._asdict()})
        y = layer(x, mask=valid)
        expected = torch.zeros_like(y)
        expected[valid.unsqueeze(1).expand_as(y)] = p.bias.repeat(valid_values)
        assert torch.equal(y, expected)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        assert grad.abs().max() <= 1e-3 * valid_values  # 1/sqrt(eps) is 316
        single = x[1, :, 2].detach()
        mean = 0.9 * p.running_mean + 0.1 * single if valid_values else p.running_mean
        assert torch.allclose(layer.running_mean, mean)
        assert torch.equal(layer.running_var, p.running_var)
        assert layer.num_batches_tracked == 1


@pairs(
    shape=((5, 3, 4), (4, 3, 2, 3)),
    layout=("contiguous", "channels_last"),
    act=("identity", "relu", "silu"),
    has_residual=FLAGS,
    size=(None, 3),
)
def test_derivatives(shape: tuple[int, ...], layout: str, act: str, has_residual: bool, size: int | None) -> None:
    inputs, valid = make_inputs(shape, layout, torch.float64, has_residual=has_residual), random_mask(shape)

    def call(training: bool, *leaves: Tensor) -> Tensor:
        x, weight, bias, *residual = leaves
        statistics = [None, None] if training else inputs.params[2:]
        options = {"mask": valid, "virtual_batch_size": size if training else None}
        return batch_norm_act(x, *statistics, weight, bias, *(residual or [None]), training, 0.1, 1e-3, act, **options)

    leaves = [inputs.input, *inputs.params[:2], *([inputs.residual] if has_residual else [])]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    for training in FLAGS:
        function = functools.partial(call, training)
        gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


def test_derivatives_do_not_see_what_padding_holds() -> None:
    shape = (5, 3, 4)
    valid = random_mask(shape)
    tensors = [make(shape, dtype=torch.float64) for make in (make_input, make_grad, make_input)]
    results = []
    for fill in (lambda t, valid: t, with_garbage):
        x, g, u = (fill(t, valid) for t in tensors)
        x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
        w = torch.ones(3, dtype=torch.float64, requires_grad=True)
        y, tangent = torch.func.jvp(
            lambda x, w=w: batch_norm_act(x, None, None, w, None, None, True, mask=valid), (x,), (u,)
        )
        first = torch.autograd.grad(y, (x, w), g, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].sum(), (x, w, g))
        results.append([y, tangent, *first, *second])
    for one, other in zip(*results, strict=True):
        assert same_bits(one, other)


@pytest.mark.parametrize("dim", [0, None], ids=["own_padding", "shared_padding"])
def test_vmap(dim: int | None) -> None:
    x, valid = make_input((3, 6, 5, 4)), random_mask((18, 1, 4)).view(3, 6, 4)
    masks = valid if dim == 0 else valid[0]
    together = torch.func.vmap(lambda x, m: batch_norm(x, None, None, training=True, mask=m), in_dims=(0, dim))(
        x, masks
    )
    for i in range(3):
        alone = batch_norm(x[i], None, None, training=True, mask=valid[i] if dim == 0 else masks)
        assert torch.allclose(together[i], alone, rtol=1e-6, atol=1e-6)


def layers() -> dict[str, Callable[..., Tensor]]:
    """One layer of every kind that takes padding."""
    return {
        "plain": bnext.BatchNorm1d(5),
        "activated": bnext.BatchNormAct1d(5, act="identity"),
        "sync": bnext.SyncBatchNorm(5),
        "lazy": bnext.LazyBatchNorm1d(),
        "converted": bnext.convert(torch.nn.BatchNorm1d(5)),
        "part_of_fused": bnext.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(5)), fuse=True)[0],
        "compiled": torch.compile(bnext.BatchNorm1d(5), backend="aot_eager", fullgraph=True),
    }


@pytest.mark.parametrize("kind", sorted(layers()))
def test_layers_take_lengths_and_masks(kind: str) -> None:
    layer, lengths = layers()[kind], torch.tensor([4, 2, 0])
    valid = torch.arange(4) < lengths[:, None]
    x = make_padded((3, 5, 4), valid)
    mean, var = torch.zeros(5), torch.ones(5)
    expected = batch_norm(x, mean, var, torch.ones(5), torch.zeros(5), True, mask=valid)
    for options in ({"lengths": lengths}, {"mask": valid}):
        assert torch.allclose(layer(x, **options), expected, rtol=1e-6, atol=1e-6)
    # `mean` is a tenth of the batch's mean. The layer has been called twice: 1 - 0.9^2 = 0.19.
    assert torch.allclose(layer.running_mean, 0.19 * 10 * mean, rtol=1e-5, atol=1e-6)
    layer.eval()
    with torch.no_grad():
        layer.weight.mul_(2)
        layer.bias.add_(0.5)
    evaluated = batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, mask=valid)
    assert torch.allclose(layer(x, lengths=lengths), evaluated, rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # compiled, evaluation without gradients is arithmetic
        assert torch.allclose(layer(x, mask=valid), evaluated, rtol=1e-6, atol=1e-6)


def test_recomputed_outputs_have_the_same_padding() -> None:
    valid = random_mask((4, 3, 5, 5))
    x, conv = make_padded((4, 3, 5, 5), valid).requires_grad_(), torch.nn.Conv2d(3, 4, 3)
    for size in (None, 2):
        grads = []
        for scope in (torch.enable_grad, bnext.recompute):
            with scope():
                y = conv(batch_norm_act(x, None, None, act="silu", training=True, mask=valid, virtual_batch_size=size))
            grads.append(torch.autograd.grad(y.square().sum(), [x, *conv.parameters()]))
        assert all(map(same_bits, *grads))


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 2}], ids=["whole", "parts"])
def test_exported_graphs_consist_of_torchs_operators(options: dict[str, int]) -> None:
    lengths = torch.tensor([4, 2, 0, 3])
    valid = torch.arange(4) < lengths[:, None]
    x, residual = make_padded((4, 5, 4), valid), make_input((4, 5, 4))
    for training in FLAGS:
        for padding in ({"lengths": lengths}, {"mask": valid}):
            layer = bnext.BatchNormAct1d(5, act="silu").train(training)
            layer.__dict__.update(options)
            program = torch.export.export(layer, (x, residual), padding)
            assert not [node for node in program.graph.nodes if "bnext" in str(node.target)]
            exported = program.module()
            assert torch.allclose(exported(x, residual, **padding), layer(x, residual, **padding), atol=1e-5)
            assert torch.allclose(exported.running_var, layer.running_var, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_tensors_run_on_their_values() -> None:
    sequences = [make_input((length, 5)) for length in (3, 1, 4)]
    nested = torch.nested.nested_tensor(sequences, layout=torch.jagged, requires_grad=True)
    layer, padded = bnext.BatchNormAct1d(5, act="silu"), bnext.BatchNormAct1d(5, act="silu")
    for training in FLAGS:
        layer.train(training), padded.train(training)
        y = layer(nested.transpose(1, 2))
        assert y.shape[:2] == (3, 5)
        x = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True).transpose(1, 2).detach().requires_grad_()
        expected = padded(x, lengths=[3, 1, 4])
        values = torch.cat([expected[i, :, :n].T for i, n in enumerate((3, 1, 4))])
        assert torch.allclose(y.transpose(1, 2).values(), values, rtol=1e-6, atol=1e-6)
        (grad,) = torch.autograd.grad(y.values().square().sum(), nested)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), x)
        expected_grad = torch.cat([expected_grad[i, :, :n].T for i, n in enumerate((3, 1, 4))])
        assert torch.allclose(grad.values(), expected_grad, rtol=1e-5, atol=1e-6)
        assert torch.allclose(layer.running_var, padded.running_var)
    with pytest.raises(ValueError, match=r"shape \(N, C, j\)"):
        layer(nested)
    with pytest.raises(ValueError, match="no lengths"):
        layer(nested.transpose(1, 2), lengths=[3, 1, 4])


def test_lengths_and_mask_exclude_each_other_and_lengths_need_sequences() -> None:
    # What is wrong with either alone is tested in test_bad_arguments.py.
    lengths, mask = [1] * 4, torch.ones(4, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"lengths from 0 to 6.*but got 7 at 3"):
        bnext.BatchNorm1d(3)(make_input((4, 3, 6)), lengths=[6, 1, 2, 7])
    with pytest.raises(ValueError, match="lengths or mask"):
        bnext.BatchNorm1d(3)(make_input((4, 3, 6)), lengths=lengths, mask=mask)
    with pytest.raises(ValueError, match=r"shape \(N, C, L\) with lengths"):
        bnext.BatchNorm2d(3)(make_input((4, 3, 6, 6)), lengths=lengths)


def test_an_infinite_value_that_is_no_padding_is_seen() -> None:
    valid = torch.ones(positions((4, 3, 5)), dtype=torch.bool)
    valid[0, 0] = False
    x = make_input((4, 3, 5))
    x[1, 0, 1] = math.inf
    y = batch_norm(x, None, None, training=True, mask=valid)
    assert y[:, 0][valid].isnan().all()
    assert y[:, 1:].isfinite().all()
