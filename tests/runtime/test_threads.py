"""The contract's threads row: the same bits for any number of threads, and from several Python threads at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import (
    DTYPES,
    FEW_CASES,
    LARGE_CASES,
    MEDIUM_CASES,
    Case,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    pairwise,
    parameter_dtype,
    same_bits,
)
from checks import call
from marks import FLAGS, PLAIN_OR_ACT, rows
from reference import Act
from torch import Tensor

import bnext

THREAD_COUNTS = (1, 2, 3, 4, 7)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def forward_and_backward(
    case: Case,
    dtype: torch.dtype,
    training: bool,
    seed: int = 0,
    act: Act = None,
    has_residual: bool = False,
) -> list[Tensor]:
    """Output, gradients and running statistics of one step."""
    torch.manual_seed(seed)
    x = make_input(*case, dtype).detach().requires_grad_()
    p = make_parameters(case.shape[1], parameter_dtype(dtype))
    weight, bias = p.weight.requires_grad_(), p.bias.requires_grad_()
    layout = case.layout if case.layout.startswith("channels_last") else "contiguous"
    g = make_grad(case.shape, layout, dtype)
    residual = make_residual(case.shape, layout, dtype).requires_grad_() if has_residual else None
    y = call(x, p, weight, bias, training, residual=residual, act=act)
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    return [y, *torch.autograd.grad(y, leaves, g), p.running_mean, p.running_var]


@rows(
    ("case", "dtype", "act", "training", "has_residual"),
    [
        *pairwise([*FEW_CASES, *MEDIUM_CASES], DTYPES, PLAIN_OR_ACT, FLAGS, FLAGS),
        *pairwise(LARGE_CASES, DTYPES, (None, "relu"), FLAGS, FLAGS),
    ],
)
def test_same_bits_for_any_number_of_threads(
    case: Case,
    dtype: torch.dtype,
    act: Act,
    training: bool,
    has_residual: bool,
    set_threads: Callable[[int], None],
) -> None:
    results = []
    for count in THREAD_COUNTS:
        set_threads(count)
        results.append(forward_and_backward(case, dtype, training, 0, act, has_residual))
    for count, result in zip(THREAD_COUNTS, results, strict=True):
        assert all(map(same_bits, result, results[0])), f"{count} threads"


def test_same_bits_run_to_run() -> None:
    for case in LARGE_CASES:
        runs = [forward_and_backward(case, torch.float32, True) for _ in range(3)]
        assert all(map(same_bits, runs[0], runs[1]))
        assert all(map(same_bits, runs[0], runs[2]))


def test_several_python_threads_at_once() -> None:
    jobs = [(case, dtype, seed) for seed, case in enumerate([*FEW_CASES, *MEDIUM_CASES]) for dtype in DTYPES[::2]]
    # Seeding is global: the data is made here, the threads only compute.
    data = []
    for case, dtype, seed in jobs:
        torch.manual_seed(seed)
        data.append((make_input(*case, dtype), make_grad(case.shape, dtype=dtype)))

    def step(index: int) -> list[Tensor]:
        x, g = data[index]
        module_class = {2: bnext.BatchNorm1d, 3: bnext.BatchNorm1d, 4: bnext.BatchNorm2d, 5: bnext.BatchNorm3d}[x.ndim]
        module, leaf = module_class(x.shape[1]), x.detach().requires_grad_()
        for _ in range(3):
            y = module(leaf)
        y.backward(g)
        return [y, leaf.grad, module.weight.grad, module.running_mean, module.running_var]

    expected = [step(i) for i in range(len(data))]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            for got, want in zip(pool.map(step, range(len(data))), expected, strict=True):
                assert all(map(same_bits, got, want))


def test_one_module_in_eval_mode_serves_many_threads() -> None:
    module = bnext.BatchNorm2d(70)
    module(make_input((12, 70, 10, 10)))
    module.eval()
    inputs = [make_input((12, 70, 10, 10), layout) for layout in ("contiguous", "channels_last") for _ in range(4)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]

        def run(x: Tensor) -> Tensor:
            with torch.no_grad():
                return module(x)

        with ThreadPoolExecutor(8) as pool:
            for got, want in zip(pool.map(run, inputs * 4), expected * 4, strict=True):
                assert same_bits(got, want)
