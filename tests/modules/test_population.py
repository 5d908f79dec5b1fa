"""update_bn gives the running statistics of all data together, whatever the batches, and changes nothing else."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from cases import make_input, to_layout
from fusion.counting import count
from networks import Basic, OwnNorm, assert_close, random_input
from processes import Pool, World
from reference import widen
from tolerances import assert_within, half_ulp, statistics
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

import bnext

Change = Callable[[nn.Module], nn.Module]

UNEVEN = (64, 64, 2)


def population(inputs: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of all values of each channel, in float64: sum(x)/n, and sum((x - mean)^2)/(n - 1)."""
    x = torch.cat([widen(input).transpose(0, 1).flatten(1) for input in inputs], 1)
    mean = x.sum(1) / x.shape[1]
    return mean, (x - mean[:, None]).square().sum(1) / (x.shape[1] - 1)


def expected(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Mean and variance of what each layer that trains sees, and the number of its calls, by the layer's name."""
    twin, seen = copy.deepcopy(model).train(), {}
    for name, m in twin.named_modules():
        if isinstance(m, _BatchNorm) and m.training:
            found = seen[name] = []
            m.register_forward_pre_hook(lambda _, args, found=found: found.append(args[0].clone()))
    with torch.no_grad():
        for batch in batches:
            twin(batch)
    return {name: (*population(inputs), len(inputs)) for name, inputs in seen.items()}


def assert_statistics(model: nn.Module, wanted: dict[str, tuple[Tensor, Tensor, int]]) -> None:
    for name, (mean, var, calls) in wanted.items():
        layer = model.get_submodule(name)
        assert_close(layer.running_mean, mean, f"{name}: mean")
        assert_close(layer.running_var, var, f"{name}: var")
        assert layer.num_batches_tracked == calls, name


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))


class Twice(nn.Module):
    """One layer that is called twice, once with a keyword."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.bn = layer

    def forward(self, x: Tensor) -> Tensor:
        self.bn(input=x / 2)
        return self.bn(x)


class Tagged(Tensor):
    """A subclass of Tensor, for which bnext has no kernels."""


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.BatchNorm2d(3),
    "converted": lambda: bnext.convert(nn.BatchNorm2d(3, momentum=0.0)),
    "activated": lambda: bnext.BatchNormAct2d(3, momentum=None),
    "own": lambda: OwnNorm(3),
}


@pytest.mark.parametrize(
    ("kind", "dtype", "layout", "mean"),
    [
        ("torch", torch.float32, "contiguous", 0.0),
        ("torch", torch.float64, "channels_last", 1e4),
        ("converted", torch.float32, "channels_last", 1e4),
        ("converted", torch.bfloat16, "contiguous", 0.0),
        ("activated", torch.bfloat16, "channels_last", 100.0),
        ("own", torch.float32, "contiguous", 1e4),
    ],
)
@pytest.mark.parametrize("tagged", [False, True])
def test_statistics_of_all_values_of_all_calls(
    kind: str, dtype: torch.dtype, layout: str, mean: float, tagged: bool
) -> None:
    """The standard deviation is 1, and the mean rises from batch to batch."""
    data = [(to_layout(torch.randn(n, 3, 7, 5), layout) + mean + i).to(dtype) for i, n in enumerate(UNEVEN)]
    model = Twice(LAYERS[kind]()).to(torch.float64 if dtype == torch.float64 else torch.float32)
    state = copy.deepcopy(model.state_dict())
    if tagged:
        data = [x.as_subclass(Tagged) for x in data]
    assert bnext.update_bn([[x, "a label"] for x in data], model) is None
    buffers = dict(model.bn.named_buffers())
    values = [v for x in data for v in (x / 2, x)]
    mean_, var = population([v.as_subclass(Tensor) for v in values])
    count = values[0][:, 0].numel()
    kept = model.bn.running_mean.dtype
    # The statistics of one call are off by `statistics`, in standard deviations; merging adds roundings of float64.
    off = statistics(count, dtype) * var.sqrt() + 2.0**-48 * mean_.abs()
    assert_within(buffers["running_mean"], mean_, off + half_ulp(mean_, kept), "mean")
    off = 2 * statistics(count, dtype) * var + 2.0**-48 * mean_.abs() * var.sqrt()
    assert_within(buffers["running_var"], var, off + half_ulp(var, kept), "var")
    assert buffers["num_batches_tracked"] == 6
    for name in ("bn.weight", "bn.bias"):
        assert torch.equal(model.state_dict()[name], state[name])


def test_empty_batches_do_not_change_the_statistics() -> None:
    x = random_input(4, 3, 2, 2)
    for empty in (x[:0], x[:0].as_subclass(Tagged)):
        model = nn.Sequential(nn.BatchNorm2d(3)).double()
        bnext.update_bn([empty, x, empty], model)
        mean, var = population([x])
        assert_statistics(model, {"0": (mean, var, 3)})


def blocks() -> nn.Module:
    """A model with layers in evaluation, a frozen one, one with a user's hook, and statistics of earlier batches."""
    model = nn.Sequential(network(), nn.Conv2d(3, 4, 1), Basic(4)).double()
    model[0].eval()
    model[2].bn1.eval()
    bnext.freeze(model[2].bn2)
    model[2].bn1.register_forward_pre_hook(lambda _, args: (args[0] * 3 + 1,))
    for layer in (model[0][1], model[2].bn1, model[2].bn2):
        nn.init.normal_(layer.running_mean)
        layer.num_batches_tracked.fill_(7)
    return model


def settings(model: nn.Module) -> list[Any]:
    """What update_bn must leave as it was: each module's mode, momentum, hooks and repr."""
    return [
        (m.training, getattr(m, "momentum", None), list(m._forward_pre_hooks.values()), list(m._forward_hooks), repr(m))
        for m in model.modules()
    ]


WAYS: dict[str, Change] = {
    "torch": lambda m: m,
    "converted": bnext.convert,
    "fused": lambda m: bnext.convert(m, fuse=True),
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "part compiled": lambda m: m[2].compile(backend="eager") or m,
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_whole_models_are_as_before_but_for_their_statistics(
    way: str, called: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = blocks()
    wanted = expected(model, batches := [random_input(n, 3, 5, 4) for n in UNEVEN])
    assert wanted.keys() == {"0.1", "0.4", "2.bn1", "2.downsample.1"}
    run = WAYS[way](model)

    def call() -> int:
        """Call in training and in evaluation, which captures graphs; return how many activations are not fused."""
        state = copy.deepcopy(model.state_dict())
        modes = [(m, bnext.freezing.mode_of(m)) for m in model.modules()]
        left = count(run.train()(batches[0]))
        with torch.no_grad():
            for batch in batches:
                run(batch)
        model.load_state_dict(state)
        for module, mode in modes:
            bnext.freezing.set_mode(module, mode)
        return left

    left = call() if called else None
    before, graphs = settings(model), counters["stats"]["unique_graphs"]
    frozen = copy.deepcopy(model[2].bn2.state_dict())
    bnext.update_bn(iter(batches), run)
    assert_statistics(model, wanted)
    assert settings(model) == before
    assert all(torch.equal(a, b) for a, b in zip(frozen.values(), model[2].bn2.state_dict().values(), strict=True))
    assert bnext.unfreeze(model)[2].bn2.training
    if called:
        bnext.freeze(model[2].bn2)
        assert call() == left == (0 if way == "fused" else 3)
        assert counters["stats"]["unique_graphs"] == graphs
    elif way == "fused":
        assert call() == 0
    assert not [record for record in caplog.records if record.name == "bnext"]


class Breaks(nn.Module):
    """A model that raises an error at the third batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        assert not torch.is_grad_enabled()
        if self.calls == 3:
            raise LookupError("in the model")
        return x


def breaking(batches: list[Tensor]) -> Iterator[Tensor]:
    yield from batches
    raise LookupError("in the loader")


@pytest.mark.parametrize("where", ["model", "loader", "layer"])
def test_an_exception_leaves_everything_as_it_was(where: str) -> None:
    model = blocks()
    run = nn.Sequential(model, Breaks()) if where == "model" else model
    batches = [random_input(n, 3, 5, 4) for n in UNEVEN]
    if where == "layer":
        batches[2] = batches[2][:1, :, :1, :1]  # one value a channel
    before, state = settings(run), copy.deepcopy(run.state_dict())
    with pytest.raises((LookupError, ValueError), match="more than 1 value" if where == "layer" else f"in the {where}"):
        bnext.update_bn(breaking(batches), run)
    assert settings(run) == before
    assert all(torch.equal(value, state[name]) for name, value in run.state_dict().items())
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_the_compiler_is_back_after_overlapping_updates_of_two_threads() -> None:
    """The second update begins while the first runs, and ends later."""
    batches = [random_input(n, 3, 5, 4) for n in UNEVEN]
    models = [Basic(3).double() for _ in range(2)]
    wanted = [expected(model, batches) for model in models]
    with torch.no_grad():
        for model in models:
            model.compile(backend="eager")
            model(batches[0])  # captures a graph without the hooks of update_bn
    begun, over = [threading.Event() for _ in models], threading.Event()

    def first() -> Iterator[Tensor]:
        begun[0].set()
        assert begun[1].wait(30)
        yield from batches

    def second() -> Iterator[Tensor]:
        assert begun[0].wait(30)
        begun[1].set()
        yield batches[0]
        assert over.wait(30)
        yield from batches[1:]

    threads = [
        threading.Thread(target=bnext.update_bn, args=(loader(), model))
        for loader, model in zip((first, second), models, strict=True)
    ]
    for thread in threads:
        thread.start()
    threads[0].join(30)
    over.set()
    threads[1].join(30)
    for model, statistics_ in zip(models, wanted, strict=True):
        assert_statistics(model, statistics_)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_layers_that_no_batch_reaches_stay_and_are_listed(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    model.unused = nn.BatchNorm2d(3)
    model.unused.running_mean.fill_(5)
    model.forward = lambda x: model[1](model[0](x))
    with caplog.at_level(logging.WARNING, "bnext"):
        bnext.update_bn([make_input((2, 3, 4, 4))], model)
    (record,) = caplog.records
    assert record.getMessage() == "update_bn left 2 batch norm(s) as they were, which no batch reached: 4, unused"
    assert torch.equal(model.unused.running_mean, torch.full((3,), 5.0))
    assert (model[1].num_batches_tracked, model.unused.num_batches_tracked) == (1, 0)


def test_the_loader_is_not_read_where_no_layer_is_to_be_updated() -> None:
    untracked = nn.BatchNorm1d(3)
    untracked.track_running_stats = False
    for model in (nn.Linear(2, 2), bnext.freeze(network()), nn.BatchNorm1d(3, track_running_stats=False), untracked):
        assert bnext.update_bn(breaking([]), model.eval()) is None
        assert not any(m.training for m in model.modules())


def test_the_input_is_moved_to_the_device() -> None:
    class Elsewhere:
        def to(self, device: object) -> Tensor:
            assert device == "cpu"
            return x

    x = random_input(4, 3, 5, 4)
    model = network().double()
    wanted = expected(model, [x])
    bnext.update_bn([(Elsewhere(), 1)], model, "cpu")
    assert_statistics(model, wanted)


def test_bad_arguments_change_nothing() -> None:
    model = nn.Sequential(nn.Identity(), nn.LazyBatchNorm2d(), nn.BatchNorm2d(3)).eval()
    with pytest.raises(ValueError, match=r"these layers are lazy still: 1$"):
        bnext.update_bn([torch.randn(2, 3, 2, 2)], model)
    for arguments, wrong in (
        (([], [torch.ones(1)]), "model to be a torch.nn.Module, but got list"),
        ((3, model), "loader to be iterable, but got int"),
        (([], model, 1.5), "device to be a torch.device, but got float"),
    ):
        with pytest.raises(TypeError, match=wrong):
            bnext.update_bn(*arguments)
    assert not any(m.training for m in model.modules())


def all_ranks_together(world: World, *, shares: Sequence[Sequence[int]]) -> None:
    """Each rank passes its own batches, of the sizes `shares[rank]`, and gets the statistics of all ranks' batches."""
    model = network().double()
    batches = [[random_input(size, 3, 4, 3) for size in sizes] for sizes in shares]
    wanted = expected(model, [batch for share in batches for batch in share])
    parallel = DistributedDataParallel(model)
    for run in (model, parallel, torch.compile(parallel, backend="eager")):
        for layer in (model[1], model[4]):
            layer.reset_running_stats()
        with mock.patch.object(distributed, "all_gather", wraps=distributed.all_gather) as all_gather:
            bnext.update_bn(batches[world.rank], run)
        assert all_gather.call_count == 1, "one collective for all layers"
        assert_statistics(model, wanted)


@pytest.mark.parametrize("shares", [((4, 1, 3), (6,)), ((), (5, 2))])
def test_statistics_of_all_processes(pools: Callable[[int], Pool], shares: tuple[tuple[int, ...], ...]) -> None:
    pools(2).run(all_ranks_together, seed=3, shares=shares)


def test_padding_is_left_out() -> None:
    layer, x = bnext.BatchNorm1d(3), make_input((4, 3, 6))
    lengths = torch.tensor([6, 2, 0, 3])
    model = nn.Sequential(layer)
    model.forward = lambda x: layer(x, lengths=lengths)
    bnext.update_bn([x], model)
    values = x.transpose(1, 2)[torch.arange(6) < lengths[:, None]].double()
    assert torch.allclose(layer.running_mean.double(), values.mean(0), rtol=1e-6)
    assert torch.allclose(layer.running_var.double(), values.var(0), rtol=1e-6)
