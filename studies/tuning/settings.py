"""What is studied: the grid, the optimiser, the networks, and the steps at which a trial is evaluated."""

from dataclasses import dataclass
from itertools import product
from typing import Any

# β is the momentum of v ← βv + g (sgd) or of the average v ← βv + (1 − β)g (average).
OPTIMIZERS = ("sgd", "average")
# glorot: scaled for layer width and sigmoid, the best choice for the network without batch norm. torch: the default of
# its layers, a seventh of glorot. normal: of standard deviation 1, two and a half times glorot, which saturates the
# sigmoids.
INITS = ("glorot", "torch", "normal")

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BETAS = (0.8, 0.88, 0.9, 0.99, 0.998, 0.999, 0.9995)
SEEDS = (0, 1, 2)
STEPS = 2000
BATCH = 60  # as in figure 1 of Ioffe and Szegedy (2015)

# An average over 1/(1 − β) steps: 10 become 10.05, 1000 become 2000.
MOVES = ((0.9, 0.9005), (0.999, 0.9995))


@dataclass(frozen=True, order=True)
class Point:
    """One trial. Its result depends only on this and the settings, not on where or when it runs."""

    alpha: float
    beta: float
    batch_norm: bool
    seed: int
    batch_size: int = BATCH
    virtual_batch_size: int = 0  # images that are normalised together, 0: the whole batch
    init: str = INITS[0]


@dataclass(frozen=True)
class Settings:
    optimizer: str = "sgd"
    steps: int = STEPS
    alphas: tuple[float, ...] = ALPHAS
    betas: tuple[float, ...] = BETAS
    seeds: tuple[int, ...] = SEEDS
    inits: tuple[str, ...] = INITS[:1]
    batch_sizes: tuple[int, ...] = (BATCH,)
    virtual_batch_sizes: tuple[int, ...] = ()  # of the largest batch, which is also trained whole

    @property
    def networks(self) -> dict[str, dict[str, Any]]:
        """By name, the fields of Point that define a network and its batches."""
        found = {}
        for init, size in product(self.inits, self.batch_sizes):
            of_all = {"init": init, "batch_size": size}
            found[f"{init}, batch {size}"] = {**of_all, "batch_norm": False}
            found[f"{init}, batch {size}, batch norm"] = {**of_all, "batch_norm": True}
            for part in self.virtual_batch_sizes if size == max(self.batch_sizes) else ():
                ghost = {**of_all, "batch_norm": True, "virtual_batch_size": part}
                found[f"{init}, batch {size}, batch norm of {part}"] = ghost
        return found

    @property
    def compares_networks(self) -> bool:
        """Whether networks beyond the pair with and without batch norm are compared. Then no move of β is tried, and a
        trial is evaluated only at its end."""
        return len(self.networks) > 2

    @property
    def moves(self) -> tuple[tuple[float, float], ...]:
        """The changes of β whose start is in the grid."""
        return tuple(move for move in MOVES if move[0] in self.betas and not self.compares_networks)

    @property
    def all_betas(self) -> tuple[float, ...]:
        """The grid's β, and those that are tried only for a move."""
        return tuple(sorted({*self.betas, *(end for _, end in self.moves)}))

    @property
    def space(self) -> dict[str, list[Any]]:
        """The parameters of a trial in a storage, and the choices of each."""
        return {
            "network": list(self.networks),
            "alpha": list(self.alphas),
            "beta": list(self.all_betas),
            "seed": list(self.seeds),
        }

    def point(self, network: str, **others: Any) -> Point:
        return Point(**self.networks[network], **others)

    @property
    def points(self) -> list[Point]:
        return [self.point(**dict(zip(self.space, values, strict=True))) for values in product(*self.space.values())]

    @property
    def evaluations(self) -> list[int]:
        """Steps after which accuracy and distributions are taken: closer together at the start, 36 at most."""
        if self.compares_networks:
            return [self.steps]
        dense = [self.steps * hundredth / 100 for hundredth in range(1, 11)]
        medium = [self.steps * fortieth / 40 for fortieth in range(5, 21)]
        sparse = [self.steps * twentieth / 20 for twentieth in range(11, 21)]
        return sorted({max(1, round(step)) for step in dense + medium + sparse})


# The study of how the range that trains depends on batch, ghost batches and initialisation: some 25 minutes of one
# core. The factor from one α to the next is 4.
RANGE = Settings(
    steps=800,
    alphas=(0.000125, 0.0005, 0.002, 0.008, 0.03, 0.125, 0.5, 2.0),
    betas=(0.9, 0.99),
    seeds=(0, 1),
    inits=INITS,
    batch_sizes=(2, 4, 8, 32, 256),
    virtual_batch_sizes=(2, 4, 8, 32),
)
