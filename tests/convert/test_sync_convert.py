"""`bnext.convert(sync=True)` and `bnext.revert`, in one process: which classes layers get, and what does not change."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import make_input, same_bits
from marks import MODES
from networks import NETWORKS, assert_same
from test_convert import BatchNormReLU, batch_norms, is_ours
from torch import Tensor, nn

import bnext

LAYERS = [
    (module, f"BatchNorm{kind}{dim}d") for module, kind in ((nn, ""), (bnext, ""), (bnext, "Act")) for dim in (1, 2, 3)
]
# The orders in which a model can be fused and synchronised.
ORDERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "at once": lambda model: bnext.convert(model, fuse=True, sync=True),
    "sync first": lambda model: bnext.convert(bnext.convert(model, sync=True), fuse=True),
    "fuse first": lambda model: bnext.convert(bnext.convert(model, fuse=True), sync=True),
    "twice": lambda model: bnext.convert(bnext.convert(model, fuse=True, sync=True), fuse=True, sync=True),
}
# Networks, and the orders in which each is fused and synchronised.
FUSED = [
    *(("two norms", order) for order in ORDERS),
    *((name, "at once") for name in ("sides", "shared, different", "own norm", "line")),
]


@pytest.mark.parametrize(("module", "name"), LAYERS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_a_single_layer_there_and_back(module: object, name: str) -> None:
    layer = getattr(module, name)(4, eps=1e-3, momentum=None)
    before = type(layer)
    state = dict(layer.__dict__)
    assert bnext.convert(layer, sync=True) is layer
    assert type(layer) is bnext.SyncBatchNorm
    assert isinstance(layer, nn.SyncBatchNorm)
    assert layer.process_group is None
    assert layer.act == ("relu" if "Act" in name else None)
    for key, value in state.items():
        assert layer.__dict__[key] is value, key
    bnext.revert(layer)
    assert type(layer) is (before if "Act" in name else getattr(nn, name))
    assert layer.__dict__ == state


def test_torchs_own_layer_there_and_back() -> None:
    group = object()
    layer = nn.SyncBatchNorm(4, process_group=group)
    for sync in (False, True):
        assert type(bnext.convert(layer, sync=sync, process_group=group)) is bnext.SyncBatchNorm
        assert layer.process_group is group
        assert type(bnext.revert(layer)) is nn.SyncBatchNorm
    bnext.convert(layer, sync=True)
    assert layer.process_group is None  # as given to convert


def test_the_group_goes_to_every_layer_and_is_kept() -> None:
    group, other = object(), object()
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.SyncBatchNorm(3))
    bnext.convert(model, sync=True, process_group=group)
    assert [m.process_group for m in batch_norms(model)] == [group] * 3
    bnext.convert(model, fuse=True)
    assert [type(m) for m in batch_norms(model)] == [bnext.SyncBatchNorm] * 3
    assert [m.process_group for m in batch_norms(model)] == [group] * 3
    bnext.convert(model, sync=True, process_group=other)
    assert [m.process_group for m in batch_norms(model)] == [other] * 3
    bnext.revert(model)
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.ReLU, nn.BatchNorm2d, nn.SyncBatchNorm]
    assert not any(hasattr(m, "process_group") for m in model[:3])


@pytest.mark.parametrize(("network", "order"), FUSED)
def test_fused_and_synchronised_in_any_order(network: str, order: str) -> None:
    # Without a process group, synchronised batch norm is plain batch norm.
    network = NETWORKS[network]
    original = network.make().double()
    converted = ORDERS[order](copy.deepcopy(original))
    assert list(converted.state_dict()) == list(original.state_dict())
    for (name, m), plain in zip(converted.named_modules(), original.modules(), strict=True):
        if type(plain) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            assert type(m) is bnext.SyncBatchNorm, name
    x = make_input(network.shape, dtype=torch.float64)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(converted)))
    assert_same(copy.deepcopy(original), converted, x)
    assert set(bnext.fusion_report(converted).fused) == network.fused
    assert [type(m) for m in twin.modules()] == [type(m) for m in converted.modules()]
    assert_same(copy.deepcopy(original), twin, x)
    bnext.revert(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in original.modules()]
    assert [sorted(m.__dict__) for m in twin.modules()] == [sorted(m.__dict__) for m in original.modules()]


def test_revert_lists_activated_layers_that_convert_did_not_make(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(bnext.SyncBatchNorm(3, act="relu"), bnext.SyncBatchNorm(3), bnext.BatchNormAct2d(3))
    bnext.convert(model, sync=True)
    with caplog.at_level(logging.WARNING):
        bnext.revert(model)
    assert [type(m) for m in model] == [bnext.SyncBatchNorm, nn.SyncBatchNorm, bnext.BatchNormAct2d]
    (record,) = caplog.records
    assert "2 batch norm(s) with activations" in record.getMessage()
    assert "0, 2" in record.getMessage()


def test_lazy_layers_are_left_and_listed(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.LazyBatchNorm2d(), nn.ModuleList([nn.LazyBatchNorm1d()])
    )
    with caplog.at_level(logging.WARNING):
        bnext.convert(model, sync=True)
    assert [type(m) for m in batch_norms(model)] == [bnext.SyncBatchNorm, nn.LazyBatchNorm2d, nn.LazyBatchNorm1d]
    (record,) = caplog.records
    assert record.name == "bnext"
    assert "2 batch norm(s) without sync" in record.getMessage()
    assert record.getMessage().endswith(": 2, 3.0")
    caplog.clear()
    model[:3](torch.randn(2, 3, 4, 4))
    assert type(model[2]) is nn.BatchNorm2d
    assert is_ours(model[2])
    bnext.convert(model[:3], sync=True)
    assert [type(m) for m in batch_norms(model[:3])] == [bnext.SyncBatchNorm] * 2
    assert caplog.records == []


def test_unknown_subclasses_are_left_and_listed(caplog: pytest.LogCaptureFixture) -> None:
    class Mine(bnext.SyncBatchNorm):
        pass

    class Theirs(nn.SyncBatchNorm):
        pass

    model = nn.Sequential(Mine(3), Theirs(3), BatchNormReLU(3), nn.SyncBatchNorm(3), nn.BatchNorm2d(3))
    types = [type(m) for m in model]
    with caplog.at_level(logging.WARNING):
        bnext.convert(model, sync=True)
    assert [type(m) for m in model] == [*types[:3], bnext.SyncBatchNorm, bnext.SyncBatchNorm]
    assert "left alone 3 batch norm(s) of other classes" in caplog.records[0].getMessage()
    bnext.revert(model)
    assert [type(m) for m in model] == types


@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_a_hooked_layer_is_synchronised_and_its_hook_called(fuse: bool) -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    bnext.convert(model, fuse=fuse, sync=True)
    model(make_input((4, 3, 2, 2)))
    assert type(model[0]) is bnext.SyncBatchNorm
    assert model[0].act is None  # a hook shall see the output of the layer alone
    assert seen[0].min() < 0


def test_convert_sync_batchnorm_of_our_class_makes_layers_of_our_class() -> None:
    group = object()
    model = nn.Sequential(nn.BatchNorm2d(3), bnext.BatchNormAct2d(3, act="silu"), nn.ReLU(), nn.SyncBatchNorm(3))
    parameters = list(map(id, model.parameters()))
    assert bnext.SyncBatchNorm.convert_sync_batchnorm(model, group) is model
    assert [type(m) for m in batch_norms(model)] == [bnext.SyncBatchNorm] * 3
    assert [m.process_group for m in batch_norms(model)] == [group] * 3
    assert [m.act for m in batch_norms(model)] == [None, "silu", None]
    assert list(map(id, model.parameters())) == parameters
    layer = nn.BatchNorm1d(3)
    assert bnext.SyncBatchNorm.convert_sync_batchnorm(layer) is layer
    assert type(layer) is bnext.SyncBatchNorm


def test_repr_is_that_of_torchs_layer_and_names_the_activation() -> None:
    theirs = nn.SyncBatchNorm(4, eps=1e-3, momentum=None, affine=False)
    assert repr(bnext.SyncBatchNorm(4, eps=1e-3, momentum=None, affine=False)) == repr(theirs)
    plain = repr(nn.SyncBatchNorm(4))
    assert repr(bnext.SyncBatchNorm(4, act="silu")) == plain[:-1] + ", act=silu)"
    assert repr(bnext.SyncBatchNorm(4, act="leaky_relu")) == plain[:-1] + ", act=leaky_relu(0.01))"
    assert repr(bnext.convert(nn.BatchNorm2d(4), sync=True)) == plain


def test_constructor_has_the_parameters_of_torchs() -> None:
    ours = bnext.SyncBatchNorm(4, 1e-3, None, True, False, None, "cpu", torch.float64)
    theirs = nn.SyncBatchNorm(4, 1e-3, None, True, False, None, "cpu", torch.float64)
    assert ours.__dict__.keys() - theirs.__dict__.keys() == {"_act", "_activation"}
    for key, value in ours.state_dict().items():
        assert same_bits(value, theirs.state_dict()[key])
    for name in ("eps", "momentum", "affine", "track_running_stats", "process_group", "num_features"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_act_may_be_set_and_is_checked() -> None:
    layer = bnext.SyncBatchNorm(3)
    x = make_input((4, 3, 2, 2))
    y = layer(x)
    layer.act = "relu"
    assert same_bits(layer(x), y.relu())
    with pytest.raises(ValueError, match="hardswish"):
        layer.act = "swish"
    with pytest.raises(ValueError, match="hardswish"):
        bnext.SyncBatchNorm(3, act="swish")
    assert layer.act == "relu"


@MODES
@pytest.mark.parametrize("shape", [(), (3,), (4, 0), (4, 0, 2, 2)], ids=str)
def test_errors_of_wrong_inputs_are_those_of_torch(shape: tuple[int, ...], training: bool) -> None:
    theirs, ours = (each(3).train(training) for each in (nn.SyncBatchNorm, bnext.SyncBatchNorm))
    with pytest.raises(ValueError, match=r"expected at least 2D input|number of input channels") as expected:
        theirs(torch.ones(shape))
    with pytest.raises(ValueError, match=r"expected at least 2D input|number of input channels") as caught:
        ours(torch.ones(shape))
    assert str(caught.value) == str(expected.value)
    assert ours.num_batches_tracked == 0


UNPICKLE = """
import pickle
from torch.nn.parallel import DistributedDataParallel

check = DistributedDataParallel._passing_sync_batchnorm_handle
pickle.loads(bytes.fromhex("{}"))
print(DistributedDataParallel._passing_sync_batchnorm_handle is check)
"""


def test_distributed_data_parallel_is_adapted_when_a_layer_is_unpickled(run_python: Callable[..., Any]) -> None:
    done = run_python("-c", UNPICKLE.format(pickle.dumps(bnext.SyncBatchNorm(4)).hex()))
    assert done.stdout.split() == ["False"], done.stderr
