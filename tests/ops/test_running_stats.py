"""Running statistics and the counter: when a call changes them, and how."""

from __future__ import annotations

import pytest
import reference
import tolerances
import torch
from cases import FEW_CASES, Case, make_input, make_parameters, name, same_bits
from marks import MODES
from tolerances import assert_within

from bnext.functional import batch_norm

pytestmark = pytest.mark.kernels


def test_momentum_zero_leaves_the_running_stats_alone(device: str) -> None:
    params = make_parameters(5, device=device)
    kept = params.clone()
    batch_norm(make_input((6, 5, 7, 3), device=device), params.running_mean, params.running_var, None, None, True, 0.0)
    assert torch.equal(params.running_mean, kept.running_mean)
    assert torch.equal(params.running_var, kept.running_var)


@MODES
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_parameters_and_running_stats_of_any_stride(case: Case, training: bool, device: str) -> None:
    # Each vector is a column of a table, as in a model's flattened buffers: the other column must not change.
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
    # With momentum=None the running statistics after k batches are the plain means of the batches' statistics.
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
    for stats, each in ((counted, counter), (plain, None)):
        torch.ops.bnext.batch_norm_train(x, None, None, *stats[2:], each, 0.25, 1e-5)
    assert counter.item() == 42
    assert all(map(same_bits, counted, plain))


def test_empty_batch_does_not_spoil_the_cumulative_average(device: str) -> None:
    mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
    counter = torch.tensor(0, device=device)
    torch.ops.bnext.batch_norm_train(torch.empty(0, 3, device=device), None, None, mean, var, counter, None, 1e-5)
    assert counter.item() == 1
    assert torch.equal(mean, torch.zeros(3, device=device))
    assert torch.equal(var, torch.ones(3, device=device))
