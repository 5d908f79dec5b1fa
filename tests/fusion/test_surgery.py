"""What people do to a model afterwards: layers replaced, deleted, sliced off, wrapped, folded, parametrised, shared,
frozen. It computes what the unconverted model would, and goes on being fused where there is a pair."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from networks import Basic, assert_close, conv
from observe import assert_fuses, assert_same_steps, count, pair, sequential, small
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.utils import fusion, parametrizations, parametrize
from torch.utils import mkldnn

import bnext


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs() + 0.5


class Wrapper(nn.Module):
    """Say, a profiler's."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object) -> object:
        return self.inner(*args)


def net() -> nn.Module:
    return nn.Sequential(*sequential(), *sequential(), conv(3, 1))


def put(index: int, make: Callable[[], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        torch.manual_seed(5)
        model[index] = make().double()
        return model

    return change


def replaced(old: type[nn.Module], new: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        for name, child in model.named_children():
            if isinstance(child, old):
                setattr(model, name, new(child))
            else:
                change(child)
        return model.double()

    return change


def deleted(model: nn.Module) -> nn.Module:
    del model[2]
    return model


def inserted(model: nn.Module) -> nn.Module:
    model.insert(2, nn.Tanh())
    return model


def appended(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    model.extend([nn.BatchNorm2d(3).double(), nn.ReLU()])
    return model


def shared(model: nn.Module) -> nn.Module:
    model[4] = model[1]
    return model


def tied(model: nn.Module) -> nn.Module:
    model[4].weight = model[1].weight
    return model


def parametrized(model: nn.Module) -> nn.Module:
    parametrize.register_parametrization(model[1], "weight", Positive())
    return model


def parametrized_and_removed(model: nn.Module) -> nn.Module:
    parametrize.remove_parametrizations(parametrized(model)[1], "weight")
    return model


def spectral(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    parametrizations.spectral_norm(model[0])
    return model


def own_forward(model: nn.Module) -> nn.Module:
    model[2].forward = lambda x: x * 2
    return model


def frozen(model: nn.Module) -> nn.Module:
    model[1].requires_grad_(False).running_mean.add_(0.5)
    return model


def other_slope(model: nn.Module) -> nn.Module:
    model[2] = nn.LeakyReLU(0.3)
    model(torch.ones(2, 3, 2, 2, dtype=torch.float64))
    model[2].negative_slope = 0.7
    return model


def other_settings(model: nn.Module) -> nn.Module:
    model[1].eps, model[1].momentum = 0.5, 0.3
    return model


def without_statistics(model: nn.Module) -> nn.Module:
    model[1].running_mean = model[1].running_var = None
    return model


def new_parameters(model: nn.Module) -> nn.Module:
    model[1].weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    model[1].running_var = torch.tensor([4.0, 5.0, 6.0], dtype=torch.float64)
    return model


CHANGES: dict[str, tuple[Callable[[nn.Module], nn.Module], int | None]] = {
    "activation to LeakyReLU": (put(2, lambda: nn.LeakyReLU(0.3)), 2),
    "activation to SiLU": (put(2, nn.SiLU), 2),
    "activation to Identity": (put(2, nn.Identity), 1),
    "activation to Tanh": (put(2, nn.Tanh), 1),
    "all activations": (replaced(nn.ReLU, lambda m: nn.LeakyReLU(0.3)), 2),
    "norm to a new one": (put(1, lambda: nn.BatchNorm2d(3, eps=0.1)), 2),
    "norm to Identity": (put(1, nn.Identity), 1),
    "norms to GroupNorm": (replaced(nn.BatchNorm2d, lambda m: nn.GroupNorm(1, 3)), 0),
    "activation deleted": (deleted, 1),
    "something inserted": (inserted, 1),
    "something appended": (appended, 3),
    "a layer shared": (shared, 2),
    "a parameter shared": (tied, 2),
    "parametrised": (parametrized, None),
    "parametrised, and no more": (parametrized_and_removed, 2),
    "spectral norm": (spectral, 2),
    "a forward of its own": (own_forward, 1),
    "frozen": (frozen, 2),
    "another slope": (other_slope, None),
    "other settings": (other_settings, 2),
    "without statistics": (without_statistics, 2),
    "new parameters": (new_parameters, 2),
    "norm wrapped": (lambda m: put(1, lambda: Wrapper(m[1]))(m), 2),
    "activation wrapped": (lambda m: put(2, lambda: Wrapper(m[2]))(m), 2),
    "norm compiled": (lambda m: put(1, lambda: torch.compile(m[1], backend="eager"))(m), None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_after_the_first_call_is_seen(change: str) -> None:
    how, pairs = CHANGES[change]
    original, fused = pair(net)
    x = small()
    assert_same_steps(original, fused, x, modes=("training",), steps=1)
    original, fused = how(original), how(fused)
    assert_same_steps(original, fused, x, modes=("training",), steps=1)
    if pairs is not None:
        assert_fuses(original.train(), fused.train(), x, pairs=pairs)


@pytest.mark.parametrize("change", ["norm wrapped", "parametrised"])
@pytest.mark.parametrize("again", [bnext.revert, lambda m: bnext.convert(m, fuse=True)], ids=["revert", "convert"])
def test_then_revert_or_convert_again(again: Callable[[nn.Module], nn.Module], change: str) -> None:
    how, _ = CHANGES[change]
    original, fused = pair(net)
    assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    original, fused = how(original), how(fused)
    assert_same_steps(original, fused, small(), steps=1)
    again(fused)
    assert_same_steps(original, fused, small(), steps=1)


def test_slices_and_parts_are_plain() -> None:
    original, fused = pair(net)
    x = small()
    assert_same_steps(original, fused, x, steps=1)
    for take in (
        lambda m: m[:2],
        lambda m: m[:3],
        lambda m: nn.Sequential(*list(m.children())[:-1]),
        lambda m: nn.Sequential(*m, *m),
        lambda m: m[1],
        lambda m: m[:3].forward,
    ):
        assert_close(take(fused)(x), take(original)(x), "output")
    assert_fuses(original, fused, x, pairs=2)
    part = nn.Sequential(*list(fused.children())[:3])
    assert count(part(x)) == 1, "a part is not fused until it is converted itself"
    bnext.convert(part, fuse=True)
    assert count(part(x)) == 0


def test_a_submodule_called_by_itself_and_the_whole_in_turn() -> None:
    original, fused = pair(lambda: nn.Sequential(conv(3), Basic(3), nn.Flatten()))
    for _ in range(2):
        assert_same_steps(original, fused, small(), modes=("training",))
        assert_same_steps(original[1], fused[1], small(), modes=("training",))
        assert_same_steps(original[1].bn1, fused[1].bn1, small(), modes=("training",))


def test_a_fused_model_as_a_part_of_others() -> None:
    original, fused = pair(lambda: sequential(conv(3, 1)))
    x = small()
    for wrap in (lambda m: nn.Sequential(m, nn.Tanh()), Wrapper, lambda m: nn.Sequential(m, m)):
        assert_same_steps(wrap(original), wrap(fused), x, modes=("training",))
    outer = bnext.convert(nn.Sequential(fused, nn.BatchNorm2d(3), nn.ReLU(), conv(3, 1)).double(), fuse=True)
    assert count(outer(x)) == 0
    assert count(fused(x)) == 0


def test_folding_a_convolution() -> None:
    original, fused = pair(net)
    x = small()
    assert_same_steps(original, fused, x)
    want = original.eval()(x)
    folded = copy.deepcopy(fused.eval())
    folded[0], folded[1] = fusion.fuse_conv_bn_eval(folded[0], folded[1]), nn.Identity()
    assert_close(folded(x), want, "output")
    assert count(folded(x.requires_grad_())) == 1
    assert_close(fused(x), want, "output")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no mkldnn")
def test_to_mkldnn() -> None:
    model = bnext.convert(net().eval(), fuse=True)
    x = torch.randn(2, 3, 8, 8)
    want = model(x).detach()
    dense = mkldnn.to_mkldnn(copy.deepcopy(model))
    torch.testing.assert_close(dense(x.to_mkldnn()).to_dense(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning")
@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("policy", [None, {nn.Conv2d}], ids=["whole", "layers"])
def test_fsdp(policy: set[type[nn.Module]] | None) -> None:
    original, fused = pair(net)
    x = small()
    assert_same_steps(original, fused, x, modes=("training",), steps=1)
    sharded = torch.distributed.fsdp.FullyShardedDataParallel(
        fused, auto_wrap_policy=policy and ModuleWrapPolicy(policy), device_id=torch.device("cpu"), use_orig_params=True
    )
    for _ in range(2):
        assert_close(sharded(x), original(x), "output")
        sharded(x).sum().backward()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("part", [None, 1], ids=["whole", "norm"])
def test_fully_shard_and_revert(part: int | None) -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    original, fused = pair(net)
    x = small()
    assert_same_steps(original, fused, x, modes=("training",), steps=1)
    fully_shard(fused if part is None else fused[part], mesh=mesh)
    assert_close(fused(x), original(x), "output")
    bnext.revert(fused)
    assert_close(fused(x), original(x), "output")


def test_a_slope_that_changes_from_call_to_call_is_left_and_right(caplog: pytest.LogCaptureFixture) -> None:
    original, fused = pair(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(0.1)))
    for slope in (0.1, 0.2, 0.3):
        original[1].negative_slope = fused[1].negative_slope = slope
        assert_same_steps(original, fused, small(), modes=("training",), steps=1)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
