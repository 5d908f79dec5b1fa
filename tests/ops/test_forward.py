"""The forward pass against the float64 reference: contract section 2, rows shapes, layouts, dtypes, training, eval."""

from __future__ import annotations

import itertools

import pytest
import reference
import tolerances
import torch
from cases import (
    CASES,
    DTYPES,
    FEW_CASES,
    LARGE_CASES,
    MEDIUM_CASES,
    STRIDED_CASES,
    Case,
    make_input,
    make_parameters,
    name,
    parameter_dtype,
    same_bits,
)
from checks import check_forward
from tolerances import assert_within

from bnext.functional import batch_norm

pytestmark = pytest.mark.kernels

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_shape_and_layout(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input(*case, dtype, device)
    check_forward(x, make_parameters(case.shape[1], parameter_dtype(dtype), device), training=training)


@pytest.mark.too_large_for_simt
@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", LARGE_CASES, ids=name)
def test_across_chunks(case: Case, dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input(*case, dtype, device)
    check_forward(x, make_parameters(case.shape[1], parameter_dtype(dtype), device), training=training)


@pytest.mark.too_large_for_simt
@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_larger_than_the_cache(layout: str, training: bool, device: str) -> None:
    # 35 MB: past the 24 MB from which stores go round the cache, past the 32 MB from which each tensor is a fresh
    # mapping.
    x = make_input((11, 64, 112, 112), layout, torch.float32, device)
    check_forward(x, make_parameters(64, torch.float32, device), training=training)


@MODES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", [*FEW_CASES, *MEDIUM_CASES], ids=name)
def test_every_instruction_set(case: Case, dtype: torch.dtype, training: bool, isa: str) -> None:
    x = make_input(*case, dtype)
    check_forward(x, make_parameters(case.shape[1]), training=training)


@MODES
@pytest.mark.parametrize("mix", list(itertools.product("if", repeat=4)), ids="".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=name)
def test_every_mix_of_parameter_dtypes(dtype: torch.dtype, mix: tuple[str, ...], training: bool, device: str) -> None:
    # i: the input's dtype, f: float32; for weight, bias, running_mean, running_var.
    mixed = tuple(torch.float32 if choice == "f" else dtype for choice in mix)
    for case in (Case((3, 5, 5, 3), "contiguous"), Case((3, 5, 5, 3), "channels_last")):
        params = make_parameters(5, mixed, device)
        check_forward(make_input(*case, dtype, device), params, training=training)


@MODES
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("has_weight", [True, False], ids=["weight", "noweight"])
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_weight_and_bias_are_optional(
    case: Case, has_weight: bool, has_bias: bool, training: bool, device: str
) -> None:
    x = make_input(*case, torch.float32, device)
    params = make_parameters(case.shape[1], torch.float32, device)
    weight = params.weight if has_weight else None
    bias = params.bias if has_bias else None
    frozen = {} if training else {"running_mean": params.running_mean, "running_var": params.running_var}
    fwd = reference.forward(x, weight, bias, **frozen)
    y = batch_norm(x, params.running_mean, params.running_var, weight, bias, training)
    assert_within(y, fwd.output, tolerances.output(fwd, weight, bias, x.dtype, training=training), "output")


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_momentum_and_eps(momentum: float, eps: float, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device)
    params = make_parameters(5, device=device)
    check_forward(x, params, training=True, momentum=momentum, eps=eps)
    check_forward(x, params, training=False, eps=eps)


def test_momentum_zero_leaves_the_running_stats_alone(device: str) -> None:
    params = make_parameters(5, device=device)
    kept = params.clone()
    batch_norm(make_input((6, 5, 7, 3), device=device), params.running_mean, params.running_var, None, None, True, 0.0)
    assert torch.equal(params.running_mean, kept.running_mean)
    assert torch.equal(params.running_var, kept.running_var)


@MODES
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_parameters_and_running_stats_of_any_stride(case: Case, training: bool, device: str) -> None:
    # Columns of a table, such as a model's flattened buffers: the other column is nobody's business.
    x = make_input(*case, device=device)
    dense = make_parameters(case.shape[1], device=device)
    tables = [torch.stack([t, torch.full_like(t, 123.0)], 1) for t in dense]
    weight, bias, mean, var = (table[:, 0] for table in tables)
    expected = batch_norm(x, dense.running_mean, dense.running_var, dense.weight, dense.bias, training)
    assert same_bits(batch_norm(x, mean, var, weight, bias, training), expected)
    for table, column in zip(tables, dense, strict=True):
        assert same_bits(table[:, 0], column)
        assert (table[:, 1] == 123.0).all()


@pytest.mark.parametrize("given", ["running_mean", "running_var"])
def test_training_updates_whichever_running_stat_it_is_given(given: str, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device)
    params = make_parameters(5, device=device)
    both, one = params.clone(), params.clone()
    expected = batch_norm(x, both.running_mean, both.running_var, None, None, True)
    stats = {"running_mean": None, "running_var": None, given: getattr(one, given)}
    assert same_bits(batch_norm(x, **stats, training=True), expected)
    assert same_bits(getattr(one, given), getattr(both, given))
    assert not torch.equal(getattr(one, given), getattr(params, given))


def test_counter_is_counted_and_gives_the_cumulative_average(device: str) -> None:
    # momentum=None: after k batches the running statistics are the plain means of the k batches'.
    mean, var = torch.full((5,), 7.0, device=device), torch.full((5,), 9.0, device=device)
    counter = torch.tensor(0, device=device)
    batches = []
    for step in range(1, 5):
        x = make_input((6, 5, 7, 3), device=device)
        torch.ops.bnext.batch_norm_train(x, None, None, mean, var, counter, None, 1e-5)
        batches.append(reference.forward(x))
        assert counter.item() == step
        unbiased = torch.stack([b.var * b.count / (b.count - 1) for b in batches]).mean(0)
        average = torch.stack([b.mean for b in batches]).mean(0)
        # Each step is an update with momentum 1/step; the errors of the steps add up.
        limits = tolerances.running_stats((average, unbiased), batches[-1], 1.0, x.dtype, mean.dtype, var.dtype)
        assert_within(mean, average, step * limits[0], f"running_mean after {step}")
        assert_within(var, unbiased, step * limits[1], f"running_var after {step}")


def test_counter_with_momentum_only_counts(device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device)
    params = make_parameters(5, device=device)
    counted, plain = params.clone(), params.clone()
    counter = torch.tensor(41, device=device)
    torch.ops.bnext.batch_norm_train(x, None, None, counted.running_mean, counted.running_var, counter, 0.25, 1e-5)
    torch.ops.bnext.batch_norm_train(x, None, None, plain.running_mean, plain.running_var, None, 0.25, 1e-5)
    assert counter.item() == 42
    assert same_bits(counted.running_mean, plain.running_mean)
    assert same_bits(counted.running_var, plain.running_var)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 5), (0, 3, 2, 2, 2), (2, 3, 0), (2, 3, 0, 4)], ids=str)
def test_empty_batch_leaves_the_stats_and_counts(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = torch.empty(shape, dtype=dtype, device=device)
    params = make_parameters(3, parameter_dtype(dtype), device)
    kept = params.clone()
    counter = torch.tensor(6, device=device)
    trained, _, _ = torch.ops.bnext.batch_norm_train(
        x, params.weight, params.bias, params.running_mean, params.running_var, counter, 0.1, 1e-5
    )
    evaluated = batch_norm(x, params.running_mean, params.running_var, params.weight, params.bias)
    for y in (trained, evaluated):
        assert y.shape == x.shape
        assert y.dtype == dtype
        assert y.device == x.device
    assert counter.item() == 7
    assert same_bits(params.running_mean, kept.running_mean)
    assert same_bits(params.running_var, kept.running_var)


def test_empty_batch_does_not_spoil_the_cumulative_average(device: str) -> None:
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    counter = torch.tensor(0, device=device)
    torch.ops.bnext.batch_norm_train(torch.empty(0, 3, device=device), None, None, mean, var, counter, None, 1e-5)
    assert counter.item() == 1
    assert torch.equal(mean, torch.zeros(3, device=device))
    assert torch.equal(var, torch.ones(3, device=device))


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
def test_one_value_a_channel_is_fine_in_eval(shape: tuple[int, ...], device: str) -> None:
    check_forward(make_input(shape, device=device), make_parameters(3, device=device), training=False)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_save_stats_are_mean_and_invstd_in_float64(dtype: torch.dtype, training: bool, device: str) -> None:
    x = make_input((6, 5, 7, 3), "channels_last", dtype, device)
    p = make_parameters(5, parameter_dtype(dtype), device)
    if training:
        fwd = reference.forward(x)
        _, stats, _ = torch.ops.bnext.batch_norm_train(x, p.weight, p.bias, None, None, None, 0.1, 1e-5)
    else:
        fwd = reference.forward(x, running_mean=p.running_mean, running_var=p.running_var)
        _, stats, _ = torch.ops.bnext.batch_norm_eval(x, p.weight, p.bias, p.running_mean, p.running_var, 1e-5)
    assert stats.dtype == torch.float64
    expected = torch.stack([fwd.mean, fwd.invstd])
    # In eval mode the mean is copied; 1/sqrt takes three roundings in double, the reference's as many.
    relative = tolerances.statistics(fwd.count, dtype) if training else 0.0
    limit = torch.stack([fwd.var.sqrt() * relative, fwd.invstd * (relative + 6 * 2.0**-53)])
    assert_within(stats, expected, limit, "save_stats")


@pytest.mark.parametrize("case", STRIDED_CASES, ids=name)
def test_strides_do_not_change_a_bit_of_the_result(case: Case, device: str) -> None:
    # "At most one copy": whatever the strides, the values pass through the same kernel as a dense tensor's.
    x = make_input(*case, torch.float32, device)
    params = make_parameters(case.shape[1], device=device)
    dense = torch.empty_strided(x.shape, batch_norm(x, *params[2:]).stride(), device=device).copy_(x)
    for training in (True, False):
        results = [batch_norm(t, *params.clone()[2:], *params[:2], training) for t in (x, dense)]
        assert same_bits(*results)


def test_channels_are_independent(device: str) -> None:
    # The result of a channel is the same bits whichever channels surround it.
    for case in FEW_CASES:
        x = make_input(*case, torch.float32, device)
        other = x.clone(memory_format=torch.preserve_format)
        other[:, 1:] = other[:, 1:] * -3 + 1
        a, b = (batch_norm(t, None, None, training=True)[:, 0] for t in (x, other))
        assert same_bits(a, b), case


@MODES
def test_grad_mode_does_not_change_the_result(training: bool, device: str) -> None:
    x = make_input((6, 5, 7, 3), device=device)
    p = make_parameters(5, device=device)

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        stats = p.clone()
        return batch_norm(x, stats.running_mean, stats.running_var, weight, p.bias, training)

    tracked = run(x.clone().requires_grad_(), p.weight.clone().requires_grad_())
    plain = run(x, p.weight)
    with torch.no_grad():
        without = run(x.clone().requires_grad_(), p.weight)
    with torch.inference_mode():
        inference = run(x, p.weight)
    assert tracked.requires_grad
    assert not plain.requires_grad
    assert not without.requires_grad
    assert inference.is_inference()
    for y in (plain, without, inference):
        assert same_bits(y, tracked)


@MODES
def test_output_is_a_tensor_of_its_own(training: bool, device: str) -> None:
    # Even where nothing is to be done (mean 0, variance 1 - eps): writing to the output must not reach the input.
    x = torch.tensor([[-1.0], [1.0]], device=device)
    kept = x.clone()
    var = torch.ones(1, device=device) - 1e-5
    batch_norm(x, torch.zeros(1, device=device), var, training=training).fill_(5)
    assert torch.equal(x, kept)
