"""torch.func: vmap, grad, linearize, jacrev, jacfwd and hessian, each against elementary operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from cases import Parameters, make_input, make_parameters, make_residual
from checks import call
from marks import FLAGS, MODES, PLAIN_OR_ACT, each, pairs
from reference import Act
from tolerances import assert_within
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, linearize, stack_module_state, vmap

import bnext

SHAPE = (3, 4, 3, 2)

Optional = Tensor | None
Run = Callable[..., Tensor]
Transform = Callable[..., Run]


@pytest.fixture
def stats() -> Parameters:
    return make_parameters(4, torch.float64)


def pair(stats: Parameters, training: bool, act: Act = None) -> tuple[Run, Run]:
    """bnext's operator and the composite, as functions of (input, weight, bias, residual); in training without running
    statistics."""
    mean, var = (None, None) if training else (stats.running_mean, stats.running_var)

    def ours(x: Tensor, weight: Optional = None, bias: Optional = None, residual: Optional = None) -> Tensor:
        return call(x, Parameters(weight, bias, mean, var), weight, bias, training, residual=residual, act=act)

    def theirs(x: Tensor, weight: Optional = None, bias: Optional = None, residual: Optional = None) -> Tensor:
        return reference.composite(x, mean, var, weight, bias, training, residual=residual, act=act)

    return ours, theirs


def arguments(stats: Parameters, has_residual: bool, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, ...]:
    residual = (make_residual(shape, dtype=torch.float64),) if has_residual else ()
    return (make_input(shape, dtype=torch.float64), stats.weight, stats.bias, *residual)


def assert_equal(actual: object, expected: object) -> None:
    """Trees of float64 tensors are equal to 1e3 roundings of the largest element: sums have under a hundred terms."""
    got, want = (torch.utils._pytree.tree_leaves(tree) for tree in (actual, expected))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float64
        assert_within(a, b.detach(), 2.0**-53 * 1e3 * (1 + b.detach().abs().max()), "result")


def scalar(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A scalar function with derivatives of every order."""
    return lambda *inputs: run(*inputs).sin().sum()


def batch(size: int) -> Tensor:
    """Inputs along a new first dimension."""
    return torch.stack([make_input(SHAPE, dtype=torch.float64) for _ in range(size)])


IN_DIMS = (
    (0, None, None, None),
    (0, 0, 0, None),
    (None, 0, None, None),
    (None, None, 0, None),
    (0, None, 0, None),
    (0, None, None, 0),
    (None, None, None, 0),
    (0, 0, 0, 0),
    (1, None, 0, -1),
    (2, None, None, 1),
    (-1, None, None, None),
)


@pairs(in_dims=IN_DIMS, act=PLAIN_OR_ACT, training=FLAGS)
def test_vmap_over_any_argument(in_dims: tuple[int | None, ...], act: Act, training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training, act)
    has_residual = act is not None or in_dims[3] is not None
    many = (batch(5), torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), batch(5))
    args = [
        one if dim is None else several.movedim(0, dim)
        for several, one, dim in zip(many, arguments(stats, has_residual), in_dims, strict=False)
    ]
    dims = in_dims[: len(args)]
    out = dims[0] or 0
    assert_equal(vmap(ours, dims, out)(*args), vmap(theirs, dims, out)(*args))


@pairs(shape=((4, 3), (4, 3, 5), (2, 3, 3, 2), (2, 3, 2, 2, 2)), act=PLAIN_OR_ACT, training=FLAGS)
def test_vmap_over_every_rank(shape: tuple[int, ...], act: Act, training: bool) -> None:
    ours, theirs = pair(make_parameters(3, torch.float64), training, act)
    xs, residuals = torch.randn(2, 6, *shape, dtype=torch.float64)
    for in_dims in ((0, None, None, 0), (0, None, None, None)):
        residual = None if act is None else residuals if in_dims[3] == 0 else residuals[0]
        args, dims = (xs, None, None, residual), (*in_dims[:3], None if residual is None else in_dims[3])
        assert_equal(vmap(ours, dims)(*args), vmap(theirs, dims)(*args))


@MODES
@each(act=PLAIN_OR_ACT)
def test_vmap_within_vmap(act: Act, training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training, act)
    xs, residuals = torch.randn(2, 3, *SHAPE, dtype=torch.float64), torch.randn(3, *SHAPE, dtype=torch.float64)
    weights = torch.randn(3, 4, dtype=torch.float64)

    def nest(run: Run) -> Run:
        inner = lambda x, weight, residual: run(x, weight, None, None if act is None else residual)  # noqa: E731
        return vmap(vmap(inner, (0, 0, 0)), (0, None, None))

    assert_equal(nest(ours)(xs, weights, residuals), nest(theirs)(xs, weights, residuals))


@each(act=PLAIN_OR_ACT)
def test_vmap_over_the_running_stats_in_eval(act: Act) -> None:
    many = [make_parameters(4, torch.float64) for _ in range(5)]
    means, variances = torch.stack([p.running_mean for p in many]), torch.stack([p.running_var for p in many])
    x = make_input(SHAPE, dtype=torch.float64)
    residual = None if act is None else make_residual(SHAPE, dtype=torch.float64)

    def ours(mean: Tensor, var: Tensor) -> Tensor:
        return call(x, Parameters(mean, var, mean, var), None, None, False, residual=residual, act=act)

    def theirs(mean: Tensor, var: Tensor) -> Tensor:
        return reference.composite(x, mean, var, residual=residual, act=act)

    for in_dims in ((0, 0), (0, None), (None, 0)):
        args = (means if in_dims[0] == 0 else means[0], variances if in_dims[1] == 0 else variances[0])
        assert_equal(vmap(ours, in_dims)(*args), vmap(theirs, in_dims)(*args))


@pytest.mark.parametrize("momentum", [0.3, None])
@each(act=(None, "relu", "silu"))
def test_vmap_over_stacked_models_trains_each(momentum: float | None, act: Act) -> None:
    # Model ensembles: parameters, running statistics and counters all carry the batch dimension.
    layer, options = (bnext.BatchNorm2d, {}) if act is None else (bnext.BatchNormAct2d, {"act": act})
    models = [layer(4, momentum=momentum, dtype=torch.float64, **options) for _ in range(5)]
    inputs = (batch(5),) if act is None else (batch(5), batch(5))
    for i, (model, x) in enumerate(zip(models, inputs[0], strict=True)):
        for _ in range(i):  # so that counters differ
            model(x + i)
    params, buffers = stack_module_state(models)
    run = lambda p, b, *inputs: functional_call(models[0], (p, b), inputs)  # noqa: E731
    with torch.no_grad():
        outputs = vmap(run)(params, buffers, *inputs)
        expected = [model(*one) for model, *one in zip(models, *inputs, strict=True)]
    assert_equal(outputs, torch.stack(expected))
    for name in ("running_mean", "running_var"):
        assert_equal(buffers[name], torch.stack([getattr(model, name) for model in models]))
    assert buffers["num_batches_tracked"].tolist() == [1, 2, 3, 4, 5]


@each(act=(None, "relu"))
def test_vmap_refuses_to_update_shared_running_stats(act: Act, stats: Parameters) -> None:
    # It is undefined which of the batches they should hold; torch refuses as well.
    kept = stats.clone()
    with pytest.raises((RuntimeError, ValueError)):
        vmap(lambda x: call(x, stats, None, None, True, residual=x if act else None, act=act))(batch(5))
    assert torch.equal(stats.running_mean, kept.running_mean)
    assert torch.equal(stats.running_var, kept.running_var)


@each(act=PLAIN_OR_ACT)
def test_empty_batch_under_vmap(act: Act, stats: Parameters) -> None:
    ours, _ = pair(stats, False, act)
    for shape in ((5, 0, 4, 3), (0, *SHAPE)):
        x = torch.empty(shape, dtype=torch.float64)
        assert vmap(lambda x: ours(x, None, None, x if act else None))(x).shape == shape


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")  # torch.func.linearize's own
@pairs(act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_linearize(act: Act, training: bool, has_residual: bool, stats: Parameters) -> None:
    args = arguments(stats, has_residual)
    tangents = tuple(torch.randn_like(a) for a in args)
    results = [(out, push(*tangents)) for out, push in (linearize(run, *args) for run in pair(stats, training, act))]
    assert_equal(*results)


@pairs(transform=(jacrev, jacfwd), act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_jacobian(transform: Transform, act: Act, training: bool, has_residual: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training, act)
    args = arguments(stats, has_residual)
    for argnums in (tuple(range(len(args))), *range(len(args))):
        assert_equal(transform(ours, argnums)(*args), transform(theirs, argnums)(*args))


def twice(outer: Transform, inner: Transform) -> Transform:
    def transform(f: Run, argnums: object) -> Run:
        return outer(inner(f, argnums), argnums)

    transform.__name__ = f"{outer.__name__}_{inner.__name__}"
    return transform


@pairs(
    transform=(grad, hessian, twice(jacrev, jacrev), twice(jacrev, jacfwd), twice(jacfwd, jacfwd)),
    act=PLAIN_OR_ACT,
    training=FLAGS,
    has_residual=FLAGS,
)
def test_derivatives_of_a_scalar(transform: Transform, act: Act, training: bool, has_residual: bool) -> None:
    p = make_parameters(2, torch.float64)
    ours, theirs = pair(p, training, act)
    args = arguments(p, has_residual, (3, 2, 2))
    argnums = tuple(range(len(args)))
    assert_equal(transform(scalar(ours), argnums)(*args), transform(scalar(theirs), argnums)(*args))


@pairs(act=PLAIN_OR_ACT, training=FLAGS, has_residual=FLAGS)
def test_vmap_of_grad(act: Act, training: bool, has_residual: bool, stats: Parameters) -> None:
    # Per-sample gradients, as differential privacy takes them.
    xs, weight, bias, *residual = (batch(5), *arguments(stats, has_residual)[1:])
    args = (xs, weight, bias, *(batch(5) for _ in residual))
    in_dims, argnums = (0, None, None, *(0 for _ in residual)), tuple(range(len(args)))
    results = [vmap(grad(scalar(run), argnums), in_dims)(*args) for run in pair(stats, training, act)]
    assert_equal(*results)
