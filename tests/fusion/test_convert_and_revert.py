"""What convert(fuse=True) changes in a model, and that revert and reference counting remove all of it; and what the
report and the log say."""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any

import pytest
import torch
from networks import NETWORKS, Basic, conv, random_input
from observe import assert_fuses, assert_same_steps, count, fused_names, pair, sequential, small
from torch import nn

import bnext


def record(model: nn.Module) -> list[Any]:
    """All modules of a model, with their classes, attributes and submodules."""
    return [(m, type(m), dict(m.__dict__), dict(m._modules)) for m in model.modules()]


def same(a: list[Any], b: list[Any]) -> bool:
    """Whether two records are equal, and their attributes the same objects."""
    return len(a) == len(b) and all(
        (m, t, modules) == (n, u, others) and d.keys() == e.keys() and all(d[key] is e[key] for key in d)
        for (m, t, d, modules), (n, u, e, others) in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", ["resnet", "functional", "own norm", "branching", "mobile"])
def test_classes_names_and_tensors_are_kept(name: str) -> None:
    model = NETWORKS[name].make()
    plain = bnext.convert(copy.deepcopy(model))
    tensors = [id(t) for t in (*model.parameters(), *model.buffers())]
    names, hooks = [n for n, _ in model.named_modules()], [len(m._forward_hooks) for m in model.modules()]
    state, text = model.state_dict(), repr(plain)
    assert bnext.convert(model, fuse=True) is model
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == tensors
    assert [n for n, _ in model.named_modules()] == names
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert repr(model) == text
    assert list(model.state_dict()) == list(state)
    assert model.state_dict()._metadata == state._metadata
    inner = [m.__dict__.keys() for m in list(model.modules())[1:]]
    assert inner == [m.__dict__.keys() for m in list(plain.modules())[1:]], "fusing changed more than the model itself"


@pytest.mark.parametrize(
    ("name", "called"),
    [*((name, False) for name in NETWORKS), *((name, True) for name in ("resnet", "functional", "own norm"))],
)
def test_revert_leaves_nothing_behind(name: str, called: bool) -> None:
    model = NETWORKS[name].make().double()
    before = record(model)
    bnext.convert(model, fuse=True)
    if called:
        with torch.no_grad():
            model(random_input(*NETWORKS[name].shape))
    assert bnext.revert(model) is model
    assert same(record(model), before)
    with pytest.raises(ValueError, match="fuse=True"):
        bnext.fusion_report(model)


def test_reverted_and_converted_again() -> None:
    original, fused = pair()
    x = small()
    for _ in range(2):
        assert_fuses(original, fused, x)
        bnext.revert(fused)
        assert_fuses(original, fused, x, pairs=0)
        bnext.convert(fused, fuse=True)
    assert_same_steps(original, fused, x)


def test_converting_twice_changes_nothing_more() -> None:
    original, fused = pair()
    assert_same_steps(original, fused, small(), steps=1)
    before, report = record(fused), bnext.fusion_report(fused).fused
    for keywords in ({"fuse": True}, {}):
        bnext.convert(fused, **keywords)
        assert same(record(fused), before)
        assert bnext.fusion_report(fused).fused == report
    assert_fuses(original, fused, small())


def test_the_report_before_a_call_and_of_an_unconverted_model() -> None:
    fused = bnext.convert(sequential(), fuse=True)
    report = bnext.fusion_report(fused)
    assert report.fused == []
    assert [name for name, _ in report.left] == ["1"]
    for model in (sequential(), bnext.convert(sequential())):
        with pytest.raises(ValueError, match="fuse=True"):
            bnext.fusion_report(model)


def test_the_report_of_what_holds_a_fused_model() -> None:
    model = nn.Sequential(nn.Identity(), bnext.convert(sequential(nn.Flatten()), fuse=True))
    model(torch.randn(2, 3, 4, 4))
    assert bnext.fusion_report(model).fused == [("1.1", "batch norm -> relu")]


def test_what_was_fused_is_logged_or_printed(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 3, 4, 4)
    with caplog.at_level(logging.INFO, "bnext"):
        model = bnext.convert(sequential(nn.Flatten()), fuse=True)
        caplog.clear()
        model(x)
        model(x)
    (entry,) = [r for r in caplog.records if r.name == "bnext"]
    assert entry.levelno == logging.INFO
    assert capsys.readouterr().out == ""
    bnext.convert(sequential(nn.Flatten()), fuse=True, verbose=True)(x)
    printed = capsys.readouterr().out
    for text in (entry.getMessage(), printed, str(bnext.fusion_report(model))):
        assert "1: batch norm -> relu" in text


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("called", [False, True])
def test_a_model_a_copy_and_a_replica_are_freed_by_reference_count(called: bool) -> None:
    model = bnext.convert(nn.Sequential(sequential(), Basic(3), nn.Flatten()), fuse=True)
    if called:
        for training in (True, False):
            model.train(training)(torch.randn(2, 3, 4, 4)).sum().backward()
        with torch.no_grad():
            model(torch.randn(3, 3, 4, 4))
    found = [weakref.ref(held) for held in (*model.modules(), *model.parameters())]
    for twin in (copy.deepcopy(model), model._replicate_for_data_parallel()):
        if called:
            twin(torch.randn(2, 3, 4, 4))
        found.append(weakref.ref(twin))
        del twin
    assert [ref() for ref in found[-2:]] == [None, None]
    if called:
        bnext.revert(model)
    del model
    assert [ref() for ref in found if ref() is not None] == []


def test_fused_parts_in_a_fused_whole() -> None:
    original = nn.Sequential(sequential(), sequential(), conv(3, 1)).double()
    fused = copy.deepcopy(original)
    bnext.convert(fused[0], fuse=True)
    assert_same_steps(original, fused, small(), modes=("training",))
    assert_fuses(original, fused, small())
    bnext.convert(fused, fuse=True)
    assert_same_steps(original, fused, small())
    assert_fuses(original, fused, small(), pairs=2)
    assert set(fused_names(fused)) == {"0.1", "1.1"}
    bnext.revert(fused)
    assert count(fused(small())) == 2


def test_an_activated_layer_that_convert_did_not_make_stays() -> None:
    model = nn.Sequential(bnext.BatchNormAct2d(3, act="silu"), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())
    bnext.convert(model, fuse=True)
    model(torch.randn(2, 3, 4, 4))
    assert [type(m) for m in model[:3]] == [bnext.BatchNormAct2d, nn.BatchNorm2d, nn.ReLU]
    assert fused_names(model) == ["1"]
