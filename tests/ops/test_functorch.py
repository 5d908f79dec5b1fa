"""The contract's torch.func row: vmap, grad, jvp, vjp, jacrev, jacfwd and hessian, each against elementary ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from cases import Parameters, make_input, make_parameters
from tolerances import assert_within
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap

import bnext
from bnext.functional import batch_norm

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
SHAPE = (3, 4, 3, 2)


@pytest.fixture
def stats() -> Parameters:
    return make_parameters(4, torch.float64)


def pair(stats: Parameters, training: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """bnext's batch norm and the composite, as functions of (input, weight, bias); training is without stats."""
    mean, var = (None, None) if training else (stats.running_mean, stats.running_var)

    def ours(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return batch_norm(x, mean, var, weight, bias, training)

    def theirs(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return reference.composite(x, mean, var, weight, bias, training)

    return ours, theirs


def assert_equal(actual: object, expected: object) -> None:
    """Trees of float64 tensors: equal to 1e3 roundings of the largest element (sums of under a hundred terms)."""
    got, want = (torch.utils._pytree.tree_leaves(tree) for tree in (actual, expected))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float64
        assert_within(a, b.detach(), 2.0**-53 * 1e3 * (1 + b.detach().abs().max()), "result")


def scalar(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar function with derivatives of every order."""
    return lambda *inputs: run(*inputs).sin().sum()


def batch(*shape: int) -> Tensor:
    return torch.stack([make_input(SHAPE, dtype=torch.float64) for _ in range(shape[0])])


def test_vmap_over_the_input_in_eval(stats: Parameters) -> None:
    ours, theirs = pair(stats, False)
    xs = batch(5)
    assert_equal(
        vmap(ours, (0, None, None))(xs, stats.weight, stats.bias), vmap(theirs, (0, None, None))(xs, *stats[:2])
    )


@MODES
@pytest.mark.parametrize(
    "in_dims", [(0, None, None), (0, 0, 0), (None, 0, None), (None, None, 0), (0, None, 0)], ids=str
)
def test_vmap_over_any_argument(in_dims: tuple[int | None, ...], training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training)
    many = (batch(5), torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64))
    one = (make_input(SHAPE, dtype=torch.float64), stats.weight, stats.bias)
    args = [a if d is not None else b for a, b, d in zip(many, one, in_dims, strict=True)]
    assert_equal(vmap(ours, in_dims)(*args), vmap(theirs, in_dims)(*args))


@MODES
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 3, 2), (2, 3, 2, 2, 2)], ids=str)
def test_vmap_over_every_rank(shape: tuple[int, ...], training: bool) -> None:
    ours, theirs = pair(make_parameters(3, torch.float64), training)
    xs = torch.randn(6, *shape, dtype=torch.float64)
    assert_equal(vmap(ours)(xs), vmap(theirs)(xs))


@MODES
@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_vmap_over_any_dimension(dim: int, training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training)
    xs = batch(5).movedim(0, dim)
    assert_equal(vmap(ours, in_dims=dim, out_dims=dim)(xs), vmap(theirs, in_dims=dim, out_dims=dim)(xs))


@MODES
def test_vmap_within_vmap(training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training)
    xs = torch.randn(2, 3, *SHAPE, dtype=torch.float64)
    weights = torch.randn(3, 4, dtype=torch.float64)
    nest = lambda run: vmap(vmap(run, (0, 0)), (0, None))  # noqa: E731
    assert_equal(nest(ours)(xs, weights), nest(theirs)(xs, weights))


def test_vmap_over_the_running_stats_in_eval() -> None:
    many = [make_parameters(4, torch.float64) for _ in range(5)]
    means, variances = torch.stack([p.running_mean for p in many]), torch.stack([p.running_var for p in many])
    x = make_input(SHAPE, dtype=torch.float64)
    for in_dims in ((None, 0, 0), (None, 0, None), (None, None, 0)):
        args = (x, means if in_dims[1] == 0 else means[0], variances if in_dims[2] == 0 else variances[0])
        assert_equal(vmap(batch_norm, in_dims)(*args), vmap(reference.composite, in_dims)(*args))


@pytest.mark.parametrize("momentum", [0.3, None])
def test_vmap_over_stacked_models_trains_each(momentum: float | None) -> None:
    # Model ensembles: parameters, running statistics and counters all carry the batch dimension.
    models = [bnext.BatchNorm2d(4, momentum=momentum, dtype=torch.float64) for _ in range(5)]
    xs = batch(5)
    for i, (model, x) in enumerate(zip(models, xs, strict=True)):
        for _ in range(i):  # so that counters differ
            model(x + i)
    params, buffers = stack_module_state(models)
    call = lambda p, b, x: functional_call(models[0], (p, b), (x,))  # noqa: E731
    with torch.no_grad():
        outputs = vmap(call)(params, buffers, xs)
        expected = [model(x) for model, x in zip(models, xs, strict=True)]
    assert_equal(outputs, torch.stack(expected))
    for name in ("running_mean", "running_var"):
        assert_equal(buffers[name], torch.stack([getattr(model, name) for model in models]))
    assert buffers["num_batches_tracked"].tolist() == [1, 2, 3, 4, 5]


def test_vmap_refuses_to_update_shared_running_stats(stats: Parameters) -> None:
    # Which of the batches should they hold? torch refuses as well.
    kept = stats.clone()
    with pytest.raises((RuntimeError, ValueError)):
        vmap(lambda x: batch_norm(x, stats.running_mean, stats.running_var, training=True))(batch(5))
    assert torch.equal(stats.running_mean, kept.running_mean)
    assert torch.equal(stats.running_var, kept.running_var)


def test_empty_batch_under_vmap(stats: Parameters) -> None:
    ours, _ = pair(stats, False)
    assert vmap(ours)(torch.empty(5, 0, 4, 3, dtype=torch.float64)).shape == (5, 0, 4, 3)
    assert vmap(ours)(torch.empty(0, *SHAPE, dtype=torch.float64)).shape == (0, *SHAPE)


@MODES
def test_grad(training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training)
    args = (make_input(SHAPE, dtype=torch.float64), stats.weight, stats.bias)
    argnums = (0, 1, 2)
    assert_equal(grad(scalar(ours), argnums)(*args), grad(scalar(theirs), argnums)(*args))
    nested = [grad(lambda *a, g=g: g(*a).sin().sum())(*args) for g in (grad(scalar(ours)), grad(scalar(theirs)))]
    assert_equal(*nested)


@MODES
def test_vjp(training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training)
    args = (make_input(SHAPE, dtype=torch.float64), stats.weight, stats.bias)
    g = torch.randn(SHAPE, dtype=torch.float64)
    results = [(out, back(g)) for out, back in (vjp(run, *args) for run in (ours, theirs))]
    assert_equal(*results)


@MODES
def test_jvp(training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training)
    args = (make_input(SHAPE, dtype=torch.float64), stats.weight, stats.bias)
    tangents = tuple(torch.randn_like(a) for a in args)
    assert_equal(jvp(ours, args, tangents), jvp(theirs, args, tangents))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")  # torch.func.linearize's own
@MODES
def test_linearize(training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training)
    x, tangent = make_input(SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    results = [(out, push(tangent)) for out, push in (linearize(run, x) for run in (ours, theirs))]
    assert_equal(*results)


@MODES
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
@pytest.mark.parametrize("argnums", [0, 1, 2, (0, 1, 2)], ids=str)
def test_jacobian(
    transform: Callable[..., Callable[..., object]], argnums: int | tuple[int, ...], training: bool, stats: Parameters
) -> None:
    ours, theirs = pair(stats, training)
    args = (make_input(SHAPE, dtype=torch.float64), stats.weight, stats.bias)
    assert_equal(transform(ours, argnums)(*args), transform(theirs, argnums)(*args))


@MODES
@pytest.mark.parametrize(
    "transform",
    [
        hessian,
        lambda f, a: jacrev(jacrev(f, a), a),
        lambda f, a: jacrev(jacfwd(f, a), a),
        lambda f, a: jacfwd(jacfwd(f, a), a),
    ],
    ids=["hessian", "reverse-over-reverse", "reverse-over-forward", "forward-over-forward"],
)
def test_hessian(transform: Callable[..., Callable[..., object]], training: bool) -> None:
    ours, theirs = pair(make_parameters(2, torch.float64), training)
    p = make_parameters(2, torch.float64)
    args = (make_input((3, 2, 2), dtype=torch.float64), p.weight, p.bias)
    assert_equal(transform(scalar(ours), (0, 1, 2))(*args), transform(scalar(theirs), (0, 1, 2))(*args))


@MODES
def test_vmap_of_grad(training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training)
    xs = batch(5)
    in_dims = (0, None, None)
    results = [vmap(grad(scalar(run), (0, 1, 2)), in_dims)(xs, stats.weight, stats.bias) for run in (ours, theirs)]
    assert_equal(*results)


def build(batch_norm_2d: type[torch.nn.Module]) -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False),
        batch_norm_2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 2),
    ).double()


def test_per_sample_gradients() -> None:
    # The use of vmap(grad) that differential privacy makes, with frozen statistics.
    model = build(bnext.BatchNorm2d).eval()
    model[1].running_mean.normal_()
    xs, targets = torch.randn(6, 3, 6, 6, dtype=torch.float64), torch.randint(2, (6,))
    params = {k: v.detach() for k, v in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, (params, buffers), (x.unsqueeze(0),))
        return torch.nn.functional.cross_entropy(logits, target.unsqueeze(0))

    together = vmap(grad(loss), (None, 0, 0))(params, xs, targets)
    for i in range(6):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(xs[i : i + 1]), targets[i : i + 1]).backward()
        assert_equal({k: v[i] for k, v in together.items()}, {k: p.grad for k, p in model.named_parameters()})


def test_ensemble_of_modules() -> None:
    models = [build(bnext.BatchNorm2d).eval() for _ in range(3)]
    for model in models:
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    params, buffers = stack_module_state(models)
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    together = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)))(params, buffers)
    assert_equal(together, torch.stack([model(x) for model in models]))
