"""One trial of the tuning study: what it depends on, what it keeps, and how it ends when it diverges."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from studies.tuning.digits import split
from studies.tuning.networks import build
from studies.tuning.settings import INITS, Point, Settings
from studies.tuning.training import make_optimizer, percentiles, train, travel


@pytest.mark.parametrize("batch_norm", [False, True])
def test_same_seed_same_result_bit_for_bit(batch_norm: bool) -> None:
    settings = Settings(steps=12)
    point = Point(0.1, 0.9, batch_norm, 1)
    first = train(settings, point)
    # Neither a trial before it nor the state of the global generator changes the result.
    torch.manual_seed(1234)
    assert train(settings, replace(point, seed=2)).loss != first.loss
    assert replace(train(settings, point), cpu_s=0) == replace(first, cpu_s=0)


# The evaluation after step 1 finds it where there is one. Otherwise the loss of step 2 is not finite.
@pytest.mark.parametrize(("steps", "diverged_at"), [(12, 1), (1000, 2)])
def test_a_diverging_trial_is_a_result(steps: int, diverged_at: int) -> None:
    trial = train(Settings(steps=steps), Point(3e38, 0.9, False, 0))
    assert trial.diverged_at == diverged_at
    assert trial.loss == trial.correct == []
    assert trial.percentiles == [[], [], []]
    assert trial.travel is None


def test_curves_up_to_the_divergence_are_kept() -> None:
    settings = Settings(steps=12)
    trial = train(settings, Point(1e36, 0.99, False, 0))
    assert trial.diverged_at is not None
    assert 0 < len(trial.loss) == len(trial.correct) < len(settings.evaluations)
    assert all(math.isfinite(value) for value in trial.loss)
    assert [len(curve) for curve in trial.percentiles] == [len(trial.loss)] * 3


@pytest.mark.parametrize(("init", "deviation"), list(zip(INITS, (0.4, 0.0577, 1.0), strict=True)))
def test_weights_are_the_same_with_and_without_batch_norm(init: str, deviation: float) -> None:
    networks = [build(Point(0.1, 0.9, side, 3, init=init)) for side in (False, True)]
    plain, normed = ([layer.weight for layer in network if isinstance(layer, nn.Linear)] for network in networks)
    assert len(plain) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain, normed, strict=True))
    assert plain[1].std().item() == pytest.approx(deviation, rel=0.05)


def test_batch_norm_is_between_the_linear_map_and_the_activation() -> None:
    network = build(Point(0.1, 0.9, True, 0))
    names = [type(layer).__name__ for layer in network]
    assert names == ["Flatten", *["Linear", "BatchNorm1d", "Sigmoid"] * 3, "Linear"]
    assert type(network[2]).__module__.startswith("bnext")


def test_a_ghost_batch_is_normalised_in_parts() -> None:
    ghost, whole = (build(Point(0.1, 0.9, True, 0, 8, part)) for part in (4, 0))
    images = split(0).images[:8]
    assert torch.allclose(ghost(images), torch.cat([whole(part) for part in images.split(4)]), atol=1e-5)
    assert torch.allclose(ghost[2].running_var, whole[2].running_var)


def test_a_trial_sees_batches_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(nn.functional, "cross_entropy", lambda x, target: seen.append(len(target)) or real(x, target))
    train(Settings(steps=2), Point(0.1, 0.9, False, 0, batch_size=7))
    assert seen == [7, 7]


def test_split_depends_on_the_seed() -> None:
    a, b = split(0), split(1)
    assert (len(a.images), len(a.test_images)) == (1437, 360)
    assert not torch.equal(a.targets, b.targets)
    assert (a.images.min(), a.images.max()) == (0, 1)
    # Both hold the same 1,797 images.
    first, second = (torch.cat([s.images, s.test_images]).sum((1, 2, 3)).sort().values for s in (a, b))
    assert torch.equal(first, second)


def test_percentiles_of_a_known_case() -> None:
    ascending = torch.arange(101.0)
    values = torch.stack([ascending, 10 * ascending.flip(0)], dim=1)[torch.randperm(101)]
    assert percentiles(values).tolist() == [[15.0, 150.0], [50.0, 500.0], [85.0, 850.0]]


def test_travel_is_the_path_of_the_medians_in_units_of_the_width() -> None:
    still, moving = torch.zeros(3), torch.tensor([0.0, 3.0, 1.0])  # moves by 3, then back by 2
    history = torch.stack([torch.stack([still, moving]) + shift for shift in (-1.0, 0.0, 1.0)]).movedim(2, 0)
    assert history.shape == (3, 3, 2)
    assert travel(history.double()) == pytest.approx((0 + 5 / 2) / 2)
    assert travel(history[:1].double()) is None
    assert travel(torch.zeros(3, 3, 2).double()) is None


def test_percentiles_kept_are_those_of_the_last_hidden_layers_input() -> None:
    network = build(Point(0.1, 0.9, False, 0))
    with torch.no_grad():
        before_last_sigmoid = network[:6](split(0).test_images)
    expected = percentiles(before_last_sigmoid)[:, 0].tolist()
    trial = train(Settings(steps=1), Point(1e-30, 0.0, False, 0))  # a step that changes nothing
    assert torch.tensor(trial.percentiles).flatten().tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "expected"), [("sgd", [-0.1, -0.1 - 0.1 * 1.5]), ("average", [-0.1, -0.1 - 0.1 * (0.5 + 0.5)])]
)
def test_momentum_is_the_sum_or_the_average(name: str, expected: list[float]) -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    optimizer = make_optimizer(name, module, alpha=0.1, beta=0.5)
    found = []
    for _ in range(2):
        module.weight.grad = torch.ones_like(module.weight)
        optimizer.step()
        found.append(module.weight.item())
    assert found == pytest.approx(expected)
