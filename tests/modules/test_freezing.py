"""A model with frozen batch norms trains as with layers in evaluation, and nothing but unfreeze ends that."""

from __future__ import annotations

import copy
import importlib
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fusion.real_models import why_not
from networks import NETWORKS, Basic, OwnNorm, assert_close, random_input, saved
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnext

Change = Callable[[nn.Module], nn.Module]


def network() -> nn.Module:
    """A model whose statistics are not those of its data."""
    model = nn.Sequential(NETWORKS["sides"].make(), Basic(4)).double()
    for layer in norms(model):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    return model


def norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


def modes(model: nn.Module) -> list[bool]:
    return [m.training for m in norms(model)]


def needs_grad(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()]


def in_evaluation_by_hand(model: nn.Module, affine: bool) -> None:
    for layer in norms(model.train()):
        layer.eval().requires_grad_(not affine)


def steps(model: nn.Module, before_each: Callable[[], object], data: list[Tensor]) -> list[Any]:
    """Train with each batch of `data` in turn; return the outputs, and the last gradients, parameters and buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for x in data:
        before_each()
        optimizer.zero_grad()
        outputs.append(model(x))
        outputs[-1].square().mean().backward()
        optimizer.step()
    grads = [torch.zeros(0) if p.grad is None else p.grad for p in model.parameters()]
    return [*outputs, *grads, *model.parameters(), *model.buffers()]


WAYS: dict[str, Callable[[nn.Module, bool], nn.Module]] = {
    "torch": bnext.freeze,
    "converted before": lambda m, affine: bnext.freeze(bnext.convert(m), affine),
    "converted after": lambda m, affine: bnext.convert(bnext.freeze(m, affine)),
    "reverted": lambda m, affine: bnext.revert(bnext.freeze(bnext.convert(m, fuse=True), affine)),
    "synchronised": lambda m, affine: bnext.convert(bnext.freeze(m, affine), sync=True),
    "fused before": lambda m, affine: bnext.freeze(bnext.convert(m, fuse=True), affine),
    "fused after": lambda m, affine: bnext.convert(bnext.freeze(m, affine), fuse=True),
    "called before": lambda m, affine: bnext.freeze(called(bnext.convert(m, fuse=True)), affine),
    "compiled": lambda m, affine: torch.compile(
        bnext.freeze(bnext.convert(m), affine), backend="aot_eager", fullgraph=True
    ),
}


def called(model: nn.Module) -> nn.Module:
    """Call the model in training, which captures a graph, and give it back with the state of before."""
    state = copy.deepcopy(model.state_dict())
    model(torch.randn(3, 3, 5, 4, dtype=torch.float64))
    model.load_state_dict(state)
    return model


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("way", WAYS)
def test_a_training_step_is_that_with_layers_in_evaluation(way: str) -> None:
    affine = way not in ("torch", "fused after")
    by_hand = network()
    frozen = copy.deepcopy(by_hand)
    expected = copy.deepcopy(list(by_hand.buffers()))
    run = WAYS[way](frozen, affine)
    data = [random_input(3, 3, 5, 4) for _ in range(2)]
    results = [
        steps(by_hand, lambda: in_evaluation_by_hand(by_hand, affine), data),
        steps(run, lambda: run.train(True), data),
    ]
    assert_close(results[1], results[0], way)
    assert all(torch.equal(a, b) for a, b in zip(frozen.buffers(), expected, strict=True))
    if way in ("fused before", "fused after", "called before"):
        report = bnext.fusion_report(frozen)
        assert {name for name, _ in report.fused} == {"0.left.1", "0.left.4", "1.bn1", "1.bn2"}, report


def layer_of_timm() -> nn.Module:
    if reason := why_not("timm"):
        pytest.skip(reason)
    return importlib.import_module("timm.layers").BatchNormAct2d(3, drop_layer=nn.Dropout)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm1d(3),
        lambda: nn.BatchNorm3d(3, affine=False),
        lambda: nn.SyncBatchNorm(3),
        lambda: bnext.BatchNorm2d(3, momentum=None),
        lambda: bnext.BatchNormAct2d(3),
        lambda: bnext.SyncBatchNorm(3, act="silu"),
        lambda: OwnNorm(3),
        nn.LazyBatchNorm2d,
        bnext.LazyBatchNorm1d,
        layer_of_timm,
    ],
)
@pytest.mark.parametrize("convert", [False, True])
def test_every_kind_of_layer_stays_frozen_and_is_given_back_whole(make: Callable[[], nn.Module], convert: bool) -> None:
    layer = make()
    model = nn.Sequential(nn.Identity(), layer)
    if convert and not isinstance(layer, OwnNorm):
        bnext.convert(model)
    before, state, kind = dict(layer.__dict__), list(layer.state_dict()), type(layer)
    assert bnext.freeze(model) is model
    assert repr(layer).partition("\n")[0].rstrip(")").endswith("frozen") or ", frozen\n" in repr(layer)
    shape = {"1d": (4, 3), "3d": (4, 3, 1, 2, 2)}.get(kind.__name__[-2:], (4, 3, 2, 2))
    x = 3 * torch.randn(shape) + 1
    for change in (model.train, lambda: model.train(True), model.eval, layer.train):
        change()
        assert not layer.training
        y = model(x)
    assert_close(layer.running_mean, torch.zeros(3), "running_mean")
    assert_close(layer.running_var, torch.ones(3), "running_var")
    assert layer.num_batches_tracked == 0
    assert list(layer.state_dict()) == state
    assert not y.requires_grad
    bnext.unfreeze(model)
    assert "frozen" not in repr(layer)
    if type(layer) is kind:  # a lazy layer has become one of another class
        assert layer.__dict__.keys() == before.keys()
        assert all(layer.__dict__[key] is value for key, value in before.items())
    assert layer.training
    model(x)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("convert", [False, True])
def test_unfreezing_gives_back_modes_and_gradients(convert: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[2].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[3].eval()
    if convert:
        bnext.convert(model)
    before, flags = needs_grad(model), modes(model)
    bnext.unfreeze(model)
    assert (needs_grad(model), modes(model)) == (before, flags) == ([True, False, *[True] * 5], [True, True, False])
    for _ in range(2):
        bnext.freeze(model[0])
        bnext.freeze(model)
        assert modes(model) == [False] * 3
        assert needs_grad(model) == [False, False, True, True, False, False, False]
    bnext.unfreeze(model)
    bnext.unfreeze(model)
    assert (needs_grad(model), modes(model)) == (before, flags)
    # Unfreezing gives a layer the mode that its parent was last put into.
    for first, then in ((model.train, model.eval), (model.eval, model.train)):
        first()
        bnext.freeze(model, affine=False)
        assert needs_grad(model) == before
        then()
        bnext.freeze(model)
        assert modes(bnext.unfreeze(model)) == [then == model.train] * 3
        assert needs_grad(model) == before


def replica(module: nn.Module) -> nn.Module:
    """A copy as nn.DataParallel makes one for each device."""
    twin = module._replicate_for_data_parallel()
    twin._parameters = dict(module._parameters)
    twin._modules = {name: replica(m) for name, m in module._modules.items()}
    return twin


COPIES: dict[str, Change] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(copy.deepcopy(m))),
    "torch.save": saved,
    "replica": replica,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("convert", [False, True])
def test_copies_are_frozen_by_themselves(convert: bool, way: str) -> None:
    model = bnext.freeze(bnext.convert(network()) if convert else network())
    twin = COPIES[way](model).train()
    assert repr(twin) == repr(model)
    assert modes(twin) == modes(model) == [False] * 5
    x = random_input(3, 3, 5, 4)
    assert_close(twin(x), model(x), "output")
    assert modes(bnext.revert(twin).train()) == [False] * 5
    assert modes(bnext.unfreeze(twin)) == [True] * 5
    assert modes(model.train()) == [False] * 5
    layer = COPIES[way](norms(model)[0]).train()  # during the call only its method refers to the copy
    assert not layer.training


def test_a_copy_that_shares_the_methods_can_be_frozen_itself() -> None:
    layer = bnext.freeze(nn.BatchNorm2d(3))
    twin = bnext.freeze(copy.copy(layer))
    assert twin.eval() is twin
    assert bnext.unfreeze(layer).training
    assert not bnext.unfreeze(twin).training


def test_bad_arguments_freeze_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)))
    before = [dict(m.__dict__) for m in model.modules()]
    for change, wrong in ((bnext.freeze, "a model"), (bnext.unfreeze, nn.BatchNorm2d)):
        with pytest.raises(TypeError, match=r"model to be a torch\.nn\.Module, but got"):
            change(wrong)
    with pytest.raises(TypeError, match="affine to be a bool, but got int"):
        bnext.freeze(model, affine=1)
    with pytest.raises(ValueError, match=r"running statistics .* have none: 1\.0$"):
        bnext.freeze(model)
    with pytest.raises(ValueError, match=r"have none: \(the module itself\)"):
        bnext.freeze(model[1][0])
    assert [dict(m.__dict__) for m in model.modules()] == before
    model[1][0] = nn.BatchNorm2d(3)
    model[1][0].train = lambda mode=True: None
    with pytest.raises(ValueError, match=r"no train or extra_repr .* have one: 1\.0$"):
        bnext.freeze(model)
    assert (modes(model), needs_grad(model)) == ([True] * 2, [True] * 4)
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        bnext.freeze(model[0]).train("yes")
