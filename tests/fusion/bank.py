"""Many patterns in one model, so that dynamo captures one graph for all: each has layers and inputs of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from observe import Net, assert_same_step, called, clones, count, count_sums, fused_names, leaves_of, outcome, why_left
from torch import Tensor, nn

import bnext

# All combinations of what the pass depends on: whether statistics are updated, and whether gradients are required.
FOUR_MODES = ("training", "evaluation", "training, no_grad", "evaluation, no_grad")


class Pattern(NamedTuple):
    """A forward of `Net` with two tensors as arguments, or a module, and how many activations and sums fusing removes
    from its autograd graph. Where `pairs` is None, these numbers are not tested."""

    forward: Callable[..., Any] | nn.Module
    pairs: int | None = 1
    sums: int = 0


class Bank(nn.Module):
    def __init__(self, patterns: Iterable[Pattern]) -> None:
        super().__init__()
        forwards = [pattern.forward for pattern in patterns]
        self.nets = nn.ModuleList([f if isinstance(f, nn.Module) else Net.with_forward(f)() for f in forwards])

    def forward(self, inputs: list[list[Tensor]]) -> list[Any]:
        return [net(*given) for net, given in zip(self.nets, inputs, strict=True)]


def step(bank: Bank, shape: tuple[int, ...], mode: str) -> list[dict[str, Any]]:
    """For each pattern, the outcome of a call and the numbers of activations and sums in its autograd graph."""
    with called(bank, mode):
        leaves = [leaves_of(torch.randn(shape, dtype=torch.float64) for _ in range(2)) for _ in bank.nets]
        given = list(map(clones, leaves))
        outputs = bank(given)
    steps = []
    for net, *call, output in zip(bank.nets, leaves, given, outputs, strict=True):
        nodes = {"activations": count(output), "sums": count_sums(output)}
        steps.append({**outcome(net, *call, output), "nodes": nodes})
    return steps


def failures(
    patterns: dict[str, Pattern], modes: Sequence[str], other_size: bool = False, at_least: int = 0
) -> dict[str, str]:
    """The first error of each pattern that is fused otherwise than it says, or whose fused model has other results in
    one of the modes or, with `other_size`, in a second size. If fusing changes fewer than `at_least` graphs, counted in
    each mode, that is an error too."""
    original = Bank(patterns.values()).double()
    fused = bnext.convert(copy.deepcopy(original), fuse=True)
    wrong: dict[str, str] = {}
    changed_graphs = 0
    for size, mode in [*((5, mode) for mode in modes), *[(7, modes[0]), (5, modes[0])] * other_size]:
        steps = (step(bank, (2, 3, size, 4), mode) for bank in (original, fused))
        for i, ((name, pattern), expected, actual) in enumerate(zip(patterns.items(), *steps, strict=True)):
            try:
                before, after = expected.pop("nodes"), actual.pop("nodes")
                changed_graphs += before != after
                if mode == "training" and pattern.pairs is not None:
                    saved = before["activations"] - after["activations"], before["sums"] - after["sums"]
                    why = why_left(fused, f"nets.{i}.bn")
                    assert saved == (pattern.pairs, pattern.sums), f"fused {saved}: {why}"
                    if mode == modes[0]:
                        names = [name for name in fused_names(fused) if f"{name}.".startswith(f"nets.{i}.")]
                        assert bool(names) == (pattern.pairs > 0), f"fused {saved}, but the report has {names}"
                assert_same_step(expected, actual, f"{mode}, size {size}")
            except AssertionError as error:
                wrong.setdefault(name, str(error).partition("\n")[0])
    return wrong if changed_graphs >= at_least else {**wrong, "all": f"fusing changed only {changed_graphs} graphs"}
