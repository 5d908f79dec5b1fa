"""convert(model, fuse=True, recompute=True): whole models, their copies, and what else is done with them."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import recompute_jobs
import torch
from cases import make_input, same_bits, seed
from networks import IMAGE, NETWORKS, run
from processes import Pool
from recomputing import Recomputed, gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import bnext


def count_recomputed(model: nn.Module, image: Tensor) -> int:
    """How many outputs the backward of a step recomputes."""
    y = model(image)
    with Recomputed() as recomputed:
        gradients(y, model.parameters())
    return len(recomputed.storages)


def assert_same_bits(actual: object, expected: object) -> None:
    actual, expected = ([t for t in tree_leaves(each) if isinstance(t, Tensor)] for each in (actual, expected))
    assert len(actual) == len(expected) > 0
    assert all(map(same_bits, actual, expected))


@pytest.mark.parametrize(("network", "count"), [("resnet", 7), ("mobile", 2), ("functional", 2)])
def test_networks_give_the_same_bits_and_recompute_in_training(network: str, count: int) -> None:
    make, _, shape = NETWORKS[network]
    original, x = make(), make_input(shape)
    fused, recomputing = (bnext.convert(copy.deepcopy(original), fuse=True, recompute=flag) for flag in (False, True))
    for training in (True, False):
        expected = run(fused, (x,), training)
        assert_same_bits(run(recomputing, (x,), training), expected)
    assert count_recomputed(recomputing.train(), x) == count


def make_model(recompute: bool = True) -> nn.Module:
    """A model with one output that is recomputed, if `recompute` is set."""
    seed(9)
    layers = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 1)
    return bnext.convert(nn.Sequential(*layers), fuse=True, recompute=recompute)


@pytest.fixture
def model() -> nn.Module:
    return make_model()


@pytest.fixture
def image() -> Tensor:
    return make_input(IMAGE)


def step(model: nn.Module, image: Tensor) -> list[Tensor]:
    y = model(image)
    return [y, *gradients(y, model.parameters()), *model.buffers()]


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_recompute(kind: str, model: nn.Module, image: Tensor) -> None:
    assert count_recomputed(COPIES[kind](model), image) == 1


def test_recompute_is_switched_on_and_off(model: nn.Module, image: Tensor) -> None:
    for count, change in (
        (1, lambda: model),
        (0, lambda: bnext.convert(model, fuse=True)),
        (1, lambda: bnext.convert(model, fuse=True, recompute=True)),
        (0, lambda: bnext.revert(model)),
    ):
        change()
        assert count_recomputed(model, image) == count


def test_a_model_that_raises_leaves_the_scope(model: nn.Module, image: Tensor) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        model(image[:, :1])
    other = nn.Sequential(bnext.BatchNorm2d(3), nn.Conv2d(3, 3, 1))
    assert count_recomputed(other, image) == 0


def checkpointed(model: nn.Module, image: Tensor) -> list[Tensor]:
    """The results with a checkpoint around the model, and with one inside."""
    around = gradients(checkpoint(model, image, use_reentrant=False), model.parameters())
    model[1].forward = functools.partial(checkpoint, model[1].forward, use_reentrant=False)
    return [*around, *step(model, image)]


def with_compiled_autograd(model: nn.Module, image: Tensor) -> list[Tensor]:
    loss = model(image).square().sum()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda: loss.backward(), backend="eager")()
    return [p.grad for p in model.parameters()]


def sharded(model: nn.Module, image: Tensor) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (1,))
    for part in (model[0], model[1], model):
        fully_shard(part, mesh=mesh)
    y = model(image)
    y.square().sum().backward()
    return [y, *(p.grad.full_tensor() for p in model.parameters())]


@pytest.mark.usefixtures("group", "fresh_compiler")
@pytest.mark.parametrize("use", [checkpointed, with_compiled_autograd, sharded], ids=lambda use: use.__name__)
def test_other_uses_give_the_same_bits(use: Callable[[nn.Module, Tensor], list[Tensor]], image: Tensor) -> None:
    assert_same_bits(use(make_model(), image), use(make_model(recompute=False), image))


@pytest.mark.usefixtures("fresh_compiler")
def test_recompute_changes_nothing_under_torch_compile(image: Tensor) -> None:
    def run(model: nn.Module) -> list[Tensor]:
        torch._dynamo.reset()
        return step(torch.compile(model, backend="aot_eager", fullgraph=True), image)

    expected = run(make_model(recompute=False))
    assert_same_bits(run(make_model()), expected)
    with bnext.recompute():
        assert_same_bits(run(make_model()), expected)


def test_recompute_changes_nothing_in_transforms_traces_and_exports(model: nn.Module, image: Tensor) -> None:
    values = {name: p.detach() for name, p in model.named_parameters()}

    def loss(each: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda values: torch.func.functional_call(each, values, (image,)).square().sum()

    def results(each: nn.Module) -> list[object]:
        return [
            torch.func.grad(loss(each))(values),
            torch.func.vmap(each)(torch.stack([image, image])),
            torch.func.jvp(each, (image,), (image,)),
            torch.jit.trace(each, image)(image),
            torch.export.export(each, (image,)).module()(image),
            torch.fx.symbolic_trace(each)(image),
        ]

    model.eval()
    assert_same_bits(results(model), results(make_model(recompute=False).eval()))


def test_transforms_raise_inside_the_scope(image: Tensor) -> None:
    with bnext.recompute(), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: bnext.BatchNorm2d(3)(x).sum())(image)


def test_data_parallel_with_synchronised_layers(pools: Callable[[int], Pool]) -> None:
    pools(2).run(recompute_jobs.data_parallel)
