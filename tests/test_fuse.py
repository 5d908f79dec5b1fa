"""`bnext.convert(model, fuse=True)` on whole networks: they compute, copy, save, compile and revert as before."""

from __future__ import annotations

import collections
import copy
import io
import logging
import pickle
from collections.abc import Callable

import networks
import pytest
import torch
from networks import NETWORKS, Basic, Network, assert_close, assert_same, conv, fuse, pair, random_input
from torch import nn

import bnext

EACH = pytest.mark.parametrize("network", NETWORKS.values(), ids=list(NETWORKS))


def types(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules()]


@EACH
def test_networks_compute_the_same(network: Network) -> None:
    original, fused, report = pair(network.make)
    done: dict[str, list[str]] = {}
    for name, what in report.fused:
        done.setdefault(name, []).append(what)
    assert {name: ", ".join(what) for name, what in done.items()} == network.fused
    assert sum(isinstance(m, bnext.modules._BatchNormAct) for m in fused.modules()) == sum(
        1 for name in network.fused if name != "(the module itself)"
    )
    assert_same(original, fused, random_input(*network.shape))


@EACH
def test_names_parameters_and_classes_are_kept(network: Network) -> None:
    original = network.make()
    model = original
    tensors = {id(t) for t in (*model.parameters(), *model.buffers())}
    names, cls = [name for name, _ in model.named_modules()], type(model)
    bnext.convert(model, fuse=True)
    assert model is original
    assert isinstance(model, cls)
    assert (type(model).__name__, type(model).__module__) == (cls.__name__, cls.__module__)
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == tensors
    assert [name for name, _ in model.named_modules()] == names


@EACH
def test_state_dicts_are_interchangeable(network: Network) -> None:
    original, fused, _ = pair(network.make)
    x = random_input(*network.shape)
    fused(x)
    assert list(original.state_dict()) == list(fused.state_dict())
    assert original.state_dict()._metadata == fused.state_dict()._metadata
    original.load_state_dict(fused.state_dict(), strict=True)
    assert_same(original, fused, x)
    fused.load_state_dict(original.state_dict(), strict=True)
    assert_same(original, fused, x)


@EACH
def test_revert_gives_the_original_back(network: Network) -> None:
    model = network.make()
    modules, before = list(model.modules()), types(model)
    attributes = [{**m.__dict__, "_modules": dict(m._modules)} for m in modules]
    bnext.revert(bnext.convert(model, fuse=True))
    assert all(m is n for m, n in zip(model.modules(), modules, strict=True))
    assert types(model) == before
    for m, expected in zip(modules, attributes, strict=True):
        assert {**m.__dict__, "_modules": dict(m._modules)} == expected


@EACH
def test_converting_twice_changes_nothing_more(network: Network) -> None:
    original, fused, report = pair(network.make)
    before = types(fused)
    again = fuse(fused)
    assert types(fused) == before
    assert again == report
    bnext.convert(fused)
    assert types(fused) == before
    assert_same(original, fused, random_input(*network.shape))


@EACH
def test_copies_and_pickles_compute_the_same(network: Network) -> None:
    original, fused, _ = pair(network.make)
    x = random_input(*network.shape)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)):
        assert types(twin) == types(fused)
        reference = copy.deepcopy(original)
        assert_same(reference, twin, x)
        assert_same(reference, bnext.revert(twin), x)


def test_a_saved_model_loads_in_another_process(
    tmp_path: object, run_python: Callable[..., object], request: pytest.FixtureRequest
) -> None:
    model = nn.Sequential(networks.ResNet(), nn.Linear(5, 2)).double()
    bnext.convert(model, fuse=True)
    x = random_input()
    torch.save({"model": model, "x": x, "y": model.eval()(x)}, f"{tmp_path}/saved.pt")
    code = (
        f"import sys; sys.path.insert(0, {str(request.path.parent)!r}); import torch, bnext\n"
        f"saved = torch.load({f'{tmp_path}/saved.pt'!r}, weights_only=False)\n"
        "model = saved['model']\n"
        "assert isinstance(model[0].layer1[0].bn2, bnext.BatchNormAct2d)\n"
        "print((model(saved['x']) - saved['y']).abs().max().item())"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == 0.0


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("make", [networks.Sides, networks.Functional, networks.TwoNorms])
def test_a_fused_model_compiles_without_a_graph_break(make: Callable[[], nn.Module]) -> None:
    original, fused, _ = pair(make)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = random_input()
    for training in (True, False):
        assert_close(compiled.train(training)(x), original.train(training)(x), "output")
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")


def test_a_generated_forward_takes_its_arguments_by_name() -> None:
    original, fused, _ = pair(networks.Functional)
    x = random_input()
    assert_close(fused(input=x), original(input=x), "output")


def test_making_another_of_a_fused_modules_class_makes_an_original() -> None:
    _, fused, _ = pair(Basic)
    another = type(fused)(downsample=False)
    assert type(another) is Basic
    assert another.downsample is None


def test_a_layer_put_in_the_place_of_a_fused_one_is_noticed() -> None:
    _, fused, _ = pair(Basic)
    for name in ("bn1", "bn2"):
        model = copy.deepcopy(fused)
        setattr(model, name, nn.BatchNorm2d(4, dtype=torch.float64))
        with pytest.raises((RuntimeError, TypeError)):
            model(random_input(2, 4, 3, 3))


def test_a_sequential_is_still_indexed_and_sliced() -> None:
    activation = nn.SiLU()
    model = nn.Sequential(collections.OrderedDict(conv=conv(3), bn=nn.BatchNorm2d(3), act=activation, end=nn.ReLU()))
    original = copy.deepcopy(model.double())
    fuse(model)
    assert [name for name, _ in model.named_children()] == ["conv", "bn", "act", "end"]
    assert model[1].act == "silu"
    assert model[2].activation is activation
    x = random_input()
    assert_close(model[:3](x), original[:3](x), "output")
    assert "SiLU" in repr(model)


def test_an_activation_follows_the_mode_while_it_is_replaced() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    bnext.convert(model, fuse=True).eval()
    bnext.revert(model)
    assert [m.training for m in model.modules()] == [False] * 3


def test_the_report_is_printed_on_demand(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        bnext.convert(networks.Branching(), fuse=True)
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("bnext", logging.INFO)
    assert capsys.readouterr().out == ""
    bnext.convert(networks.Branching(), fuse=True, verbose=True)
    printed = capsys.readouterr().out
    for text in (record.getMessage(), printed):
        assert "body.1: bn -> leaky_relu(0.1)" in text
        assert "control flow" in text


def test_layers_that_a_user_made_are_known_and_stay(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(bnext.BatchNormAct2d(3, act="silu"), nn.BatchNorm2d(3), nn.ReLU())
    with caplog.at_level(logging.WARNING):
        bnext.convert(model, fuse=True)
    assert caplog.records == []
    assert [type(m) for m in model[:2]] == [bnext.BatchNormAct2d] * 2
    bnext.revert(model)
    assert [type(m) for m in model] == [bnext.BatchNormAct2d, nn.BatchNorm2d, nn.ReLU]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "0" in record.getMessage()
