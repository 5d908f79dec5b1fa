"""One trial: trains one network at one point of the grid and keeps its curves."""

import math
import time

import torch
from torch import Tensor, nn

from studies.tuning.digits import Split, split
from studies.tuning.networks import build
from studies.tuning.results import Trial
from studies.tuning.settings import Point, Settings

PERCENTILES = (15, 50, 85)


def make_optimizer(name: str, module: nn.Module, alpha: float, beta: float) -> torch.optim.Optimizer:
    dampening = {"sgd": 0.0, "average": beta}[name]
    return torch.optim.SGD(module.parameters(), lr=alpha, momentum=beta, dampening=dampening, fused=True)


def percentiles(values: Tensor) -> Tensor:
    """Each unit's 15th, 50th and 85th percentile, interpolated linearly. (values, units) -> (3, units), float64."""
    return torch.quantile(values.double(), torch.tensor(PERCENTILES).double() / 100, dim=0)


def travel(history: Tensor) -> float | None:
    """The distances of the medians between evaluations, summed, in units of the mean width from the 15th to the 85th
    percentile; the mean over the units. (evaluations, 3, units) -> number; None where it is undefined."""
    if len(history) < 2:
        return None
    path = history[:, 1].diff(dim=0).abs().sum(0)
    width = (history[:, 2] - history[:, 0]).mean(0)
    wide = width > 0
    return (path[wide] / width[wide]).mean().item() if wide.any() else None


def evaluate(network: nn.Sequential, data: Split) -> tuple[int, Tensor] | None:
    """The number of correct test images, and the percentiles of the inputs of the last hidden layer's sigmoids, which
    batch norm should stabilise; None if anything is not finite."""
    network.eval()
    with torch.no_grad():
        values = network[:-2](data.test_images)
        scores = network[-2:](values)
    network.train()
    if not (scores.isfinite().all() and values.isfinite().all()):
        return None
    return int((scores.argmax(1) == data.test_targets).sum()), percentiles(values)


def train(settings: Settings, point: Point) -> Trial:
    """Train to the end, or to the first loss that is not finite, which is a result, too."""
    start = time.process_time()
    data = split(point.seed)
    network = build(point)
    optimizer = make_optimizer(settings.optimizer, network, point.alpha, point.beta)
    generator = torch.Generator().manual_seed(point.seed)
    batches = torch.randint(len(data.targets), (settings.steps, point.batch_size), generator=generator)

    evaluations = set(settings.evaluations)
    losses: list[float] = []
    correct: list[int] = []
    history: list[Tensor] = []
    since: list[float] = []
    diverged_at = None
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(data.images[batch]), data.targets[batch])
        since.append(loss.item())
        if not math.isfinite(since[-1]):
            diverged_at = step
            break
        loss.backward()
        optimizer.step()
        if step not in evaluations:
            continue
        found = evaluate(network, data)
        if found is None:
            diverged_at = step
            break
        correct.append(found[0])
        history.append(found[1])
        losses.append(math.fsum(since) / len(since))
        since.clear()

    everything = torch.stack(history) if history else torch.empty(0, len(PERCENTILES), 1, dtype=torch.float64)
    return Trial(
        point=point,
        diverged_at=diverged_at,
        loss=losses,
        correct=correct,
        tests=len(data.test_targets),
        percentiles=everything[:, :, 0].T.tolist(),
        travel=travel(everything),
        cpu_s=time.process_time() - start,
    )
