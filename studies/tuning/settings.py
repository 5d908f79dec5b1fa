"""What is studied: the grid, the optimiser, the initialisation, and at which steps a trial is looked at."""

from dataclasses import dataclass
from itertools import product
from typing import Any

# β is the momentum of v ← βv + g (sgd) or of the average v ← βv + (1 − β)g (average).
OPTIMIZERS = ("sgd", "average")
# glorot: scaled by layer width and sigmoid, the network without batch norm's best chance. torch: as its layers come.
INITS = ("glorot", "torch")

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BETAS = (0.8, 0.88, 0.9, 0.99, 0.998, 0.999, 0.9995)
SEEDS = (0, 1, 2)
STEPS = 2000
QUICK_SEEDS = (0, 1)
QUICK_STEPS = 200

# An average over 1/(1 − β) steps: 10 become 10.05, 1000 become 2000.
MOVES = ((0.9, 0.9005), (0.999, 0.9995))


@dataclass(frozen=True, order=True)
class Point:
    """One trial. Its result depends on this and the settings alone, not on who runs it or when."""

    alpha: float
    beta: float
    batch_norm: bool
    seed: int


@dataclass(frozen=True)
class Settings:
    optimizer: str = "sgd"
    init: str = "glorot"
    steps: int = STEPS
    alphas: tuple[float, ...] = ALPHAS
    betas: tuple[float, ...] = BETAS
    seeds: tuple[int, ...] = SEEDS

    @property
    def moves(self) -> tuple[tuple[float, float], ...]:
        """The changes of β whose start is in the grid."""
        return tuple(move for move in MOVES if move[0] in self.betas)

    @property
    def all_betas(self) -> tuple[float, ...]:
        """The grid's, and those that are tried for a move alone."""
        return tuple(sorted({*self.betas, *(end for _, end in self.moves)}))

    @property
    def space(self) -> dict[str, list[Any]]:
        """The choices of each field of Point."""
        return {
            "alpha": list(self.alphas),
            "beta": list(self.all_betas),
            "batch_norm": [False, True],
            "seed": list(self.seeds),
        }

    @property
    def points(self) -> list[Point]:
        return [Point(*values) for values in product(*self.space.values())]

    @property
    def evaluations(self) -> list[int]:
        """Steps after which accuracy and distributions are taken: closer together at the start, 36 at most."""
        dense = [self.steps * hundredth / 100 for hundredth in range(1, 11)]
        medium = [self.steps * fortieth / 40 for fortieth in range(5, 21)]
        sparse = [self.steps * twentieth / 20 for twentieth in range(11, 21)]
        return sorted({max(1, round(step)) for step in dense + medium + sparse})
