"""What has failed people in other batch norms, each case under the number of the public thread that reported it.

Threads about speed alone (pytorch#60063, #50549, #69525, #52011, #38915, #12006, #57034) have bars in the benchmark;
those about CUDA, SyncBatchNorm and fusion have their tests beside that code.
"""

from __future__ import annotations

import logging
import os

import pytest
import reference
import tolerances
import torch
from cases import LOW_PRECISION, make_grad, make_input, make_parameters, name, to_layout
from checks import check_backward, check_forward
from marks import MODES
from tolerances import assert_within
from torch import Tensor, nn

import bnext
from bnext.functional import batch_norm


def threads(*numbers: str) -> pytest.MarkDecorator:
    """Runs the test once, with the threads' numbers in its id."""
    return pytest.mark.parametrize("thread", [" ".join(numbers)])


@threads("pytorch#194504")
@pytest.mark.usefixtures("fresh_compiler")
def test_momentum_none_compiles_without_a_break(thread: str) -> None:
    module = bnext.BatchNorm2d(3, momentum=None)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    batches = [make_input((2, 3, 4, 4)) for _ in range(3)]
    for x in batches:
        compiled(x)
    fwds = [reference.forward(x) for x in batches]
    average = torch.stack([f.mean for f in fwds]).mean(0)
    assert_within(module.running_mean, average, 3 * 2.0**-24 * (1 + average.abs()) * 4, "running_mean")


@threads("pytorch#162489")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inputs_near_1e30_give_neither_nan_nor_zero(thread: str, layout: str) -> None:
    x = make_input((8, 3, 7, 7), layout) * 1e30
    y = batch_norm(x, None, None, training=True)
    fwd = reference.forward(x)
    assert_within(y, fwd.output, tolerances.output(fwd, None, None, x.dtype, training=True), "output")
    assert y.abs().max() > 1


@threads("pytorch#5410", "pytorch#8283")
@pytest.mark.parametrize("value", [0.1, 1 / 3, 123.456, 1e8])
@pytest.mark.parametrize("shape", [(2, 4), (3, 4), (64, 4, 3), (2, 4, 7, 7), (127, 4, 5, 3)], ids=str)
def test_constant_channels_give_exactly_zero(thread: str, shape: tuple[int, ...], value: float) -> None:
    for layout in ("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",):
        x = to_layout(torch.full(shape, value), layout)
        assert torch.equal(batch_norm(x, None, None, training=True), torch.zeros(shape))


@threads("pytorch#140112", "pytorch#82493", "pytorch#106941")
@pytest.mark.parametrize("dtype", [torch.float32, *LOW_PRECISION], ids=name)
def test_layouts_agree(thread: str, dtype: torch.dtype) -> None:
    x, g = make_input((16, 33, 13, 11), dtype=dtype), make_grad((16, 33, 13, 11), dtype=dtype)
    params = make_parameters(33)
    for layout in ("contiguous", "channels_last", "transposed", "offset"):
        check_forward(to_layout(x, layout), params, training=True)
        check_backward(to_layout(x, layout), to_layout(g, layout), params, training=True)


@threads("pytorch#19911", "pytorch#29744", "pytorch#16998", "pytorch#4107")
@MODES
@pytest.mark.parametrize("shape", [(65535, 2), (65536, 2), (131073, 3), (70001, 2, 3), (65537, 3, 1, 2)], ids=str)
def test_batches_beyond_65535(thread: str, shape: tuple[int, ...], training: bool) -> None:
    x, g, params = make_input(shape), make_grad(shape), make_parameters(shape[1])
    check_forward(x, params, training=training)
    check_backward(x, g, params, training=training)


@threads("pytorch#66073", "detectron2#4372")
def test_frozen_batch_norm_trains_what_lies_before_it(thread: str) -> None:
    # Frozen as detectors freeze it: eval mode, no gradients for its own parameters.
    layers = nn.Sequential(nn.Conv2d(3, 5, 1), bnext.BatchNorm2d(5))
    layers[1].running_mean.normal_()
    layers[1].eval().requires_grad_(False)
    held: list[tuple[int, ...]] = []
    x = torch.randn(2, 3, 6, 6)
    between = layers[0](x).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(tuple(t.shape)) or t, lambda t: t):
        layers[1](between)
    assert tuple(between.shape) not in held
    y = layers(x)
    g = torch.randn(y.shape)
    y.backward(g)
    bn = layers[1]
    scale = reference.widen(bn.weight) * (reference.widen(bn.running_var) + bn.eps).rsqrt()
    expected = (reference.widen(g) * scale.view(1, -1, 1, 1)).sum((0, 2, 3))
    assert_within(layers[0].bias.grad, expected, 72 * 2.0**-24 * (1 + g.abs().max().item()) * 4, "bias before")


@threads("pytorch#187298")
def test_conversion_keeps_a_subclass_and_its_activation(thread: str, caplog: pytest.LogCaptureFixture) -> None:
    class BatchNormAct(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    model = nn.Sequential(BatchNormAct(3))
    with caplog.at_level(logging.WARNING, logger="bnext"):
        bnext.convert(model)
    assert type(model[0]) is BatchNormAct
    assert (model(torch.randn(4, 3, 5, 5)) >= 0).all()
    assert "BatchNormAct" in caplog.text


@threads("pytorch#75478", "torchtitan#674", "lightning#18802")
@MODES
def test_bfloat16_parameters_with_float32_stats(thread: str, training: bool) -> None:
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    for mix in (dtypes, dtypes[::-1], (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32)):
        params = make_parameters(5, mix)
        x, g = make_input((4, 5, 6, 6), dtype=torch.bfloat16), make_grad((4, 5, 6, 6), dtype=torch.bfloat16)
        check_forward(x, params, training=training)
        check_backward(x, g, params, training=training)


@threads("pytorch#85533", "functorch#867", "functorch#384")
def test_vmap_and_jacrev_through_a_module(thread: str) -> None:
    module = bnext.BatchNorm1d(3, dtype=torch.float64).eval()
    module.running_var.fill_(4.0)
    xs = torch.randn(5, 2, 3, dtype=torch.float64)
    assert_within(torch.vmap(module)(xs), torch.stack([module(x) for x in xs]).detach(), 2.0**-50, "vmap")
    jacobian = torch.func.jacrev(module)(xs[0])
    expected = torch.eye(6, dtype=torch.float64).view(2, 3, 2, 3) / (4.0 + module.eps) ** 0.5
    assert_within(jacobian, expected, 2.0**-50, "jacobian")


@threads("pytorch#4422")
def test_gradient_penalty(thread: str) -> None:
    # WGAN-GP: the norm of the critic's input gradient is part of the loss.
    def penalty(normalise: object) -> list[Tensor]:
        torch.manual_seed(7)
        critic = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten()).double()
        weight = torch.rand(4, dtype=torch.float64).requires_grad_()
        x = torch.randn(6, 2, 5, 5, dtype=torch.float64, requires_grad=True)
        hidden = normalise(critic[0](x), None, None, weight, None, True)
        score = torch.nn.functional.silu(hidden).sum()
        (grad,) = torch.autograd.grad(score, x, create_graph=True)
        loss = (grad.flatten(1).norm(dim=1) - 1).square().mean()
        return list(torch.autograd.grad(loss, (critic[0].weight, weight, x)))

    for ours, theirs in zip(penalty(batch_norm), penalty(reference.composite), strict=True):
        # Sums of a few hundred terms.
        assert_within(ours, theirs, 1e-12 * (1 + theirs.abs().max()), "gradient of the penalty")


@threads("pytorch#193097", "pytorch#193698", "pytorch#189828", "pytorch#188958", "pytorch#194798")
@MODES
@pytest.mark.parametrize("wrong", ["weight", "bias", "running_mean", "running_var"])
def test_short_or_mistyped_vectors_are_refused_not_read(thread: str, wrong: str, training: bool) -> None:
    for bad in (torch.ones(1), torch.ones(63), torch.ones(64, dtype=torch.float16), torch.ones(64, dtype=torch.int32)):
        args = {
            "weight": torch.ones(64),
            "bias": torch.ones(64),
            "running_mean": torch.zeros(64),
            "running_var": torch.ones(64),
        }
        with pytest.raises((RuntimeError, ValueError, TypeError), match=wrong):
            batch_norm(torch.ones(4, 64, 8, 8), **{**args, wrong: bad}, training=training)


@threads("apex#1768")
@pytest.mark.parametrize("channels", [3, 7, 9, 15, 31, 33, 63, 65, 100, 257, 1000])
def test_channels_last_with_channels_that_are_no_power_of_two(thread: str, channels: int) -> None:
    shape = (8, channels, 9, 7)
    x, g = make_input(shape, "channels_last"), make_grad(shape, "channels_last")
    check_forward(x, make_parameters(channels), training=True)
    check_backward(x, g, make_parameters(channels), training=True)


@threads("apex#groupbn")
def test_same_module_twice_before_backward(thread: str) -> None:
    module = bnext.BatchNorm2d(5)
    inputs = [make_input((3, 5, 4, 4)).detach().requires_grad_() for _ in range(2)]
    g = make_grad((3, 5, 4, 4))
    first, second = (module(x) for x in inputs)
    torch.autograd.backward([first, second], [g, g])
    for x in inputs:
        fwd = reference.forward(x)
        expected = reference.backward(g, fwd, training=True).input
        assert_within(x.grad, expected, tolerances.grad_input(g, fwd, None, x.dtype, training=True), "grad_input")


@threads("ATen's SyncBatchNorm, read in its source")
def test_counts_that_bfloat16_does_not_hold(thread: str) -> None:
    # In bfloat16 257 is 256, and adding 3 to 1000 changes nothing.
    rows = (257, 1000, 3)
    x = make_input((sum(rows), 5, 3), dtype=torch.bfloat16)
    gathered_stats = torch.stack([torch.ops.bnext.batch_norm_stats(share, 1e-5) for share in x.split(rows)])
    assert gathered_stats[:, -1].tolist() == [3 * n for n in rows]
    running = torch.zeros(5), torch.ones(5)
    torch.ops.bnext.batch_norm_gathered(x, gathered_stats, None, None, *running, None, 1.0, 1e-5)
    fwd = reference.forward(x)
    expected = reference.updated_running_stats(torch.zeros(5), torch.ones(5), fwd, 1.0)
    limits = tolerances.running_stats(expected, fwd, 1.0, x.dtype, torch.float32, torch.float32)
    for got, value, limit, what in zip(running, expected, limits, ("running_mean", "running_var"), strict=True):
        assert_within(got, value, limit, what)


@threads("inplace_abn#155")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_expanded_grad_output(thread: str, layout: str) -> None:
    # As global average pooling hands it back: one value an image and channel, expanded over space.
    x = make_input((4, 5, 6, 6), layout)
    for g in (torch.randn(4, 5, 1, 1).expand(4, 5, 6, 6), torch.tensor(1.0).expand(4, 5, 6, 6)):
        check_backward(x, g, make_parameters(5), training=True)


@threads("pytorch#13844", "pytorch#11382")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channels_of_very_different_scale(thread: str, layout: str) -> None:
    # Channels as real networks have them side by side: magnitudes from 1e-4 to 1e4, means far beyond the spread.
    scale = torch.logspace(-4, 4, 17).view(1, -1, 1, 1)
    offset = torch.linspace(-100, 100, 17).view(1, -1, 1, 1) * scale
    x = to_layout(torch.randn(8, 17, 14, 14) * scale + offset, layout)
    check_forward(x, make_parameters(17), training=True, eps=1e-12)
    check_backward(x, make_grad((8, 17, 14, 14)), make_parameters(17), training=True, eps=1e-12)


@threads("pytorch#97084")
@pytest.mark.usefixtures("fresh_compiler")
def test_no_graph_breaks_in_a_network(thread: str) -> None:
    model = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 3, 1), bnext.BatchNorm2d(3), nn.ReLU()) for _ in range(6)),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    x = torch.randn(2, 3, 4, 4)
    model(x)
    explanation = torch._dynamo.explain(model)(x)
    assert (explanation.graph_count, explanation.graph_break_count) == (1, 0)


def free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@threads("flashinfer#3391")
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("extra", [pytest.param(-1, marks=pytest.mark.long, id="below"), pytest.param(1, id="beyond")])
def test_both_sides_of_two_to_the_31_elements(thread: str, extra: int, layout: str) -> None:
    if free_memory() < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory: two tensors of 2^31 bfloat16 values, and room")
    # The data repeats after `period` rows, so the statistics, and the results, are those of one period.
    channels, period, width = 2, 4, 2**12
    rows = 2**31 // (channels * width) + extra * period
    pattern = make_input((period, channels, width), dtype=torch.bfloat16)
    if layout == "channels_first":
        x = pattern.repeat(rows // period, 1, 1)
    else:
        x = pattern.transpose(1, 2).repeat(rows // period, 1, 1).view(rows, width, 1, channels).permute(0, 3, 1, 2)
        pattern = pattern.unsqueeze(-1)
    assert (x.numel() > 2**31) == (extra > 0)
    assert x.shape[1:] == pattern.shape[1:]
    params = make_parameters(channels)
    fwd = reference.forward(pattern, params.weight, params.bias)

    y, stats, _ = torch.ops.bnext.batch_norm_train(x, params.weight, params.bias, None, None, None, 0.1, 1e-5)
    limit = tolerances.output(fwd, params.weight, params.bias, x.dtype, training=True)
    assert_within(y[:period], fwd.output, limit, "first rows")
    assert_repeats(y, period)
    del y
    if extra < 0:
        return  # the backward pass is tried where indices may overflow
    # grad_output = input, to hold two large tensors at most.
    grads = torch.ops.bnext.batch_norm_backward(x, x, params.weight, stats, True, 1e-5, [True, True, True, False])
    expected = reference.backward(pattern, fwd, params.weight, training=True)
    limit = tolerances.grad_input(pattern, fwd, params.weight, x.dtype, training=True)
    assert_within(grads[0][:period], expected.input, limit, "first rows of grad_input")
    assert_repeats(grads[0], period)
    # A chain of 512 additions errs by sqrt(512) = 23 roundings relative to the sum of magnitudes; lost terms would
    # show as far more.
    repeats, g = rows // period, reference.widen(pattern)
    dims = reference.reduced_dims(g.ndim)
    for got, want, terms in ((grads[1], expected.weight, g * fwd.xhat), (grads[2], expected.bias, g)):
        assert_within(got / repeats, want, 32 * 2.0**-24 * terms.abs().sum(dims), "parameter gradient")


def assert_repeats(tensor: Tensor, period: int) -> None:
    """Every `period` rows of the tensor are the same bits, compared in place."""
    step = period * 1024
    for start in range(period, len(tensor), step):
        rows = tensor[start : start + step]
        assert torch.equal(rows, tensor[start - period : start - period + len(rows)]), f"rows {start} to {start + step}"
