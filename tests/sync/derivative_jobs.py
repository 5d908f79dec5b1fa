"""What the processes of test_sync_derivatives.py run: each function here is run by all ranks at once, and asserts.

What is differentiated is the sum over the processes of what each of them makes of its output. So every derivative of a
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
from cases import make_parameters, same_bits, to_layout
from processes import World
from reference import Act
from sync_shares import Collectives, all_reduce_sum, make_batch, make_layer, share_of
from tolerances import assert_within
from torch import Tensor, distributed
from torch.autograd import forward_ad

Run = Callable[..., Tensor]
Values = dict[str, Tensor]
# Which of input, weight, bias and residual are meant, by rank; the rows repeat where there are more ranks.
Needs = Sequence[Sequence[bool]]

NAMES = ("input", "weight", "bias", "residual")
ALL: Needs = ((True, True, True, True),)


class Case(NamedTuple):
    """What of its tensors each process differentiates."""

    needs: Needs = ALL  # that require a gradient
    asked: Needs = ALL  # for whose gradients, of those, it asks
    taken: Needs = ALL  # whose gradients, of those, it differentiates again

    def of(self, rank: int) -> tuple[tuple[bool, ...], tuple[bool, ...], tuple[bool, ...]]:
        needs, asked, taken = (tuple(rows[rank % len(rows)]) for rows in self)
        asked = tuple(map(operator.and_, needs, asked))
        return needs, asked, tuple(map(operator.and_, asked, taken))


class Problem:
    """A whole batch, whose values the dtype has but which is in float64, and the share of it that is here."""

    def __init__(
        self,
        world: World,
        sizes: Sequence[int],
        shape: Sequence[int],
        act: Act,
        layout: str = "contiguous",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        batch = make_batch((sum(sizes), *shape), has_residual=True)
        parameters = make_parameters(shape[0], torch.float64)
        # Equal on all ranks, as training keeps them, but each rank has its own.
        weight, bias = (p.repeat(world.size, 1) for p in (parameters.weight, parameters.bias))
        values = (value.to(dtype).double() for value in (batch.input, weight, bias, batch.residual))
        self.whole: Values = dict(zip(NAMES, values, strict=True))
        self.slope, self.dtype = batch.grad_output, dtype
        self.rank, self.rows, self.layout, self.act = world.rank, share_of(sizes, world.rank), layout, act
        self.owner = torch.repeat_interleave(torch.arange(world.size), torch.tensor(sizes))  # of each image
        self.layer = make_layer(shape[0], dtype, act=act)

    def part(self, name: str, whole: Tensor) -> Tensor:
        return whole[self.rank if name in ("weight", "bias") else self.rows]

    def share(self, whole: Values) -> Values:
        return {name: self.part(name, value).to(self.dtype) for name, value in whole.items()}

    def directions(self, needs: Needs) -> Values:
        """Random ones, the same in every process; zero where the rank that holds a value does not need it."""
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
            # Sums of float32 terms, which may be 1e2 times their result; and each derivative is rounded to the dtype, a
            # few of which the next one takes in.
            error = (actual.double() - expected).norm()
            assert error <= (2.0**-24 * 1e2 + 4 * torch.finfo(self.dtype).eps) * whole.norm(), (
                f"{name}: {error / whole.norm()}"
            )


def derivatives(
    run: Run, inputs: Values, case: Case, rank: int, slope: Tensor, directions: Sequence[Values]
) -> list[Values]:
    """Those of sum(slope*sin(run)) with respect to what is asked; then, along each direction in turn, of those."""
    needs, asked, taken = (dict(zip(NAMES, row, strict=True)) for row in case.of(rank))
    leaves = {name: value.detach().requires_grad_(needs[name]) for name, value in inputs.items()}
    wanted = {name: leaf for name, leaf in leaves.items() if asked[name]}
    scalar = (slope * run(**leaves).double().sin()).sum()
    results = []
    for along in directions:
        grads = torch.autograd.grad(scalar, list(wanted.values()), create_graph=True, materialize_grads=True)
        results.append(dict(zip(wanted, (grad.detach() for grad in grads), strict=True)))
        scalar = sum((along[n] * grad).sum() for n, grad in zip(wanted, grads, strict=True) if taken[n])
    return results


def derivatives_equal_those_of_the_whole_batch(
    world: World,
    *,
    sizes: Sequence[int],
    shape: Sequence[int],
    act: Act,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float64,
    cases: Sequence[Case] = (Case(),),
    orders: int = 3,
) -> None:
    for case in cases:
        problem = Problem(world, sizes, shape, act, layout, dtype)
        taken = [case.of(rank)[-1] for rank in range(world.size)]
        slope, along = problem.slope, [problem.directions(taken) for _ in range(orders)]
        share, parts = problem.share(problem.whole), list(map(problem.share, along))
        ours = derivatives(problem.run, share, case, world.rank, slope[problem.rows], parts)
        theirs = derivatives(problem.formula, problem.whole, Case(), world.rank, slope, along)
        for actual, expected in zip(ours, theirs, strict=True):
            for name, grad in actual.items():
                problem.assert_part(grad, name, expected[name])


def duals(values: Values, directions: Values, moving: Sequence[bool]) -> Values:
    chosen = zip(values.items(), directions.values(), moving, strict=True)
    return {name: forward_ad.make_dual(value, along) if m else value for (name, value), along, m in chosen}


def tangent_of(tensor: Tensor) -> Tensor:
    primal, tangent = forward_ad.unpack_dual(tensor)
    return torch.zeros_like(primal) if tangent is None else tangent


def tangents_equal_those_of_the_whole_batch(
    world: World,
    *,
    sizes: Sequence[int],
    shape: Sequence[int],
    act: Act,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float64,
    moving: Sequence[Needs] = (ALL,),
) -> None:
    for each in moving:
        problem = Problem(world, sizes, shape, act, layout, dtype)
        mine = each[world.rank % len(each)]
        along = problem.directions(each)
        for grad_enabled in (True, False):
            with forward_ad.dual_level(), torch.set_grad_enabled(grad_enabled):
                ours = problem.run(**duals(problem.share(problem.whole), problem.share(along), mine))
                theirs = problem.formula(**duals(problem.whole, along, ALL[0]))
                assert any(mine) == (forward_ad.unpack_dual(ours).tangent is not None)
                problem.assert_part(tangent_of(ours), "output", tangent_of(theirs))


def tangents_of_gradients(
    run: Run, inputs: Values, bent: Tensor | bool, slope: Tensor, directions: Values, moving: Sequence[bool]
) -> list[Tensor]:
    """Forward mode over the backward pass of sum(slope*sin(run)), or where that is not bent of sum(slope*run), whose
    gradient is constant: by input, weight, bias and residual."""
    with forward_ad.dual_level():
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        moved = duals(leaves, directions, moving)
        y = run(**moved)
        if isinstance(bent, Tensor):
            y = torch.where(bent, y.sin(), y)
        elif bent:
            y = y.sin()
        grads = torch.autograd.grad((slope * y).sum(), list(moved.values()))
        return [tangent_of(grad) for grad in grads]


def tangents_of_gradients_equal_those_of_the_whole_batch(
    world: World, *, sizes: Sequence[int], act: Act, moving: Sequence[Needs] = (ALL,)
) -> None:
    """With losses that are bent in every process; and in some, where the inputs have tangents in all of them."""
    inputs_move = [each for each in moving if all(row[0] for row in each)]
    for each, alike in (*itertools.product(moving, (True,)), *itertools.product(inputs_move, (False,))):
        problem = Problem(world, sizes, (3, 2, 2), act)
        mine = each[world.rank % len(each)]
        slope, along = problem.slope, problem.directions(each)
        bent = torch.tensor([alike or rank % 2 == 1 for rank in range(world.size)])
        here, all_over = bool(bent[world.rank]), bent[problem.owner][:, None, None, None]
        share, parts = problem.share(problem.whole), problem.share(along)
        ours = tangents_of_gradients(problem.run, share, here, slope[problem.rows], parts, mine)
        theirs = tangents_of_gradients(problem.formula, problem.whole, all_over, slope, along, ALL[0])
        for name, actual, expected in zip(NAMES, ours, theirs, strict=True):
            problem.assert_part(actual, name, expected)


def tangents_have_gradients(world: World, *, sizes: Sequence[int], act: Act) -> None:
    """Backward over forward mode."""
    problem = Problem(world, sizes, (3, 2, 2), act)
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


def a_graph_of_the_gradient_changes_no_bit(world: World) -> None:
    for act in (None, "relu", "silu"):
        problem = Problem(world, [2] * world.size, (5, 2, 2), act)
        leaves = [value.detach().requires_grad_() for value in problem.share(problem.whole).values()]
        y = problem.run(*leaves)
        plain, graph = (
            torch.autograd.grad(y, leaves, problem.slope[problem.rows], retain_graph=True, create_graph=create_graph)
            for create_graph in (False, True)
        )
        assert all(map(same_bits, plain, graph))


def gradients_along_many_directions(world: World, *, act: Act) -> None:
    """torch.func.vmap, and torch.autograd's own, of first and second derivatives: as one after the other. vmap takes
    no more collectives than for one direction, unless there is a mask."""
    problem = Problem(world, [3, 2, 4][: world.size], (3, 2, 2), act)
    leaves = [value.detach().requires_grad_() for value in problem.share(problem.whole).values()]
    y = problem.run(*leaves)
    for outputs in ([y], torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)):

        def gradients(*along: Tensor, outputs: Sequence[Tensor] = outputs, batched: bool = False) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, leaves, along, is_grads_batched=batched, retain_graph=True)

        along = [torch.randn(4, *output.shape, dtype=output.dtype) for output in outputs]
        with Collectives() as together:
            mapped = torch.func.vmap(gradients)(*along)
        with Collectives() as alone:
            first = gradients(*(each[0] for each in along))
        assert act == "relu" or len(together.seen) == len(alone.seen) > 0
        singles = [first, *(gradients(*(each[i] for each in along)) for i in range(1, 4))]
        for results in (mapped, gradients(*along, batched=True)):
            for name, actual, *expected in zip(NAMES, results, *singles, strict=True):
                largest = max(each.abs().max() for each in expected)
                assert_within(actual, torch.stack(expected), 1e-13 * largest, name)


def nested_tangents_are_refused(world: World) -> None:
    """torch.func.jvp of torch.func.grad, rather than a wrong result."""
    problem = Problem(world, [2] * world.size, (3, 2, 2), "silu")
    share = problem.share(problem.whole)

    def scalar(input: Tensor) -> Tensor:
        return problem.run(**(share | {"input": input})).sin().sum()

    problem.layer.requires_grad_(False).track_running_stats = False
    problem.layer.running_mean = problem.layer.running_var = problem.layer.num_batches_tracked = None
    with pytest.raises(RuntimeError, match=r"does not nest in torch\.func"):
        torch.func.jvp(torch.func.grad(scalar), (share["input"],), (share["input"],))


def a_sum_over_processes_is_differentiated(world: World) -> None:
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
