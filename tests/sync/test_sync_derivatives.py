"""SyncBatchNorm beyond the first derivative, and in forward mode, in several real processes.

What is differentiated is the sum over the processes of a function of each one's output. So every derivative of a
share is a part of a derivative of the whole batch, in which the images of each process have a weight and a bias of
their own. Each process differentiates that formula, too, and compares its part.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import reference
import torch
from cases import ACTS, FEW_ACTS, Case, make_parameters, same_bits, to_layout
from marks import each, pairs
from processes import World
from reference import Act
from sync_shares import EACH_WORLD, NAMES, Collectives, all_reduce_sum, make_batch, make_layer, share_of
from tolerances import assert_within
from torch import Tensor, distributed
from torch.autograd import forward_ad

# A function of input, weight, bias and residual: bnext's layer on a share, or the formula on the whole batch.
Run = Callable[..., Tensor]
Values = dict[str, Tensor]
# Which of input, weight, bias and residual are meant, by rank; the rows repeat where there are more ranks.
Needs = Sequence[Sequence[bool]]
ALL: Needs = ((True, True, True, True),)

# The shares of a batch: uneven; an empty one; one of a single image.
SHARES = ((3, 2), (4, 0, 2), (1, 3))
EACH_OF_FEW_SHARES = each(sizes=SHARES[:2])
IMAGES = (
    Case((3,), "contiguous"),
    Case((3, 3, 2), "contiguous"),
    Case((3, 3, 2), "channels_last"),
    Case((3, 2, 3), "transposed"),
    Case((2, 2, 1, 2), "channels_last_3d"),
)
IMAGE = Case((3, 2, 2), "contiguous")
EACH_KIND_OF_ACT = each(act=(None, "relu", "silu"))


class Chosen(NamedTuple):
    """By which of its tensors each process differentiates."""

    needs: Needs = ALL  # the tensors that require a gradient
    asked: Needs = ALL  # those of them whose gradients the process asks for
    taken: Needs = ALL  # those of the gradients that it differentiates again

    def by_rank(self, rank: int) -> tuple[tuple[bool, ...], tuple[bool, ...], tuple[bool, ...]]:
        needs, asked, taken = (tuple(rows[rank % len(rows)]) for rows in self)
        asked = tuple(map(operator.and_, needs, asked))
        return needs, asked, tuple(map(operator.and_, asked, taken))


SUBSETS = [(need,) for need in itertools.product((True, False), repeat=4) if any(need)]
# Different parameters in each process, the input in all: no process may wait for a collective that another leaves out.
DIFFERENT = (
    ((True, True, True, True), (True, False, False, False)),
    ((True, False, True, False), (True, True, False, False)),
    ((True, False, False, True), (True, False, True, True), (True, True, False, False)),
)
# All tensors require gradients, but not all gradients are asked for, or differentiated again.
INPUT, WEIGHT, BIAS = (tuple(i == j for j in range(4)) for i in range(3))
OTHERS = [Chosen(taken=(INPUT, WEIGHT)), Chosen(taken=(WEIGHT, BIAS)), Chosen(asked=(WEIGHT, BIAS))]


class Problem:
    """A whole batch, in float64 but with values that the dtype holds, and the share of it of this process."""

    def __init__(
        self, world: World, sizes: Sequence[int], act: Act, image: Case = IMAGE, dtype: torch.dtype = torch.float64
    ) -> None:
        batch = make_batch((sum(sizes), *image.shape), has_residual=True)
        parameters = make_parameters(image.shape[0], torch.float64)
        # Equal on all ranks, as training keeps them, but each rank has its own.
        weight, bias = (p.repeat(world.size, 1) for p in (parameters.weight, parameters.bias))
        values = (value.to(dtype).double() for value in (batch.input, weight, bias, batch.residual))
        self.whole: Values = dict(zip(NAMES, values, strict=True))
        self.slope, self.dtype = batch.grad_output, dtype
        self.rank, self.rows, self.layout, self.act = world.rank, share_of(sizes, world.rank), image.layout, act
        self.owner = torch.repeat_interleave(torch.arange(world.size), torch.tensor(sizes))  # of each image
        self.layer = make_layer(image.shape[0], dtype, act=act)

    def part(self, name: str, whole: Tensor) -> Tensor:
        return whole[self.rank if name in ("weight", "bias") else self.rows]

    def share(self, whole: Values) -> Values:
        return {name: self.part(name, value).to(self.dtype) for name, value in whole.items()}

    def directions(self, needs: Needs) -> Values:
        """Random directions, the same in every process; zero where the rank that holds a value does not need it."""
        result = {}
        for index, (name, value) in enumerate(self.whole.items()):
            ranks = torch.arange(len(value)) if name in ("weight", "bias") else self.owner
            needed = torch.tensor([needs[rank % len(needs)][index] for rank in ranks], dtype=value.dtype)
            values = torch.randn_like(value) * needed.reshape(-1, *[1] * (value.dim() - 1))
            result[name] = values.to(self.dtype).double()
        return result

    def run(self, input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        data = tuple(to_layout(t, self.layout) for t in (input, residual))
        output: Tensor = torch.func.functional_call(self.layer, {"weight": weight, "bias": bias}, data)
        return output

    def formula(self, input: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        xhat = reference.composite(input, training=True)
        weight, bias = (p[self.owner].reshape(*xhat.shape[:2], *[1] * (xhat.dim() - 2)) for p in (weight, bias))
        return reference.activate(weight * xhat + bias + residual, self.act)

    def assert_part(self, actual: Tensor, name: str, whole: Tensor) -> None:
        expected = self.part(name, whole)
        assert actual.dtype == self.dtype
        if self.dtype == torch.float64:
            # Each derivative sums a few hundred terms, whose size may exceed that of the result by 1e3 at most here:
            # 2^-53 * 1e2 * 1e3 = 1e-11 of the largest element.
            largest = whole.abs().max() if whole.numel() else 0.0
            assert_within(actual, expected, 1e-11 * largest, name)
        else:
            # float32 terms may be 1e2 times their sum. Each derivative is rounded to the dtype, and the next one takes
            # in a few such roundings.
            error = (actual.double() - expected).norm()
            limit = (2.0**-24 * 1e2 + 4 * torch.finfo(self.dtype).eps) * whole.norm()
            assert error <= limit, f"{name}: {error / whole.norm()}"


def derivatives(
    run: Run, inputs: Values, chosen: Chosen, rank: int, slope: Tensor, directions: Sequence[Values]
) -> list[Values]:
    """The gradients that are asked for of sum(slope*sin(run)); then those of the product of these gradients with the
    first direction; and so on, with the next one."""
    needs, asked, taken = (dict(zip(NAMES, row, strict=True)) for row in chosen.by_rank(rank))
    leaves = {name: value.detach().requires_grad_(needs[name]) for name, value in inputs.items()}
    wanted = {name: leaf for name, leaf in leaves.items() if asked[name]}
    scalar = (slope * run(**leaves).double().sin()).sum()
    results = []
    for along in directions:
        grads = torch.autograd.grad(scalar, list(wanted.values()), create_graph=True, materialize_grads=True)
        results.append(dict(zip(wanted, (grad.detach() for grad in grads), strict=True)))
        scalar = sum((along[n] * grad).sum() for n, grad in zip(wanted, grads, strict=True) if taken[n])
    return results


def check_derivatives(problem: Problem, world: World, chosen: Chosen = Chosen(), orders: int = 3) -> None:  # noqa: B008
    taken = [chosen.by_rank(rank)[-1] for rank in range(world.size)]
    slope, along = problem.slope, [problem.directions(taken) for _ in range(orders)]
    share, parts = problem.share(problem.whole), list(map(problem.share, along))
    ours = derivatives(problem.run, share, chosen, world.rank, slope[problem.rows], parts)
    theirs = derivatives(problem.formula, problem.whole, Chosen(), world.rank, slope, along)
    for actual, expected in zip(ours, theirs, strict=True):
        for name, grad in actual.items():
            problem.assert_part(grad, name, expected[name])


def duals(values: Values, directions: Values, moving: Sequence[bool]) -> Values:
    chosen = zip(values.items(), directions.values(), moving, strict=True)
    return {name: forward_ad.make_dual(value, along) if m else value for (name, value), along, m in chosen}


def tangent_of(tensor: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(tensor)
    return torch.zeros_like(primal) if tangent is None else tangent


def check_tangents(problem: Problem, world: World, moving: Needs = ALL) -> None:
    mine = moving[world.rank % len(moving)]
    along = problem.directions(moving)
    for grad_enabled in (True, False):
        with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
            ours = problem.run(**duals(problem.share(problem.whole), problem.share(along), mine))
            theirs = problem.formula(**duals(problem.whole, along, ALL[0]))
            assert any(mine) == (forward_ad.unpack_dual(ours).tangent is not None)
            problem.assert_part(tangent_of(ours), "output", tangent_of(theirs))


@pairs(image=IMAGES, act=(None, *ACTS), sizes=SHARES)
def test_three_derivatives(world: World, image: Case, act: Act, sizes: tuple[int, ...]) -> None:
    check_derivatives(Problem(world, sizes, act, image), world)


@EACH_KIND_OF_ACT
@EACH_OF_FEW_SHARES
def test_three_derivatives_of_any_subset(world: World, sizes: tuple[int, ...], act: Act) -> None:
    for needs in SUBSETS:
        check_derivatives(Problem(world, sizes, act), world, Chosen(needs))


@EACH_KIND_OF_ACT
@EACH_OF_FEW_SHARES
def test_processes_may_differentiate_different_parameters(world: World, sizes: tuple[int, ...], act: Act) -> None:
    for needs in DIFFERENT:
        check_derivatives(Problem(world, sizes, act), world, Chosen(needs))
    for chosen in OTHERS:
        check_derivatives(Problem(world, sizes, act), world, chosen, orders=2)


@pairs(image=IMAGES, act=(None, *ACTS), sizes=SHARES)
def test_forward_mode(world: World, image: Case, act: Act, sizes: tuple[int, ...]) -> None:
    check_tangents(Problem(world, sizes, act, image), world)


@EACH_KIND_OF_ACT
@EACH_OF_FEW_SHARES
def test_forward_mode_of_any_subset(world: World, sizes: tuple[int, ...], act: Act) -> None:
    # In forward mode not even the input has to have a tangent in every process.
    mixed = [((True, False, False, False), other[0]) for other in SUBSETS]
    for moving in (*SUBSETS, *mixed):
        check_tangents(Problem(world, sizes, act), world, moving)


def tangents_of_gradients(
    run: Run, inputs: Values, bent: Tensor, slope: Tensor, directions: Values, moving: Sequence[bool]
) -> list[Tensor]:
    """The tangents of the gradients of sum(slope*sin(run)) or, where a value is not `bent`, of sum(slope*run), whose
    gradient is constant."""
    with forward_ad.dual_level():
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        moved = duals(leaves, directions, moving)
        y = run(**moved)
        # With `where` alone a constant gradient would have a tangent of zeros, instead of none.
        y = y.sin() if bent.all() else torch.where(bent, y.sin(), y) if bent.any() else y
        grads = torch.autograd.grad((slope * y).sum(), list(moved.values()))
        return [tangent_of(grad) for grad in grads]


@EACH_KIND_OF_ACT
@EACH_OF_FEW_SHARES
def test_forward_over_reverse(world: World, sizes: tuple[int, ...], act: Act) -> None:
    """The loss is bent in every process; or in some, if the inputs of all processes have tangents."""
    moving = [*SUBSETS, *DIFFERENT]
    inputs_move = [each_rank for each_rank in moving if all(row[0] for row in each_rank)]
    for needs, alike in (*itertools.product(moving, (True,)), *itertools.product(inputs_move, (False,))):
        problem = Problem(world, sizes, act)
        mine = needs[world.rank % len(needs)]
        slope, along = problem.slope, problem.directions(needs)
        bent = torch.tensor([alike or rank % 2 == 1 for rank in range(world.size)])
        share, parts = problem.share(problem.whole), problem.share(along)
        ours = tangents_of_gradients(problem.run, share, bent[world.rank], slope[problem.rows], parts, mine)
        all_over = bent[problem.owner][:, None, None, None]
        theirs = tangents_of_gradients(problem.formula, problem.whole, all_over, slope, along, ALL[0])
        for name, actual, expected in zip(NAMES, ours, theirs, strict=True):
            problem.assert_part(actual, name, expected)


@each(act=(None, *FEW_ACTS))
@EACH_OF_FEW_SHARES
def test_reverse_over_forward(world: World, sizes: tuple[int, ...], act: Act) -> None:
    problem = Problem(world, sizes, act)
    along = problem.directions(ALL)
    results = []
    for run, inputs, directions, slope in (
        (problem.run, problem.share(problem.whole), problem.share(along), problem.slope[problem.rows]),
        (problem.formula, problem.whole, along, problem.slope),
    ):
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        with forward_ad.dual_level():
            tangent = tangent_of(run(**duals(leaves, directions, ALL[0])))
            scalar = (slope * tangent.sin()).sum()
            results.append(torch.autograd.grad(scalar, list(leaves.values()), materialize_grads=True))
    for name, actual, expected in zip(NAMES, *results, strict=True):
        problem.assert_part(actual, name, expected)


@EACH_KIND_OF_ACT
@each(dtype=(torch.float32, torch.bfloat16))
def test_narrow_dtypes(world: World, dtype: torch.dtype, act: Act) -> None:
    for check in (check_derivatives, check_tangents):
        check(Problem(world, (6, 4), act, Case((3, 4, 3), "contiguous"), dtype), world)


@EACH_WORLD
def test_a_graph_of_the_gradient_changes_no_bit(world: World) -> None:
    for act in (None, "relu", "silu"):
        problem = Problem(world, [2] * world.size, act)
        leaves = [value.detach().requires_grad_() for value in problem.share(problem.whole).values()]
        y = problem.run(*leaves)
        plain, graph = (
            torch.autograd.grad(y, leaves, problem.slope[problem.rows], retain_graph=True, create_graph=create_graph)
            for create_graph in (False, True)
        )
        assert all(map(same_bits, plain, graph))


@EACH_KIND_OF_ACT
def test_gradients_along_many_directions(world: World, act: Act) -> None:
    """torch.func.vmap, and torch.autograd's own, of first and second derivatives: as one after the other. vmap takes
    no more collectives than for one direction, unless there is a mask."""
    problem = Problem(world, (3, 2), act)
    leaves = [value.detach().requires_grad_() for value in problem.share(problem.whole).values()]
    y = problem.run(*leaves)
    for outputs in ([y], torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)):

        def gradients(*along: Tensor, outputs: Sequence[Tensor] = outputs, batched: bool = False) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, leaves, along, is_grads_batched=batched, retain_graph=True)

        along = [torch.randn(4, *output.shape, dtype=output.dtype) for output in outputs]
        with Collectives() as together:
            mapped = torch.func.vmap(gradients)(*along)
        with Collectives() as alone:
            first = gradients(*(a[0] for a in along))
        assert act == "relu" or len(together.seen) == len(alone.seen) > 0
        singles = [first, *(gradients(*(a[i] for a in along)) for i in range(1, 4))]
        for results in (mapped, gradients(*along, batched=True)):
            for name, actual, *expected in zip(NAMES, results, *singles, strict=True):
                largest = max(grad.abs().max() for grad in expected)
                assert_within(actual, torch.stack(expected), 1e-13 * largest, name)


def test_tangents_that_nest_in_torch_func_are_refused(world: World) -> None:
    """torch.func.jvp of torch.func.grad is an error, rather than a wrong result."""
    problem = Problem(world, (2, 2), "silu")
    share = problem.share(problem.whole)

    def scalar(input: Tensor) -> Tensor:
        return problem.run(**(share | {"input": input})).sin().sum()

    problem.layer.requires_grad_(False).track_running_stats = False
    problem.layer.running_mean = problem.layer.running_var = problem.layer.num_batches_tracked = None
    with pytest.raises(RuntimeError, match=r"does not nest in torch\.func"):
        torch.func.jvp(torch.func.grad(scalar), (share["input"],), (share["input"],))


@EACH_WORLD
def test_sum_over_processes(world: World) -> None:
    """Every process's cube of the sum of all of them, whose derivatives are those of the sum of all cubes."""
    x = torch.randn(2, 3, dtype=torch.float64)  # the same in every process
    leaf = (x + world.rank).requires_grad_()
    ranks = sum(range(world.size))
    total = world.size * x + ranks
    group = distributed.group.WORLD.group_name
    value = all_reduce_sum(leaf, group).pow(3)
    for order, expected in enumerate((total**3, 3 * total**2, 6 * total, 6 * torch.ones_like(x))):
        limit = 1e-14 * world.size**order * (1 + total.abs() ** 3)
        assert_within(value, world.size**order * expected, limit, f"derivative {order}")
        if order < 3:
            (value,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf.detach(), x * world.rank)
        assert_within(tangent_of(all_reduce_sum(dual, group)), x * ranks, 1e-14 * (1 + x.abs()), "tangent")
