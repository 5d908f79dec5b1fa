"""Random forwards: a batch norm, a sum and an activation among other statements, in place and through views. Results
and arguments are the same fused and unfused. A failure prints the forward."""

from __future__ import annotations

import random
import textwrap

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from bank import Bank, Pattern, failures, step
from observe import QUICK
from torch import Tensor

# Statements about y (the normalised value), s (a residual), h (the input of the norm), x, r (arguments) and v (a view).
BEFORE = ("h = self.conv(x)", "h = x", "h = x * 2", "h = x[:]", "h = self.conv(x).relu_()")
RESIDUALS = (
    "s = r",
    "s = r * 2",
    "s = self.conv(r)",
    "s = r.view(r.shape)",
    "s = h",
    "s = self.bn2(r)",
    "s = r.detach()",
)
ADDS = ("y = y + s", "y = s + y", "y += s", "s += y; y = s", "y.add_(s)", "y = s.add_(y)", "y = torch.add(y, s)", "")
ACTS = (
    "z = F.relu(y)",
    "z = F.relu_(y)",
    "z = F.silu(y)",
    "z = F.silu(y, inplace=True)",
    "z = y.relu_()",
    "z = F.gelu(y)",
)
# At most two of these are inserted behind the batch norm.
OTHERS = (
    "v = y[:, :1]",
    "v = s[:, :1]",
    "v = h.detach()",
    "v = v * 2",
    "v.mul_(2)",
    "h.mul_(2)",
    "s.mul_(2)",
    "y.mul_(2)",
    "r.mul_(2)",
    "x.add_(1)",
    "s = s.clone()",
    "v = self.bn.running_mean.view(1, 3, 1, 1) * 2",
    "v = self.bn.running_var.view(1, 3, 1, 1).mul_(1.5)",
    "v = self.bn(r)",
    "v = F.relu(self.bn2(h))",
    "v = self.bn.num_batches_tracked.double().view(1, 1, 1, 1)",
    "s[0] = 0",
    "v = y.sum()",
    "v = s.sum()",
    "torch.set_grad_enabled(torch.is_grad_enabled())",
)
RETURNS = ("z", "z, v", "z, s", "z, y", "z + v", "z * s")
COUNT = 30  # forwards in a test


def random_forward(generator: random.Random) -> str:
    """The source of a random forward."""
    steps = [generator.choice(BEFORE), "v = h.sin()", generator.choice(RESIDUALS), "y = self.bn(h)"]
    later = [generator.choice(ADDS), generator.choice(ACTS)]
    if generator.random() < 0.3:
        steps[2:] = reversed(steps[2:])  # the residual is made behind the norm
    for _ in range(generator.randrange(3)):
        place = generator.randrange(len(later) + 1)
        later.insert(place, generator.choice(OTHERS if place < len(later) else OTHERS[2:]))
    lines = [line for line in (*steps, *later, f"return {generator.choice(RETURNS)}") if line]
    return "def forward(self, x, r):\n" + textwrap.indent("\n".join(lines), "    ")


def compiled(source: str) -> object:
    names: dict[str, object] = {"torch": torch, "F": F, "Tensor": Tensor}
    exec(source, names)
    return names["forward"]


def runs(source: str) -> bool:
    """Whether torch runs the forward: some write where torch forbids it. An error in backward does not count."""
    bank = Bank([Pattern(compiled(source))]).double()
    try:
        step(bank, (2, 3, 3, 2), "training")
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize(
    ("seed", "modes"),
    [
        (0, QUICK),
        (1, ("training, no_grad", "evaluation")),
        *(pytest.param(seed, QUICK, marks=pytest.mark.long) for seed in range(10, 60)),
    ],
)
def test_random_forwards_compute_the_same(seed: int, modes: tuple[str, ...]) -> None:
    generator = random.Random(seed)
    sources: dict[str, None] = {}
    while len(sources) < COUNT:
        source = random_forward(generator)
        if runs(source):
            sources[source] = None
    torch.manual_seed(seed)
    patterns = {source: Pattern(compiled(source), None) for source in sources}
    wrong = failures(patterns, modes, at_least=COUNT // 5)
    assert not wrong, "\n\n".join(f"{why}\n{source}" for source, why in wrong.items())
