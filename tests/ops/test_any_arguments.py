"""Operators with arguments of any kind, in any combination: either an ordinary exception that leaves the statistics as
they were, or results of the right shapes, and never a crash."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from bad_values import DTYPES, INTERNAL, Target, bad_values, operators
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusals import ORDINARY, Arguments, remember
from torch import Tensor

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

OPERATORS = operators()
DATA = ("input", "grad_output", "residual")
WRITTEN = {"running_mean", "running_var", "num_batches_tracked"}
NUMBERS = [math.nan, math.inf, -math.inf, -1.0, -0.0, 5e-324, 1.7e308, 2**53 + 1, True]
ELEMENTS = [0.0, -1.0, 1.0, 1e300, math.nan, math.inf, 2.0**63]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """A tensor of small numbers, of any shape, dtype and strides, in any of PLACES."""
    shape = draw(st.lists(st.integers(0, 4), max_size=6))
    values = (torch.arange(math.prod(shape)) % 7 - 3.0).view(shape).to(draw(st.sampled_from(DTYPES)))
    for change in draw(st.lists(st.sampled_from([*STRIDES]), max_size=2)):
        values = STRIDES[change](values)
    return PLACES[draw(st.sampled_from([*PLACES]))](values)


STRIDES = {
    "transposed": lambda t: t.transpose(0, -1) if t.dim() else t,
    "sliced": lambda t: t[..., ::2] if t.dim() else t,
    "offset": lambda t: t[1:] if t.dim() else t,
    "expanded": lambda t: t[:1].expand(4, *t.shape[1:]) if t.dim() and len(t) else t,
    "overlapping": lambda t: t.as_strided(t.shape, [0] * t.dim()) if t.numel() else t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
}
# The CPU stands twice, since calls with tensors elsewhere do not get far.
PLACES = {
    "cpu": lambda t: t,
    "also_cpu": lambda t: t,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t if t.dtype == torch.float8_e5m2 else t.to_sparse(),
    "nowhere": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}


wrong_values = functools.cache(bad_values)


@st.composite
def calls(draw: st.DrawFn, target: Target) -> Arguments:
    """Valid arguments, a few of them replaced by a wrong value, by an extreme one, or by one of any kind."""
    values = target.good()
    if draw(st.booleans()):
        reshape(
            values,
            draw(st.sampled_from([(4, 3), (2, 3, 0), (0, 3, 5, 5), (1, 3), (2, 3, 2, 1, 2), (2, 3, 1, 1, 2, 2)])),
        )
    for argument in draw(st.lists(st.sampled_from(target.arguments), max_size=4, unique=True)):
        kind = draw(st.sampled_from(["wrong", "any", "none", "tensor", "extreme"]))
        if kind == "wrong":
            values[argument] = draw(st.sampled_from(wrong_values(target, argument))).make()
        elif kind == "any":
            values[argument] = draw(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors()
            )
        elif kind == "none":
            values[argument] = None
        elif isinstance(values[argument], Tensor):
            values[argument] = draw(tensors()) if kind == "tensor" else extreme(draw, values[argument])
        elif isinstance(values[argument], float):
            values[argument] = draw(st.sampled_from(NUMBERS))
    for argument in ("input", "weight", "residual") if draw(st.booleans()) else ():
        if isinstance(values.get(argument), Tensor) and values[argument].is_floating_point():
            values[argument].requires_grad_()
    return values


def reshape(values: Arguments, shape: tuple[int, ...]) -> None:
    """Gives the data this shape, and leaves out the mask, which would not fit it."""
    for key in set(DATA) & set(values):
        values[key] = values[key].flatten()[: math.prod(shape)].view(shape)
    if "mask" in values:
        values["mask"] = None


def extreme(draw: st.DrawFn, good: Tensor) -> Tensor:
    """A tensor of the right shape and dtype, with values that a sum or a count may stumble over."""
    if good.dtype == torch.int64:
        return torch.full_like(good, draw(st.sampled_from([0, -1, 2**62])))
    if good.dtype == torch.uint8:
        return torch.full_like(good, 255)
    return torch.full(good.shape, draw(st.sampled_from(ELEMENTS)), dtype=torch.float64).to(good.dtype)


def check_results(values: Arguments, results: Tensor | tuple[Tensor, ...]) -> None:
    """Asserts that the first result has the shape of the data, and that all results can be read. test_schema.py and
    test_raw_ops.py test more."""
    data = next((values[key] for key in ("grad_output", "input", "tensor") if key in values), None)
    if data is not None and isinstance(results, tuple):
        wanted = values.get("output_mask", [True])
        assert results[0].shape == (data.shape if wanted[0] else (0,))
    for result in [results] if isinstance(results, Tensor) else results:
        assert result.is_meta or result.clone().shape == result.shape  # reads all of it


def test_a_missing_input_beside_a_meta_tensor_is_refused() -> None:
    with pytest.raises(ORDINARY, match=r"\binput\b"):
        torch.ops.bnext.batch_norm_eval(None, None, torch.ones(3, device="meta"), torch.ones(3), torch.ones(3), 1e-5)


@pytest.mark.parametrize("target", OPERATORS, ids=str)
@settings(
    max_examples=250,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_arguments(target: Target, data: st.DataObject, group: tuple[int, str]) -> None:
    values = data.draw(calls(target))
    if values.get("group_name") == "0":
        values["group_name"] = group[1]
    unchanged = remember({key: value for key, value in values.items() if key in WRITTEN})
    rest = remember({key: value for key, value in values.items() if key not in WRITTEN})
    try:
        results, message = target.call(**values), ""
    except ORDINARY as error:
        results, message = None, str(error)
    if results is None:
        unchanged()
        assert not any(text in message for text in INTERNAL), message
    else:
        check_results(values, results)
    rest()
