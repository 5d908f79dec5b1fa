"""Random problems: whatever the shape, strides, dtypes and options, bnext equals the reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import ACTS, DTYPES, Case, Parameters, make_grad, make_input, make_parameters, make_residual, name, seed
from checks import Inputs, check_call
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import Act
from torch import Tensor


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shapes of every rank up to a few thousand elements, with at least two values a channel."""
    channels = draw(st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 128, 129, 257]))
    batch = draw(st.integers(1, 9))
    spatial = draw(st.lists(st.integers(1, 9), max_size=3).filter(lambda s: math.prod(s) <= 100))
    shape = (batch + (batch * math.prod(spatial) == 1), channels, *spatial)
    return Case(shape, "contiguous")


@st.composite
def strided(draw: st.DrawFn, values: Tensor) -> Tensor:
    """The values in memory of any order of the dimensions, with gaps between them and an offset before them."""
    order = draw(st.permutations(range(values.ndim)))
    steps = draw(st.lists(st.integers(1, 3), min_size=values.ndim, max_size=values.ndim))
    offset = draw(st.integers(0, 5))
    stride, strides = 1, [0] * values.ndim
    for dim in reversed(order):
        stride *= steps[dim]
        strides[dim] = stride
        stride *= values.shape[dim]
    storage = torch.full((offset + stride + 1,), torch.nan, dtype=values.dtype)  # a value from a gap would show
    return storage.as_strided(values.shape, strides, offset).copy_(values)


@st.composite
def repeated(draw: st.DrawFn, values: Tensor) -> Tensor:
    """The values, or their first ones expanded along a dimension."""
    dim = draw(st.sampled_from([None, None, None, *range(values.ndim)]))
    return values if dim is None else values.narrow(dim, 0, 1).expand(values.shape)


@st.composite
def anyhow(draw: st.DrawFn, values: list[Tensor]) -> list[Tensor]:
    """The values, either all of them strided, or each of them unchanged or expanded along one dimension."""
    change = strided if draw(st.booleans()) else repeated
    return [draw(change(v)) for v in values]


ACTIVATIONS = st.sampled_from(ACTS) | st.tuples(st.just("leaky_relu"), st.floats(-2, 2))


# Each dtype has examples of its own, since three roundings in place of one show in half precision alone.
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@settings(
    max_examples=175,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    data=st.data(),
    case=cases(),
    epilogue=st.none() | st.tuples(ACTIVATIONS, st.booleans()),
    training=st.booleans(),
    number=st.integers(0, 2**16),
)
def test_any_problem_equals_the_reference(
    data: st.DataObject, case: Case, dtype: torch.dtype, epilogue: tuple[Act, bool] | None, training: bool, number: int
) -> None:
    seed(number)
    act, has_residual = epilogue or (None, False)
    made = [make(*case, dtype) for make in (make_input, make_grad, make_residual)]
    x, g, residual = data.draw(anyhow(made[: 2 + has_residual])) + [None] * (not has_residual)
    dtypes = tuple(data.draw(st.sampled_from([dtype, torch.float32]), label=n) for n in Parameters._fields)
    params = make_parameters(case.shape[1], dtypes)
    params = params if data.draw(st.booleans(), label="affine") else params._replace(weight=None, bias=None)
    momentum = data.draw(st.sampled_from([0.0, 0.1, 0.75, 1.0]), label="momentum")
    eps = data.draw(st.sampled_from([1e-5, 1e-3]), label="eps")
    check_call(Inputs(x, g, params, residual), training=training, momentum=momentum, eps=eps, act=act)
