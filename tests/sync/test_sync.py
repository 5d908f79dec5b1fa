"""The contract's section 4: SyncBatchNorm in several real processes, over gloo and loopback.

What the processes do and assert is in sync_jobs.py, sync_model_jobs.py and pool_jobs.py; here are the cases.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pool_jobs
import pytest
import sync_jobs as jobs
import sync_model_jobs as model_jobs
import torch
from cases import FEW_ACTS, LOW_PRECISION, Case, name
from marks import pairs
from processes import Pool
from reference import Act
from sync_runs import EACH_WORLD, Run

# The shares of a batch: uneven; one empty; one of a single image; all empty.
SHARES = ((5, 2), (4, 0, 3), (1, 3), (2, 1, 1), (0, 6))
FEW_SHARES = SHARES[:2]
EACH_OF_FEW_SHARES = pytest.mark.parametrize("sizes", FEW_SHARES, ids=name)

IMAGES = (
    Case((5,), "contiguous"),
    Case((5, 7), "contiguous"),
    Case((5, 3, 3), "contiguous"),
    Case((5, 3, 3), "channels_last"),
    Case((5, 4, 4), "transposed"),
    Case((17, 2, 3, 2), "contiguous"),
    Case((17, 2, 3, 2), "channels_last_3d"),
)


@pairs(image=IMAGES, act=(None, *FEW_ACTS), sizes=SHARES)
def test_equals_one_process_with_the_whole_batch(image: Case, act: Act, sizes: tuple[int, ...], run: Run) -> None:
    run(jobs.equals_the_whole_batch, sizes=sizes, shape=image.shape, layout=image.layout, acts=[act], offset=1e4)


@pairs(
    sizes=FEW_SHARES,
    layout=("contiguous", "channels_last"),
    dtype=(torch.float32, *LOW_PRECISION),
    parameters=("own", "float32"),
)
def test_dtypes(sizes: tuple[int, ...], layout: str, dtype: torch.dtype, parameters: str, run: Run) -> None:
    own = dtype if parameters == "own" else torch.float32
    image = {"shape": (5, 7, 6), "layout": layout, "dtype": dtype}
    run(jobs.equals_the_whole_batch, sizes=sizes, **image, parameters=own, acts=FEW_ACTS)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@EACH_OF_FEW_SHARES
def test_padding(sizes: tuple[int, ...], layout: str, run: Run) -> None:
    run(jobs.counts_what_is_no_padding, sizes=sizes, layout=layout)


OPTIONS = (
    {"momentum": None},
    {"momentum": 0.3, "eps": 1e-3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False, "momentum": None},
)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()))
@EACH_OF_FEW_SHARES
def test_options_over_several_steps(sizes: tuple[int, ...], options: dict[str, Any], run: Run) -> None:
    call = {"shape": (5, 3, 4), "acts": [None, "relu"], "options": options, "steps": 3}
    for dtype in (torch.float64, torch.float32):
        run(jobs.equals_the_whole_batch, sizes=sizes, dtype=dtype, **call)


@EACH_OF_FEW_SHARES
def test_any_subset_of_gradients(sizes: tuple[int, ...], run: Run) -> None:
    needs = [need for need in itertools.product((True, False), repeat=4) if any(need)]
    without = [need for need in needs if any(need[:3]) and not need[3]]
    call = {"sizes": sizes, "shape": (5, 3, 2), "acts": [None, "relu", "silu"]}
    run(jobs.equals_the_whole_batch, **call, residuals=[True], needs=needs)
    run(jobs.equals_the_whole_batch, **call, residuals=[False], needs=without)


@pytest.mark.parametrize("sizes", [(0, 0), (0, 0, 0), (1, 0), (0, 1, 0), (1, 1)], ids=lambda s: "+".join(map(str, s)))
def test_hardly_a_value(sizes: tuple[int, ...], run: Run) -> None:
    # Nothing leaves the statistics as they are, but is counted; one value has no variance to take in, and is the mean.
    for shape in ((5,), (5, 1, 1)):
        run(jobs.equals_the_whole_batch, sizes=sizes, shape=shape, acts=[None, "relu"], offset=3.0, steps=2)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("sizes", [(11, 5), (7, 0, 9)], ids=lambda sizes: "+".join(map(str, sizes)))
def test_offset_does_not_cost_accuracy(sizes: tuple[int, ...], layout: str, run: Run) -> None:
    run(jobs.is_accurate_far_from_zero, sizes=sizes, layout=layout)


def test_groups_of_some_processes(run: Run) -> None:
    run(jobs.merges_groups_by_themselves, size=3)


def test_a_group_of_one_equals_batch_norm(run: Run) -> None:
    run(jobs.equals_batch_norm_alone, size=2)


def test_no_group_equals_batch_norm() -> None:
    assert not torch.distributed.is_initialized()
    jobs.check_equals_batch_norm()


@EACH_WORLD
def test_one_collective_a_direction(size: int, run: Run) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        run(jobs.exchanges_once_a_direction, size=size, dtype=dtype)


@EACH_WORLD
def test_no_collective_in_eval(size: int, run: Run) -> None:
    run(jobs.exchanges_nothing_in_eval, size=size)


@EACH_OF_FEW_SHARES
def test_called_twice_before_backward(sizes: tuple[int, ...], run: Run) -> None:
    run(jobs.is_called_twice_before_backward, sizes=sizes)


@pytest.mark.parametrize("wrong", jobs.WRONG)
def test_wrong_arguments_raise_before_anything_is_exchanged(wrong: str, run: Run) -> None:
    run(jobs.raises_before_it_exchanges, size=2, wrong=wrong)


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("sizes", [(5, 2), (4, 0, 3)], ids=lambda sizes: "+".join(map(str, sizes)))
def test_trains_in_distributed_data_parallel(sizes: tuple[int, ...], fuse: bool, run: Run) -> None:
    run(model_jobs.trains_as_one_process_does, sizes=sizes, options={"fuse": fuse})


@pytest.mark.parametrize("sizes", [(5, 2), (4, 1, 3)], ids=lambda sizes: "+".join(map(str, sizes)))
def test_trains_with_a_gradient_penalty_in_distributed_data_parallel(sizes: tuple[int, ...], run: Run) -> None:
    run(model_jobs.trains_as_one_process_does, sizes=sizes, penalty=1.0, steps=2)


@pytest.mark.parametrize("how", ["compiled", "compiled inside"])
def test_trains_in_distributed_data_parallel_compiled(how: str, run: Run) -> None:
    run(model_jobs.trains_as_one_process_does, sizes=(5, 2), how=how, options={"fuse": True}, steps=2)


def test_distributed_data_parallel_refuses_torchs_layer(run: Run) -> None:
    run(model_jobs.lets_torch_refuse_its_own, size=2)


COMPILED = (
    (None, False, False, {}),
    ("relu", True, False, {"momentum": None}),
    ("silu", True, True, {}),
    (("leaky_relu", 0.3), False, True, {"momentum": None, "affine": False}),
    ("gelu", False, True, {"track_running_stats": False}),
)


@pytest.mark.parametrize(("act", "has_residual", "dynamic", "options"), COMPILED, ids=lambda v: str(v) or "none")
def test_compiled_equals_eager(act: Act, has_residual: bool, dynamic: bool, options: dict[str, Any], run: Run) -> None:
    call = {"act": act, "has_residual": has_residual, "dynamic": dynamic, "options": options}
    run(model_jobs.equals_eager_when_compiled, size=2, **call)


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager(run: Run) -> None:
    call = {"act": "relu", "has_residual": True, "dynamic": False, "options": {}, "backend": "inductor"}
    run(model_jobs.equals_eager_when_compiled, size=2, **call, timeout=120)


# Deaths. Processes of their own, and a group that waits for less time than the suite's.


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_rank_that_dies_is_an_error_for_the_others(backward: bool, short_lived: Callable[..., Pool]) -> None:
    group_timeout = 10.0
    waited = short_lived(2, group_timeout).run(pool_jobs.survives_a_death, dying=1, backward=backward, exits=[1])
    assert waited[1] is None
    assert waited[0] < group_timeout + 1


def test_a_rank_that_does_not_come_is_an_error_for_the_others(run: Run) -> None:
    waited = run(pool_jobs.waits_for_one_that_does_not_come, size=2)
    assert 1.5 <= waited[1] < 5
