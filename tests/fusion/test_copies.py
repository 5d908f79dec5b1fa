"""Copies, pickles, files, other processes and replicas of a fused model have their own parameters, and are fused."""

from __future__ import annotations

import copy
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, Basic, assert_close, conv, random_input, saved
from observe import assert_same_steps, count, counted_graphs, fused_names, pair, sequential, small
from torch import Tensor, fx, nn

import bnext

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved,
    "pickle of a deepcopy": lambda m: pickle.loads(pickle.dumps(copy.deepcopy(m))),
}


def change_tensors(model: nn.Module) -> None:
    """Changes all tensors, so that a copy that computes with those of the original differs."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.5)


@pytest.mark.parametrize(
    ("name", "way", "called"),
    [
        *(("sides", way, True) for way in WAYS),
        *(("sides", way, False) for way in ("deepcopy", "torch.save")),
        *((name, "deepcopy", True) for name in ("functional", "branching")),
        *((name, "torch.save", True) for name in ("own norm", "shared, different")),
    ],
)
def test_a_copy_has_its_own_parameters_and_fuses(name: str, way: str, called: bool) -> None:
    original, fused = pair(NETWORKS[name].make)
    x = random_input(*NETWORKS[name].shape)
    if called:
        assert_same_steps(original, fused, x, modes=("training",), steps=1)
    twin, reference = WAYS[way](fused), copy.deepcopy(original)
    assert [type(m) for m in twin.modules()] == [type(m) for m in fused.modules()]
    change_tensors(fused)
    assert_same_steps(reference, twin, x, steps=1)
    change_tensors(original)
    assert_same_steps(original, fused, x, modes=("training",), steps=1)
    assert set(bnext.fusion_report(twin).fused) == NETWORKS[name].fused
    assert count(twin.train()(x)) == count(fused.train()(x)) < count(reference.train()(x))
    bnext.revert(twin)
    assert all(type(m).__module__.startswith(("torch", "networks")) for m in twin.modules())
    assert not any(
        "bnext" in key or "bnext" in type(v).__module__ for m in twin.modules() for key, v in vars(m).items()
    )
    assert_same_steps(reference, twin, x, modes=("training",), steps=1)


def test_a_deep_copy_shares_the_graphs() -> None:
    fused = bnext.convert(sequential(nn.Flatten()), fuse=True)
    x = torch.randn(2, 3, 4, 4)
    fused(x)
    with counted_graphs() as graphs:
        twins = [copy.deepcopy(fused) for _ in range(3)]
        for twin in (*twins, copy.deepcopy(twins[0])):
            assert count(twin(x)) == 0
        assert graphs() == 0


def test_the_report_of_a_second_model_of_a_class_whose_graph_breaks() -> None:
    """Dynamo shares what follows a graph break among all models of a class."""
    for _ in range(2):
        original, fused = pair(NETWORKS["branching"].make)
        assert_same_steps(original, fused, small(), modes=("training",), steps=1)
        assert fused_names(fused) == ["bn", "body.1"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.scale = nn.BatchNorm2d(3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(x) * self.scale)


def test_a_shallow_copy_computes_with_its_own_attributes() -> None:
    original, fused = pair(Scaled)
    x = small()
    assert_same_steps(original, fused, x, modes=("training",), steps=1)
    twins = [copy.copy(model) for model in (original, fused)]
    for twin in twins:
        twin.scale = 3.0
    assert_same_steps(*twins, x, modes=("training",), steps=1)
    del fused
    assert_same_steps(*twins, x, modes=("training",), steps=1)
    bnext.convert(twins[1], fuse=True)
    assert_same_steps(*twins, x, modes=("training",), steps=1)


def replica(module: nn.Module) -> nn.Module:
    """A replica as nn.DataParallel makes it for each device, with plain tensors for parameters."""
    twin = module._replicate_for_data_parallel()
    twin._parameters = {k: None if p is None else p.detach() * 1.5 for k, p in module._parameters.items()}
    twin._modules = {k: replica(m) for k, m in module._modules.items()}
    return twin


@pytest.mark.parametrize("called", [False, True])
def test_a_replica_computes_with_its_own_parameters(called: bool) -> None:
    original, fused = pair(lambda: nn.Sequential(sequential(), Basic(3)))
    x = small()
    if called:
        assert_same_steps(original, fused, x, modes=("training",))
    output = replica(fused)(x)
    assert_close(output, replica(original)(x), "output")
    assert not torch.equal(fused(x), output)


class KeepsItsDict(Basic):
    """Has a __getstate__ of its own, as older code does."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


class CopiesAttributes(Basic):
    """Has a __deepcopy__ of its own, which does not pass on the memo."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CopiesAttributes:
        twin = CopiesAttributes.__new__(CopiesAttributes)
        for key, value in self.__dict__.items():
            twin.__dict__[key] = copy.deepcopy(value)
        return twin


class MakesAnother(nn.Module):
    """Has a __deepcopy__ of its own, which calls the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = sequential(conv(3, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    def __deepcopy__(self, memo: dict[int, Any]) -> MakesAnother:
        twin = MakesAnother()
        bnext.convert(twin)
        twin.load_state_dict(self.state_dict())
        return twin


COPY_THEMSELVES: dict[str, Callable[[], nn.Module]] = {
    "by __getstate__": lambda: KeepsItsDict(3),
    "by __deepcopy__ of attributes": lambda: CopiesAttributes(3),
    "by __deepcopy__ with a constructor": MakesAnother,
    "torch.fx.GraphModule": lambda: fx.symbolic_trace(sequential(conv(3, 1))),
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("name", COPY_THEMSELVES)
def test_classes_that_copy_themselves(name: str, called: bool) -> None:
    original, fused = COPY_THEMSELVES[name]().double(), COPY_THEMSELVES[name]().double()
    fused.load_state_dict(original.state_dict())
    bnext.convert(fused, fuse=True)
    x = small()
    if called:
        assert_same_steps(original, fused, x, modes=("training",))
    for way in ("deepcopy", "pickle"):
        twin, reference = WAYS[way](fused), copy.deepcopy(original)
        change_tensors(fused)
        change_tensors(original)
        assert_same_steps(reference, twin, x, modes=("training",))


def test_a_saved_model_loads_in_another_process(
    tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    model = nn.Sequential(*sequential(conv(3, 1))).double()
    bnext.convert(model, fuse=True)
    x = small()
    torch.save(
        {"model": model, "x": x, "y": model(x).detach(), "eval": model.eval()(x).detach()}, tmp_path / "saved.pt"
    )
    code = (
        f"import torch; saved = torch.load({str(tmp_path / 'saved.pt')!r}, weights_only=False)\n"
        "model, x = saved['model'], saved['x']\n"
        "print((model(x) - saved['eval']).abs().max().item(), (model.train()(x) - saved['y']).abs().max().item())\n"
        "import bnext; print(bnext.fusion_report(model).fused)\n"
    )
    result = run_python("-W", "error", "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["0.0 0.0", "[('1', 'batch norm -> relu')]"]
