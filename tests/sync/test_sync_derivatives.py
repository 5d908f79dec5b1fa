"""SyncBatchNorm beyond the first derivative, and in forward mode, in several real processes.

What the processes do and assert is in derivative_jobs.py; here are the cases.
"""

from __future__ import annotations

import itertools

import derivative_jobs as jobs
import pytest
import torch
from cases import ACTS, FEW_ACTS, Case, name
from marks import pairs
from reference import Act
from sync_runs import EACH_WORLD, Run

# The shares of a batch: uneven; an empty one; one of a single image.
SHARES = ((3, 2), (4, 0, 2), (1, 3))
EACH_OF_FEW_SHARES = pytest.mark.parametrize("sizes", SHARES[:2], ids=name)
IMAGES = (
    Case((3,), "contiguous"),
    Case((3, 3, 2), "contiguous"),
    Case((3, 3, 2), "channels_last"),
    Case((3, 2, 3), "transposed"),
    Case((2, 2, 1, 2), "channels_last_3d"),
)
SUBSETS = [(need,) for need in itertools.product((True, False), repeat=4) if any(need)]
# Different parameters in each process, the input in all: no process may wait for a collective that another leaves out.
DIFFERENT = (
    ((True, True, True, True), (True, False, False, False)),
    ((True, False, True, False), (True, True, False, False)),
    ((True, False, False, True), (True, False, True, True), (True, True, False, False)),
)
# What all require, but not all ask for, or differentiate again.
INPUT, WEIGHT, BIAS = (tuple(i == j for j in range(4)) for i in range(3))
OTHERS = [jobs.Case(taken=(INPUT, WEIGHT)), jobs.Case(taken=(WEIGHT, BIAS)), jobs.Case(asked=(WEIGHT, BIAS))]


@pairs(image=IMAGES, act=(None, *ACTS), sizes=SHARES)
def test_three_derivatives(image: Case, act: Act, sizes: tuple[int, ...], run: Run) -> None:
    call = {"sizes": sizes, "shape": image.shape, "layout": image.layout, "act": act}
    run(jobs.derivatives_equal_those_of_the_whole_batch, **call)


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@EACH_OF_FEW_SHARES
def test_three_derivatives_of_any_subset(sizes: tuple[int, ...], act: Act, run: Run) -> None:
    call = {"sizes": sizes, "shape": (3, 2, 2), "act": act}
    run(jobs.derivatives_equal_those_of_the_whole_batch, **call, cases=[jobs.Case(needs) for needs in SUBSETS])


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@EACH_OF_FEW_SHARES
def test_processes_may_differentiate_different_parameters(sizes: tuple[int, ...], act: Act, run: Run) -> None:
    call = {"sizes": sizes, "shape": (3, 2, 2), "act": act}
    run(jobs.derivatives_equal_those_of_the_whole_batch, **call, cases=[jobs.Case(needs) for needs in DIFFERENT])
    run(jobs.derivatives_equal_those_of_the_whole_batch, **call, cases=OTHERS, orders=2)


@pairs(image=IMAGES, act=(None, *ACTS), sizes=SHARES)
def test_forward_mode(image: Case, act: Act, sizes: tuple[int, ...], run: Run) -> None:
    call = {"sizes": sizes, "shape": image.shape, "layout": image.layout, "act": act}
    run(jobs.tangents_equal_those_of_the_whole_batch, **call)


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@EACH_OF_FEW_SHARES
def test_forward_mode_of_any_subset(sizes: tuple[int, ...], act: Act, run: Run) -> None:
    # In forward mode not even the input has to have a tangent in every process.
    mixed = [((True, False, False, False), other[0]) for other in SUBSETS]
    call = {"sizes": sizes, "shape": (3, 2, 2), "act": act}
    run(jobs.tangents_equal_those_of_the_whole_batch, **call, moving=[*SUBSETS, *mixed])


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@EACH_OF_FEW_SHARES
def test_forward_over_reverse(sizes: tuple[int, ...], act: Act, run: Run) -> None:
    moving = [*SUBSETS, *DIFFERENT]
    run(jobs.tangents_of_gradients_equal_those_of_the_whole_batch, sizes=sizes, act=act, moving=moving)


@pytest.mark.parametrize("act", [None, *FEW_ACTS])
@EACH_OF_FEW_SHARES
def test_reverse_over_forward(sizes: tuple[int, ...], act: Act, run: Run) -> None:
    run(jobs.tangents_have_gradients, sizes=sizes, act=act)


@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_narrow_dtypes(dtype: torch.dtype, act: Act, run: Run) -> None:
    call = {"sizes": (6, 4), "shape": (3, 4, 3), "act": act, "dtype": dtype}
    run(jobs.derivatives_equal_those_of_the_whole_batch, **call)
    run(jobs.tangents_equal_those_of_the_whole_batch, **call)


@EACH_WORLD
def test_a_graph_of_the_gradient_changes_no_bit(size: int, run: Run) -> None:
    run(jobs.a_graph_of_the_gradient_changes_no_bit, size=size)


@pytest.mark.parametrize("act", [None, "relu", "silu"])
def test_gradients_along_many_directions(act: Act, run: Run) -> None:
    run(jobs.gradients_along_many_directions, size=2, act=act)


def test_tangents_that_nest_in_torch_func_are_refused(run: Run) -> None:
    run(jobs.nested_tangents_are_refused, size=2)


@EACH_WORLD
def test_sum_over_processes(size: int, run: Run) -> None:
    run(jobs.a_sum_over_processes_is_differentiated, size=size)
