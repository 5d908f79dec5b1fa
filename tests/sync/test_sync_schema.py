"""batch_norm_sync and the operators that make it up, as torch sees them: schemas, opcheck, fake kernels."""

from __future__ import annotations

import pytest
import torch
from cases import EMPTY_CASES, FEW_CASES, Case, name, parameter_dtype
from checks import assert_predicts, make_inputs
from marks import EACH_DTYPE, each, rows
from sync_shares import EPS, all_reduce_sum, backward, gathered, local_stats, merge, sync, sync_backward, train
from torch import Tensor

EACH_CASE = each(case=[*FEW_CASES, *EMPTY_CASES])


def merged_args(case: Case, dtype: torch.dtype, with_mask: bool, optional: bool) -> tuple[object, ...]:
    x, other, p, residual = make_inputs(*case, dtype, has_residual=optional)
    vectors = (*p, torch.tensor(3)) if optional else (None,) * 5
    momentum = None if optional else 0.1
    return x, gathered([x, other]), *vectors, momentum, EPS, residual, "relu", 0.0, with_mask


def backward_args(case: Case, dtype: torch.dtype) -> tuple[object, ...]:
    x, g, p, _ = make_inputs(*case, dtype)
    _, stats, _ = train(x, None, None, None, None, None, 0.1, EPS)
    means = torch.randn(2, case.shape[1], dtype=parameter_dtype(dtype))
    mask = [True, False, False, False]
    return g, x, p.weight, stats, True, EPS, mask, None, None, None, "identity", 0.0, means


def sync_args(case: Case, dtype: torch.dtype, group: tuple[int, str], grad: bool = False) -> tuple[object, ...]:
    x, _, p, residual = make_inputs(*case, dtype, has_residual=True)
    x, residual, weight, bias = (t.detach().requires_grad_(grad) for t in (x, residual, p.weight, p.bias))
    return x, weight, bias, *p[2:], torch.tensor(3), None, EPS, *group, residual, "silu", 0.0


def sync_backward_args(
    case: Case, dtype: torch.dtype, group: tuple[int, str], grad: bool = False
) -> tuple[object, ...]:
    x, g, p, residual = make_inputs(*case, dtype, has_residual=True)
    _, stats, _ = train(x, None, None, None, None, None, 0.1, EPS)
    count = torch.tensor(x.numel() / x.shape[1], dtype=torch.float64)
    x, weight, g, residual = (t.detach().requires_grad_(grad) for t in (x, p.weight, g, residual))
    return g, x, weight, stats, count, EPS, [True] * 4, group[1], p.bias, residual, None, "silu", 0.0


def test_schemas_mark_what_is_written() -> None:
    written = {"running_mean", "running_var", "num_batches_tracked"}
    unwritten = ((local_stats, set()), (sync_backward, set()), (all_reduce_sum, set()))
    for op, mutates in (*unwritten, (merge, written), (sync, written)):
        schema = op.default._schema
        marked = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        assert marked == mutates, schema.name
        assert not any(r.alias_info for r in schema.returns), schema.name


@pytest.mark.parametrize("case", [FEW_CASES[0], FEW_CASES[3], FEW_CASES[5]], ids=name)
def test_opcheck(case: Case) -> None:
    x, *_ = make_inputs(*case)
    torch.library.opcheck(local_stats.default, (x, EPS))
    for optional in (True, False):
        args = merged_args(case, torch.float32, with_mask=not optional, optional=optional)
        torch.library.opcheck(merge.default, args)
    torch.library.opcheck(backward.default, backward_args(case, torch.float32))


@rows(("case", "grad"), [(FEW_CASES[3], True), (FEW_CASES[5], False)])
def test_opcheck_of_sync(case: Case, grad: bool, group: tuple[int, str]) -> None:
    # Without test_schema and test_faketensor: they look into the operator and find torch's own wait_tensor, which gives
    # back its argument although schema and fake kernel say otherwise.
    tests = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(sync.default, sync_args(case, torch.float32, group, grad), test_utils=tests)
    args = sync_backward_args(case, torch.float32, group, grad)
    torch.library.opcheck(sync_backward.default, args, test_utils=tests)
    leaf = make_inputs(*case).input.requires_grad_(grad)
    torch.library.opcheck(all_reduce_sum.default, (leaf, group[1]), test_utils=tests)


@EACH_DTYPE
@EACH_CASE
def test_fake_kernels_predict_shape_dtype_and_strides(case: Case, dtype: torch.dtype, group: tuple[int, str]) -> None:
    assert_predicts(local_stats, (make_inputs(*case, dtype).input, EPS))
    assert_predicts(backward, backward_args(case, dtype))
    for optional in (True, False):
        for with_mask in (True, False):
            assert_predicts(merge, merged_args(case, dtype, with_mask, optional))
    # These operators have a kernel with autograd and one without; both call operators that torch.compile is to see.
    for autograd in (True, False):
        with torch.inference_mode(not autograd):
            assert_predicts(sync_backward, sync_backward_args(case, dtype, group))
            assert_predicts(all_reduce_sum, (make_inputs(*case, dtype).input, group[1]))
    args = sync_args(case, dtype, group)
    real = assert_predicts(sync, args)
    meta = sync(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")
