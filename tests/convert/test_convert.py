"""`bnext.convert` and `bnext.revert` change the forward of known layers and nothing else."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import make_grad, make_input
from tolerances import assert_within
from torch import Tensor, nn

import bnext

NAMES = [f"{prefix}BatchNorm{dim}d" for prefix in ("", "Lazy") for dim in (1, 2, 3)]

EACH_SYNC = pytest.mark.parametrize("sync", [False, True], ids=["alone", "synchronised"])


class BatchNormReLU(nn.BatchNorm2d):
    """A user's subclass, whose activation a replacement would lose."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class Positive(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.exp()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.bn = nn.BatchNorm2d(3)
        self.again = self.bn  # one layer under two names
        self.table = nn.ModuleDict({"one": nn.BatchNorm2d(3), "drop": nn.Dropout(0.0)})

    def forward(self, x: Tensor) -> Tensor:
        return self.table["one"](self.again(self.bn(self.conv(x)).relu()))


def network() -> nn.Module:
    return nn.Sequential(
        Block(), nn.ModuleList([nn.BatchNorm2d(3)])[0], nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5)
    )


def is_ours(layer: nn.Module) -> bool:
    """Whether a layer of two channels or more computes by bnext's operator."""
    shape = (2, layer.num_features, *(1,) * (int(type(layer).__name__[-2]) - 1), 3)
    with torch.enable_grad():
        output = copy.deepcopy(layer)(torch.randn(shape).to(layer.running_mean).requires_grad_())
    return output.grad_fn.name() == "BNextBatchNormBackward"


def batch_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("library", [nn, bnext], ids=["torch", "bnext"])
@pytest.mark.parametrize("name", NAMES)
def test_a_single_layer_there_and_back(name: str, library: Any) -> None:
    cls = getattr(library, name)
    module = cls() if "Lazy" in name else cls(4)
    state = dict(module.__dict__)
    assert bnext.convert(module) is module
    assert type(module) is cls
    assert "Lazy" in name or is_ours(module)
    assert {key: value for key, value in module.__dict__.items() if key in state} == state
    assert bnext.revert(module) is module
    assert type(module) is getattr(nn, name)
    assert module.__dict__ == state


@EACH_SYNC
def test_parameters_buffers_hooks_and_flags_are_kept(sync: bool) -> None:
    model = network()
    layer = model[0].bn
    layer.eval().requires_grad_(False)
    layer.weight.note = "kept"
    layer.custom = 17
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_state_dict_pre_hook(lambda *_: calls.append("state_dict"))

    def kept() -> list[object]:
        others = [type(m) for m in model.modules() if m not in batch_norms(model)]
        flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]
        tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
        return [[name for name, _ in model.named_modules()], others, flags, tensors, list(model.state_dict())]

    before = kept()
    theirs = [nn.BatchNorm2d] * 3 + [nn.BatchNorm1d]
    for convert, classes in (
        (lambda: bnext.convert(model, sync=sync), [bnext.SyncBatchNorm] * 4 if sync else theirs),
        (lambda: bnext.revert(model), theirs),
    ):
        assert convert() is model
        assert [type(m) for m in batch_norms(model)] == classes
        assert kept() == before
        assert model[0].again is model[0].bn is layer
        assert (layer.weight.note, layer.custom) == ("kept", 17)
        calls.clear()
        model(torch.randn(2, 3, 4, 4))
        assert calls == ["pre", "forward"] * 2
        model.state_dict()
        assert calls[4:] == ["state_dict"] * 2


@EACH_SYNC
def test_state_dicts_are_interchangeable(sync: bool) -> None:
    model = network()
    converted = bnext.convert(copy.deepcopy(model), sync=sync)
    converted(torch.randn(2, 3, 4, 4))
    for source, target in ((converted, model), (model, converted)):
        assert source.state_dict()._metadata == target.state_dict()._metadata
        target.load_state_dict(source.state_dict(), strict=True)
        for (key, a), b in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
        source(torch.randn(2, 3, 4, 4))
    if sync:  # and with torch's class of the same name
        nn.SyncBatchNorm(5).load_state_dict(bnext.SyncBatchNorm(5, act="relu").state_dict(), strict=True)


def test_unknown_classes_are_left_alone_and_listed_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        network(), nn.Sequential(BatchNormReLU(5), nn.SyncBatchNorm(5), BatchNormReLU(5)), BatchNormReLU(5)
    )
    with caplog.at_level(logging.DEBUG):
        bnext.convert(model)
    assert [type(m) for m in (model[1][0], model[1][1], model[1][2], model[2])] == [
        BatchNormReLU,
        bnext.SyncBatchNorm,
        BatchNormReLU,
        BatchNormReLU,
    ]
    assert is_ours(model[0][0].bn)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("bnext", logging.WARNING)
    for part in ("1.0", "1.2", "2", "BatchNormReLU"):
        assert part in record.getMessage()
    assert "0.0.bn" not in record.getMessage()


def test_converting_twice_changes_and_logs_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        model = bnext.convert(network())
        types = [type(m) for m in model.modules()]
        bnext.convert(model)
        assert [type(m) for m in model.modules()] == types
        bnext.revert(model)
    assert caplog.records == []


def test_verbose_prints_how_many_layers_are_ours(capsys: pytest.CaptureFixture[str]) -> None:
    bnext.convert(network(), verbose=True)
    assert capsys.readouterr().out == "4 batch norm(s) are bnext's\n"
    bnext.convert(network(), sync=True, verbose=True)
    assert capsys.readouterr().out == "4 batch norm(s) are bnext's\n4 batch norm(s) are synchronised\n"


def test_subclasses_of_our_layers_are_left_alone() -> None:
    class Mine(bnext.BatchNorm2d):
        pass

    model = nn.Sequential(Mine(3), bnext.BatchNorm2d(3))
    bnext.revert(model)
    assert [type(m) for m in model] == [Mine, nn.BatchNorm2d]


def test_a_parametrized_layer_is_left_alone() -> None:
    # torch gives such a layer a new class, whose properties compute the weight.
    layer = nn.BatchNorm2d(3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
    model = nn.Sequential(layer, nn.BatchNorm2d(3))
    x = make_input((4, 3, 2, 2))
    expected = copy.deepcopy(model)(x)
    bnext.convert(model)
    assert nn.utils.parametrize.is_parametrized(model[0], "weight")
    assert_within(model(x), expected.detach().double(), 1e-5 * expected.detach().abs().max().item(), "output")


def test_a_converted_layer_may_be_parametrized() -> None:
    layer = bnext.convert(nn.BatchNorm2d(3))
    plain = bnext.BatchNorm2d(3)
    plain.weight.data.fill_(torch.e)
    nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
    x = make_input((4, 3, 2, 2))
    layer(x).backward(make_grad((4, 3, 2, 2)))
    assert_within(layer(x), plain(x).detach().double(), 1e-5, "output")
    assert layer.parametrizations.weight.original.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [lambda: bnext.convert(nn.LazyBatchNorm2d()), bnext.LazyBatchNorm2d])
def test_lazy_layers_are_ours_when_they_are_initialised(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), make())
    model(torch.randn(2, 3, 4, 4))
    assert isinstance(model[1], nn.BatchNorm2d)
    assert is_ours(model[1])
    assert model[1].num_features == 4


def test_a_model_without_batch_norm_passes_through() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.GroupNorm(1, 2), nn.InstanceNorm1d(2))
    types = [type(m) for m in model.modules()]
    assert bnext.convert(model) is model
    assert [type(m) for m in model.modules()] == types


class FailsInTheMiddle(nn.Module):
    """Raises when its submodules are listed."""

    def named_modules(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Module]]:
        raise RuntimeError("no parts today")


@EACH_SYNC
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fuse"])
def test_nothing_is_changed_when_a_model_cannot_be_walked_through(fuse: bool, sync: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(2), FailsInTheMiddle(), nn.BatchNorm2d(2))
    entries = [set(vars(m)) for m in (model, *model)]
    with pytest.raises(RuntimeError, match="no parts today"):
        bnext.convert(model, fuse=fuse, sync=sync)
    assert [type(m) for m in model] == [nn.BatchNorm2d, FailsInTheMiddle, nn.BatchNorm2d]
    assert [set(vars(m)) for m in (model, *model)] == entries
