"""Real training, scikit-learn's digits in float64: a converted model follows torch's loss curve to rounding."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bnext

STEPS = 200
BATCH = 64


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.from_numpy(data.images).double().div(16).unsqueeze(1), torch.from_numpy(data.target).long()


def mlp() -> nn.Module:
    first = (nn.Flatten(), nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU())
    second = (nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32, momentum=None), nn.ReLU())
    return nn.Sequential(*first, *second, nn.Linear(32, 10))


def cnn() -> nn.Module:
    first = (nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    second = (nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))


def train(model: nn.Module, digits: tuple[Tensor, Tensor], perturbation: float = 0.0) -> Tensor:
    """Losses of 200 steps; after each, every parameter is changed by up to `perturbation` of itself."""
    images, targets = digits
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    losses = []
    for _ in range(STEPS):
        picked = torch.randint(len(targets), (BATCH,), generator=batches)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[picked]), targets[picked])
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + perturbation * (2 * torch.rand(p.shape, generator=noise, dtype=p.dtype) - 1))
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "memory_format"),
    [(mlp, torch.contiguous_format), (cnn, torch.contiguous_format), (cnn, torch.channels_last)],
    ids=["mlp", "cnn-contiguous", "cnn-channels_last"],
)
def test_converted_model_follows_the_loss_curve(
    build: Callable[[], nn.Module], memory_format: torch.memory_format, digits: tuple[Tensor, Tensor]
) -> None:
    model = build().double().to(memory_format=memory_format)
    ours, control = bnext.convert(copy.deepcopy(model)), copy.deepcopy(model)
    losses = train(model, digits)

    # Training amplifies differences, by how much depends on the data and the step size. So the limit is measured: torch
    # against itself, each weight moved by one rounding (2^-52 of itself) after each step. A batch norm makes some ten
    # roundings in either direction where the control makes one; the factor 32 leaves as much again for chance.
    limit = 32 * (train(control, digits, perturbation=2.0**-52) - losses).abs().max()
    assert 0 < limit < 32e-7, "the curve is too sensitive for the comparison to mean anything"
    assert (train(ours, digits) - losses).abs().max() <= limit

    for a, b in zip(model.buffers(), ours.buffers(), strict=True):
        assert (a - b).abs().max() <= 1e-7 * a.abs().max()
    # Both have learned: otherwise equal curves would say little.
    images, targets = digits
    predictions = [m.eval()(images).argmax(1) for m in (model, ours)]
    assert torch.equal(*predictions)
    assert (predictions[1] == targets).double().mean() > 0.97
