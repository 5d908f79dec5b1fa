"""What has failed in other batch norms. The number of the public issue that reported it stands above each test.

Issues about speed alone (pytorch#60063, #50549, #69525, #52011, #38915, #12006, #57034) are measured by the benchmark;
those about CUDA, SyncBatchNorm and fusion have their tests beside that code. Cases that other tests hold:

    pytorch#194504, #97084                 test_compile.py: test_steps_equal_eager
    pytorch#162489                         test_numerics.py: test_every_finite_float32
    pytorch#5410, #8283                    test_numerics.py: test_constant_channel_is_exactly_bias
    pytorch#140112, #82493, #106941        test_forward.py: test_every_shape_and_layout
    pytorch#75478, torchtitan#674, lightning#18802
                                           test_forward.py: test_every_mix_of_parameter_dtypes
    pytorch#187298                         test_convert.py: test_unknown_classes_are_left_alone_and_listed_once
    pytorch#85533, functorch#867, #384     test_functorch.py
    pytorch#4422                           test_autograd.py: test_derivatives_equal_those_of_the_formula
    pytorch#193097, #193698, #189828, #188958, #194798
                                           test_bad_arguments.py
    pytorch#66073, detectron2#4372         test_graph.py: test_the_graph_holds_no_more_than_backward_needs
    apex#groupbn                           test_autograd.py: test_same_module_twice_before_backward
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import reference
import tolerances
import torch
from cases import make_input, make_parameters, to_layout
from checks import check_call, make_inputs
from marks import MODES
from tolerances import assert_within
from torch import Tensor


# pytorch#19911, #29744, #16998, #4107
@MODES
@pytest.mark.parametrize("shape", [(65535, 2), (65536, 2), (131073, 3), (70001, 2, 3), (65537, 3, 1, 2)], ids=str)
def test_batches_beyond_65535(shape: tuple[int, ...], training: bool) -> None:
    check_call(make_inputs(shape), training=training)


# apex#1768
@pytest.mark.parametrize("channels", [3, 7, 9, 15, 31, 33, 63, 65, 100, 257, 1000])
def test_channels_last_with_channels_that_are_no_power_of_two(channels: int) -> None:
    inputs = make_inputs((8, channels, 9, 7), "channels_last", grad_layout="channels_last")
    check_call(inputs, training=True)


# found in the source of ATen's SyncBatchNorm
def test_counts_that_bfloat16_does_not_hold() -> None:
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


# inplace_abn#155
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_expanded_grad_output(layout: str) -> None:
    # The gradient of global average pooling: one value an image and channel, expanded over space.
    g = torch.randn(4, 5, 1, 1).expand(4, 5, 6, 6)
    check_call(make_inputs((4, 5, 6, 6), layout)._replace(grad_output=g), training=True)


# pytorch#13844, #11382
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_channels_of_very_different_scale(layout: str) -> None:
    # Real networks have such channels side by side: magnitudes from 1e-4 to 1e4, means far beyond the spread.
    scale = torch.logspace(-4, 4, 17).view(1, -1, 1, 1)
    offset = torch.linspace(-100, 100, 17).view(1, -1, 1, 1) * scale
    x = to_layout(torch.randn(8, 17, 14, 14) * scale + offset, layout)
    check_call(make_inputs(tuple(x.shape))._replace(input=x), training=True, eps=1e-12)


def available_memory() -> int:
    """Bytes, those included that the system would take from its cache of files."""
    (kilobytes,) = re.findall(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return 1024 * int(kilobytes)


# flashinfer#3391
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("extra", [pytest.param(-1, marks=pytest.mark.long, id="below"), pytest.param(1, id="beyond")])
def test_both_sides_of_two_to_the_31_elements(extra: int, layout: str) -> None:
    if available_memory() < 12 * 2**30:
        pytest.skip("needs 12 GiB of memory: two tensors of 2^31 bfloat16 values, and room")
    # The data repeats after `period` rows, so the statistics, and the results, are those of one period.
    channels, period, width = 2, 4, 2**12
    rows = 2**31 // (channels * width) + extra * period
    pattern = make_input((period, channels, width), dtype=torch.bfloat16)
    if layout == "channels_first":
        x = pattern.repeat(rows // period, 1, 1)
    else:
        x = pattern.transpose(1, 2).contiguous().repeat(rows // period, 1, 1)
        x = x.view(rows, width, 1, channels).permute(0, 3, 1, 2)
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
    """Every `period` rows of the tensor are the same bits, compared in place, a word at a time."""
    words = tensor.as_strided((tensor.numel(),), (1,)).view(torch.int64).view(len(tensor), -1)
    step = period * 1024
    for start in range(period, len(words), step):
        rows = words[start : start + step]
        assert torch.equal(rows, words[start - period : start - period + len(rows)]), f"rows {start} to {start + step}"
