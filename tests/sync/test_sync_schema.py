"""batch_norm_sync and what it is made of, as torch sees them: schemas, opcheck, fake kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import (
    FEW_CASES,
    Case,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    name,
    parameter_dtype,
)
from checks import significant_strides
from marks import EACH_DTYPE
from sync_shares import EPS, backward, local_stats, merge, sync, train
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


def merged_args(
    case: Case, dtype: torch.dtype, *, with_mask: bool = False, optional: bool = True
) -> tuple[object, ...]:
    p = make_parameters(case.shape[1], parameter_dtype(dtype))
    x = make_input(*case, dtype)
    gathered_stats = torch.stack([local_stats(make_input(*case, dtype), EPS) for _ in range(2)])
    vectors = (p.weight, p.bias, p.running_mean, p.running_var, torch.tensor(3)) if optional else (None,) * 5
    residual = make_residual(case.shape, dtype=dtype) if optional else None
    return x, gathered_stats, *vectors, None if optional else 0.1, EPS, residual, "relu", 0.0, with_mask


def backward_args(case: Case, dtype: torch.dtype) -> tuple[object, ...]:
    x, g = make_input(*case, dtype), make_grad(case.shape, dtype=dtype)
    _, stats, _ = train(x, None, None, None, None, None, 0.1, EPS)
    weight = make_parameters(case.shape[1], parameter_dtype(dtype)).weight
    means = torch.randn(2, case.shape[1], dtype=parameter_dtype(dtype))
    mask = [True, False, False, False]
    return g, x, weight, stats, True, EPS, mask, None, None, None, "identity", 0.0, means


def test_schemas_mark_what_is_written() -> None:
    written = {"running_mean", "running_var", "num_batches_tracked"}
    for op, mutates in ((local_stats, set()), (merge, written), (sync, written)):
        schema = op.default._schema
        marked = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        assert marked == mutates, schema.name
        assert not any(r.alias_info for r in schema.returns), schema.name


@pytest.mark.parametrize("case", [FEW_CASES[0], FEW_CASES[3], FEW_CASES[5]], ids=name)
def test_opcheck(case: Case) -> None:
    torch.library.opcheck(local_stats.default, (make_input(*case), EPS))
    for optional, with_mask in ((True, False), (False, True)):
        args = merged_args(case, torch.float32, optional=optional, with_mask=with_mask)
        torch.library.opcheck(merge.default, args)
    torch.library.opcheck(backward.default, backward_args(case, torch.float32))


EMPTY_CASES = [Case((0, 3), "contiguous"), Case((0, 3, 4, 5), "contiguous"), Case((2, 3, 0), "contiguous")]


@EACH_DTYPE
@pytest.mark.parametrize("case", [*FEW_CASES, *EMPTY_CASES], ids=name)
def test_fake_kernels_predict_shape_dtype_and_strides(case: Case, dtype: torch.dtype) -> None:
    calls = [(local_stats, (make_input(*case, dtype), EPS)), (backward, backward_args(case, dtype))]
    for optional, with_mask in itertools.product((True, False), repeat=2):
        calls.append((merge, merged_args(case, dtype, optional=optional, with_mask=with_mask)))
    for op, args in calls:
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        real = op(*args)
        pairs = [(fake, real)] if isinstance(real, Tensor) else zip(fake, real, strict=True)
        for predicted, result in pairs:
            assert predicted.shape == result.shape, op
            assert predicted.dtype == result.dtype, op
            assert significant_strides(predicted) == significant_strides(result), op


def sync_args(case: Case, dtype: torch.dtype, group: tuple[int, str], *, grad: bool = False) -> tuple[object, ...]:
    p = make_parameters(case.shape[1], parameter_dtype(dtype))
    x, residual = (make(*case, dtype).detach().requires_grad_(grad) for make in (make_input, make_residual))
    weight, bias = (t.requires_grad_(grad) for t in (p.weight, p.bias))
    vectors = (weight, bias, p.running_mean, p.running_var, torch.tensor(3))
    return x, *vectors, None, EPS, *group, residual, "silu", 0.0


@pytest.mark.parametrize("grad", [False, True], ids=["nograd", "grad"])
@pytest.mark.parametrize("case", [FEW_CASES[3], FEW_CASES[5]], ids=name)
def test_opcheck_of_sync(case: Case, grad: bool, group: tuple[int, str]) -> None:
    # Without test_schema and test_faketensor: they look into the operator and find torch's own wait_tensor, which gives
    # back its argument although schema and fake kernel say otherwise.
    tests = ("test_autograd_registration", "test_aot_dispatch_dynamic")
    torch.library.opcheck(sync.default, sync_args(case, torch.float32, group, grad=grad), test_utils=tests)


@EACH_DTYPE
@pytest.mark.parametrize("case", [*FEW_CASES, *EMPTY_CASES], ids=name)
def test_fake_kernel_of_sync(case: Case, dtype: torch.dtype, group: tuple[int, str]) -> None:
    args = sync_args(case, dtype, group)
    with FakeTensorMode() as mode:
        fake = sync(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    real = sync(*args)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)
    assert significant_strides(fake) == significant_strides(real)
    meta = sync(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    assert (meta.shape, meta.dtype, meta.device.type) == (real.shape, real.dtype, "meta")
