"""The operators that make up batch_norm_sync, in one process: local stats; results and gradients by gathered stats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import reference
import tolerances
import torch
from cases import (
    DTYPES,
    FEW_ACTS,
    FEW_CASES,
    RECTIFIERS,
    Case,
    make_grad,
    make_input,
    make_parameters,
    name,
    parameter_dtype,
    same_bits,
    to_layout,
)
from marks import EACH_DTYPE, FLAGS, pairs
from reference import Act, named, widen
from sync_shares import EPS, Batch, Whole, backward, gathered, local_stats, make_batch, merge, share_of, sync
from tolerances import assert_within
from torch import Tensor

pytestmark = pytest.mark.kernels


# The shares of a batch: uneven; with an empty one; with one of a single image.
SIZES = ((3, 2), (2, 0, 3), (1, 4))
# The shape of an image, and the batch's layout.
IMAGES = (
    Case((5, 3, 3), "contiguous"),
    Case((5, 3, 3), "channels_last"),
    Case((5,), "contiguous"),
    Case((5, 3, 4), "transposed"),
)


def check_shares(
    batch: Batch, sizes: Sequence[int], layout: str, act: Act = None, with_mask: bool = False, device: str = "cpu"
) -> None:
    """Do for each share in turn what its process would do, and compare with the reference of the whole batch."""
    activation, slope = named(act)
    parameters = make_parameters(batch.input.shape[1], parameter_dtype(batch.input.dtype), device)
    weight, bias = parameters.weight, parameters.bias
    kept = [t if t is None else t.clone() for t in batch]
    shares = [
        Batch(*(t if t is None else t.to(device) for t in batch.rows(share_of(sizes, i), layout)))
        for i in range(len(sizes))
    ]
    gathered_stats = gathered([share.input for share in shares])
    forwards, running = [], []
    for share in shares:
        mean, var, counter = *parameters.clone()[2:], torch.tensor(3, device=device)
        vectors = (weight, bias, mean, var, counter, 0.1, EPS)
        forwards.append(merge(share.input, gathered_stats, *vectors, share.residual, activation, slope, with_mask))
        running.append((mean, var, counter))
    for stats in running:
        assert all(map(same_bits, stats, running[0])), "the running statistics differ between the shares"
    saved = [save_stats for (_, save_stats, _), size in zip(forwards, sizes, strict=True) if size]
    assert all(same_bits(save_stats, saved[0]) for save_stats in saved)
    assert saved[0].dtype == torch.float64

    def differentiate(i: int, output_mask: list[bool], mean_grads: Tensor | None) -> tuple[Tensor, ...]:
        share, (_, save_stats, mask) = shares[i], forwards[i]
        epilogue = (None, None, mask) if with_mask else (bias, share.residual, None)
        return backward(
            share.grad_output, share.input, weight, save_stats, True, EPS, output_mask, *epilogue, activation, slope,
            mean_grads,
        )  # fmt: skip

    sums = [differentiate(i, [False, True, True, False], None)[1:3] for i in range(len(sizes))]
    count = sum(sizes) * batch.input[0, 0].numel()
    means = (sum(torch.stack(pair, 1) for pair in sums) / count).T  # not contiguous, since any strides are allowed
    wants_residual = activation != "identity"
    whole = Whole(batch, sizes, weight, bias, act)
    whole.check_running_stats(running[0], (*parameters[2:], torch.tensor(3)))
    for i, (share, (y, *_), (grad_weight, grad_bias)) in enumerate(zip(shares, forwards, sums, strict=True)):
        grad_input, *_, grad_residual = differentiate(i, [True, False, False, wants_residual], means)
        grads = {"input": grad_input, "weight": grad_weight, "bias": grad_bias}
        if wants_residual:
            grads["residual"] = grad_residual
        whole.check(i, share, y, grads)
    assert all(t is None or torch.equal(t, before) for t, before in zip(batch, kept, strict=True)), "written to"


@pairs(image=IMAGES, dtype=DTYPES, sizes=SIZES)
def test_shares_make_the_whole(image: Case, dtype: torch.dtype, sizes: tuple[int, ...], device: str) -> None:
    offset = 1e4 if dtype == torch.float64 else 0.0
    check_shares(make_batch((5, *image.shape), dtype, offset), sizes, image.layout, device=device)


@pairs(act=FEW_ACTS, layout=("contiguous", "channels_last"), dtype=(torch.float32, torch.bfloat16), has_residual=FLAGS)
def test_shares_with_an_activation(act: Act, layout: str, dtype: torch.dtype, has_residual: bool, device: str) -> None:
    batch = make_batch((5, 5, 3, 3), dtype, has_residual=has_residual)
    for with_mask in (False, True) if named(act)[0] in RECTIFIERS else (False,):
        check_shares(batch, SIZES[1], layout, act, with_mask, device)


@pytest.mark.not_emulated
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name)
def test_shares_across_chunks(dtype: torch.dtype, layout: str, device: str, set_threads: Callable[[int], None]) -> None:
    set_threads(2)
    check_shares(make_batch((23, 70, 13, 11), dtype, has_residual=True), (5, 0, 17, 1), layout, "relu", device=device)


@EACH_DTYPE
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_local_stats_are_means_m2_and_count(case: Case, dtype: torch.dtype, device: str) -> None:
    x = make_input(*case, dtype, device)
    channels = case.shape[1]
    stats = local_stats(x, EPS)
    fwd = reference.forward(x)
    assert (stats.shape, stats.dtype) == ((2 * channels + 1,), torch.float64)
    assert stats[-1].item() == fwd.count
    stat = tolerances.statistics(fwd.count, dtype)
    limit = stat * fwd.var.sqrt() + tolerances.ulp(fwd.mean.abs(), torch.float64)
    assert_within(stats[:channels], fwd.mean, limit, "means")
    m2 = fwd.var * fwd.count
    assert_within(stats[channels:-1], m2, 2 * stat * m2, "sums of squared deviations")
    for shape in ((0, 3, 2, 2), (2, 3, 0)):
        assert same_bits(local_stats(torch.ones(shape, dtype=dtype, device=device), EPS), stats.new_zeros(7))
    if len(case.shape) == 4:  # one value has a mean, and deviates from it by nothing
        one = local_stats(x[:1, :, :1, :1], EPS)
        assert torch.equal(one[:channels], x[0, :, 0, 0].double())
        assert torch.equal(one[channels:], one.new_tensor([0.0] * channels + [1.0]))


def test_the_variance_is_never_a_difference_of_squares(device: str) -> None:
    # The shares' means of 1e8 differ by 1e-3, which their squares in float64 would not show.
    gathered_stats = torch.tensor([[1e8, 2.0, 4.0], [1e8 + 1e-3, 3.0, 6.0], [5.0, 0.0, 0.0]], dtype=torch.float64)
    x = torch.full((2, 1), 1e8, dtype=torch.float64, device=device)
    _, stats, _ = merge(x, gathered_stats.to(device), None, None, None, None, None, 0.1, EPS)
    delta = gathered_stats[1, 0] - gathered_stats[0, 0]
    var = (5.0 + delta**2 * 4 * 6 / 10) / 10
    assert_within(stats[0].cpu(), (1e8 + delta * 0.6).reshape(1), 2**-26, "mean")
    assert_within(stats[1].cpu(), (var + EPS).rsqrt().reshape(1), 1e-15, "invstd")


@pytest.mark.parametrize("momentum", [None, 0.25], ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_running_statistics_over_steps(strided: bool, momentum: float | None, device: str) -> None:
    # Strided statistics are every second element of `memory`; the operator must not write to those between.
    memory = torch.full((2, 10), 7.0, device=device)
    mean, var = memory[:, ::2] if strided else memory[:, ::2].contiguous()
    counter = torch.tensor(0, device=device)
    for step in range(3):
        batch = make_batch((5, 5, 2, 2), torch.float32)
        x = batch.input.to(device)
        versions = [t._version for t in (mean, var, counter)]
        fwd = reference.forward(x)
        factor = 1 / (step + 1) if momentum is None else momentum
        expected = reference.updated_running_stats(mean, var, fwd, factor)
        merge(x[:2], gathered([x[:2], x[2:]]), None, None, mean, var, counter, momentum, EPS)
        limits = tolerances.running_stats(expected, fwd, factor, x.dtype, mean.dtype, var.dtype)
        assert_within(mean, expected[0], limits[0], "running_mean")
        assert_within(var, expected[1], limits[1], "running_var")
        assert counter.item() == step + 1
        assert all(t._version > before for t, before in zip((mean, var, counter), versions, strict=True))
    assert torch.equal(memory[:, 1::2], torch.full((2, 5), 7.0, device=device))
    # An empty batch is counted, and changes nothing else. One value has no variance, so running_var stays.
    before = (mean.clone(), var.clone())
    empty = torch.ones(0, 5, device=device)
    merge(empty, gathered([empty, empty]), None, None, mean, var, counter, momentum, EPS)
    assert all(map(same_bits, (mean, var), before))
    one = torch.ones(1, 5, device=device)
    y, *_ = merge(one, gathered([empty, one]), None, torch.full_like(mean, 0.5), mean, var, counter, 0.5, EPS)
    assert torch.equal(y, torch.full_like(y, 0.5))
    assert same_bits(var, before[1])
    assert_within(mean, (widen(before[0]) + 1) / 2, 1e-6, "running_mean")
    assert counter.item() == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_channel_that_is_not_finite_leaves_the_others_alone(layout: str, value: float, device: str) -> None:
    shape = (4, 5, 3, 3)
    clean, g = make_input(shape, layout, device=device), make_grad(shape, device=device)
    spoilt = clean.clone(memory_format=torch.preserve_format)
    spoilt[0, 2, 1, 1] = value
    results = []
    for x in (clean, spoilt):
        gathered_stats = gathered([x[:1], x[1:]])
        mean, var = torch.zeros(5, device=device), torch.ones(5, device=device)
        y, stats, _ = merge(x[1:], gathered_stats, None, None, mean, var, None, 0.1, EPS)
        means = torch.ones(2, 5, device=device)
        if x is spoilt:
            means[:, 2] = value
        grad, *_ = backward(g[1:], x[1:], None, stats, True, EPS, [True, False, False, False], mean_grads=means)
        results.append((gathered_stats[:, :-1].unflatten(1, (2, 5)), stats[None], mean[None], var[None], y, grad))
    others = [0, 1, 3, 4]
    for a, b in zip(*results, strict=True):
        at = a.ndim - 1 if a.ndim <= 3 else 1
        index = torch.tensor(others, device=device)
        assert same_bits(a.index_select(at, index), b.index_select(at, index))
    assert not results[1][4][:, 2].isfinite().all()


@pytest.mark.parametrize("magnitude", [1e30, 1e-30], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_ends_of_the_range(layout: str, magnitude: float, device: str) -> None:
    x = to_layout((torch.randn(5, 5, 3, 3, dtype=torch.float64) * magnitude).float().to(device), layout)
    eps = 1e-5 * magnitude if magnitude > 1 else 1e-5 * magnitude**2
    gathered_stats = torch.stack([local_stats(share, eps) for share in (x[:2], x[2:])])
    y, stats, _ = merge(x, gathered_stats, None, None, None, None, None, 0.1, eps)
    fwd = reference.forward(x, eps=eps)
    assert gathered_stats.isfinite().all()
    assert stats.isfinite().all()
    assert_within(y, fwd.output, tolerances.output(fwd, None, None, x.dtype, training=True), "output")


@pytest.mark.parametrize("act", ["identity", "relu", "gelu"])
def test_sync_is_made_of_the_other_operators(act: str, group: tuple[int, str], device: str) -> None:
    # Bit for bit, in a group of one process. In emulation no other test calls this operator.
    batch = Batch(*(t.to(device) for t in make_batch((5, 5, 3, 3), torch.float32, has_residual=True)))
    x, residual = (t.detach().requires_grad_() for t in (batch.input, batch.residual))
    p = make_parameters(5, device=device)
    weight, bias = (t.detach().clone().requires_grad_() for t in (p.weight, p.bias))
    mine, theirs = ((*p.clone()[2:], torch.tensor(3, device=device), None, EPS) for _ in range(2))
    y = sync(x, weight, bias, *mine, *group, residual, act)
    grads = torch.autograd.grad(y, [x, weight, bias, residual], batch.grad_output)

    masked = act == "relu"
    values = (batch.input, gathered([batch.input]), p.weight, p.bias)
    output, stats, mask = merge(*values, *theirs, batch.residual, act, 0.0, masked)
    epilogue = (None, None, mask, act, 0.0) if masked else (p.bias, batch.residual, None, act, 0.0)
    call = (batch.grad_output, batch.input, p.weight, stats, True, EPS)
    _, grad_weight, grad_bias, _ = backward(*call, [False, True, True, False], *epilogue)
    means = torch.stack([grad_weight, grad_bias]) / 45
    activated = act != "identity"
    grad_input, *_, grad_residual = backward(*call, [True, False, False, activated], *epilogue, means)
    expected = [grad_input, grad_weight, grad_bias, grad_residual if activated else batch.grad_output]
    assert same_bits(y, output)
    assert all(map(same_bits, grads, expected))
    assert all(map(same_bits, mine[:3], theirs[:3]))
