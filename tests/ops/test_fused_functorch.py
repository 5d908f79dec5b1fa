"""torch.func over act(batch_norm(input) + residual): every transform, each against elementary ops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from cases import ACTS, FEW_ACTS, Parameters, make_input, make_parameters, make_residual, name
from reference import Act
from test_functorch import SHAPE, assert_equal, batch, scalar
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import bnext
from bnext.functional import batch_norm_act

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
RESIDUAL = pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "plain"])
EVERY_ACT = pytest.mark.parametrize("act", ACTS, ids=name)
FEW = pytest.mark.parametrize("act", FEW_ACTS, ids=name)

Run = Callable[..., Tensor]


@pytest.fixture
def stats() -> Parameters:
    return make_parameters(4, torch.float64)


def pair(stats: Parameters, training: bool, act: Act) -> tuple[Run, Run]:
    """The fused op and the composite, as functions of (input, weight, bias, residual); training is without stats."""
    mean, var = (None, None) if training else (stats.running_mean, stats.running_var)

    def ours(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return batch_norm_act(x, mean, var, weight, bias, residual, training, act=act)

    def theirs(
        x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        return reference.composite(x, mean, var, weight, bias, training, residual=residual, act=act)

    return ours, theirs


def arguments(stats: Parameters, has_residual: bool, shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, ...]:
    residual = (make_residual(shape, dtype=torch.float64),) if has_residual else ()
    return (make_input(shape, dtype=torch.float64), stats.weight, stats.bias, *residual)


@MODES
@FEW
@pytest.mark.parametrize(
    "in_dims",
    [
        (0, None, None, None),
        (0, None, None, 0),
        (None, None, None, 0),
        (None, 0, None, None),
        (0, 0, 0, 0),
        (1, None, 0, -1),
    ],
    ids=str,
)
def test_vmap_over_any_argument(in_dims: tuple[int | None, ...], act: Act, training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training, act)
    many = (batch(5), torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64), batch(5))
    args = [
        one if dim is None else several.movedim(0, dim)
        for several, one, dim in zip(many, arguments(stats, True), in_dims, strict=True)
    ]
    assert_equal(vmap(ours, in_dims)(*args), vmap(theirs, in_dims)(*args))


@MODES
@FEW
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (2, 3, 3, 2), (2, 3, 2, 2, 2)], ids=str)
def test_vmap_over_every_rank(shape: tuple[int, ...], act: Act, training: bool) -> None:
    ours, theirs = pair(make_parameters(3, torch.float64), training, act)
    xs, residuals = torch.randn(2, 6, *shape, dtype=torch.float64)
    for in_dims in ((0, None, None, 0), (0, None, None, None)):
        args = (xs, None, None, residuals if in_dims[3] == 0 else residuals[0])
        assert_equal(vmap(ours, in_dims)(*args), vmap(theirs, in_dims)(*args))


@MODES
@FEW
def test_vmap_within_vmap(act: Act, training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training, act)
    xs, residuals = torch.randn(2, 3, *SHAPE, dtype=torch.float64), torch.randn(3, *SHAPE, dtype=torch.float64)

    def nest(run: Run) -> Run:
        fused = lambda x, residual: run(x, None, None, residual)  # noqa: E731
        return vmap(vmap(fused, (0, 0)), (0, None))

    assert_equal(nest(ours)(xs, residuals), nest(theirs)(xs, residuals))


@MODES
@RESIDUAL
@FEW
def test_vmap_of_grad(act: Act, has_residual: bool, training: bool, stats: Parameters) -> None:
    # Per-sample gradients, as differential privacy takes them.
    xs, weight, bias, *residual = (batch(5), *arguments(stats, has_residual)[1:])
    args = (xs, weight, bias, *(batch(5) for _ in residual))
    in_dims, argnums = (0, None, None, *(0 for _ in residual)), tuple(range(len(args)))
    results = [vmap(grad(scalar(run), argnums), in_dims)(*args) for run in pair(stats, training, act)]
    assert_equal(*results)


@FEW
def test_vmap_over_the_running_stats_in_eval(act: Act) -> None:
    many = [make_parameters(4, torch.float64) for _ in range(5)]
    means, variances = torch.stack([p.running_mean for p in many]), torch.stack([p.running_var for p in many])
    x, residual = make_input(SHAPE, dtype=torch.float64), make_residual(SHAPE, dtype=torch.float64)
    ours = vmap(lambda mean, var: batch_norm_act(x, mean, var, residual=residual, act=act))
    theirs = vmap(lambda mean, var: reference.composite(x, mean, var, residual=residual, act=act))
    assert_equal(ours(means, variances), theirs(means, variances))


@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_vmap_over_stacked_models_trains_each(momentum: float | None, act: Act) -> None:
    models = [bnext.BatchNormAct2d(4, momentum=momentum, act=act, dtype=torch.float64) for _ in range(5)]
    xs, residuals = batch(5), batch(5)
    for i, (model, x) in enumerate(zip(models, xs, strict=True)):
        for _ in range(i):  # so that counters differ
            model(x + i)
    params, buffers = stack_module_state(models)
    call = lambda p, b, x, residual: functional_call(models[0], (p, b), (x, residual))  # noqa: E731
    with torch.no_grad():
        outputs = vmap(call)(params, buffers, xs, residuals)
        expected = [model(*pair) for model, *pair in zip(models, xs, residuals, strict=True)]
    assert_equal(outputs, torch.stack(expected))
    for key in ("running_mean", "running_var"):
        assert_equal(buffers[key], torch.stack([getattr(model, key) for model in models]))
    assert buffers["num_batches_tracked"].tolist() == [1, 2, 3, 4, 5]


def test_vmap_refuses_to_update_shared_running_stats(stats: Parameters) -> None:
    kept = stats.clone()
    with pytest.raises((RuntimeError, ValueError)):
        vmap(lambda x: batch_norm_act(x, stats.running_mean, stats.running_var, residual=x, training=True))(batch(5))
    assert torch.equal(stats.running_mean, kept.running_mean)
    assert torch.equal(stats.running_var, kept.running_var)


@FEW
def test_empty_batch_under_vmap(act: Act, stats: Parameters) -> None:
    ours, _ = pair(stats, False, act)
    for shape in ((5, 0, 4, 3), (0, *SHAPE)):
        x = torch.empty(shape, dtype=torch.float64)
        assert vmap(lambda x: ours(x, None, None, x))(x).shape == shape


@MODES
@RESIDUAL
@EVERY_ACT
def test_grad_and_grad_of_grad(act: Act, has_residual: bool, training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training, act)
    args = arguments(stats, has_residual)
    argnums = tuple(range(len(args)))
    assert_equal(grad(scalar(ours), argnums)(*args), grad(scalar(theirs), argnums)(*args))
    nested = [grad(lambda *a, g=g: g(*a).sin().sum())(*args) for g in (grad(scalar(ours)), grad(scalar(theirs)))]
    assert_equal(*nested)


@MODES
@RESIDUAL
@FEW
def test_vjp_and_jvp(act: Act, has_residual: bool, training: bool, stats: Parameters) -> None:
    ours, theirs = pair(stats, training, act)
    args = arguments(stats, has_residual)
    tangents = tuple(torch.randn_like(a) for a in args)
    g = torch.randn(SHAPE, dtype=torch.float64)
    assert_equal(jvp(ours, args, tangents), jvp(theirs, args, tangents))
    results = [(out, back(g)) for out, back in (vjp(run, *args) for run in (ours, theirs))]
    assert_equal(*results)


@MODES
@RESIDUAL
@FEW
@pytest.mark.parametrize("transform", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
def test_jacobian(
    transform: Callable[..., Callable[..., object]], act: Act, has_residual: bool, training: bool, stats: Parameters
) -> None:
    ours, theirs = pair(stats, training, act)
    args = arguments(stats, has_residual)
    argnums = tuple(range(len(args)))
    assert_equal(transform(ours, argnums)(*args), transform(theirs, argnums)(*args))
    assert_equal(transform(ours, argnums[-1])(*args), transform(theirs, argnums[-1])(*args))


@MODES
@RESIDUAL
@FEW
@pytest.mark.parametrize(
    "transform",
    [hessian, lambda f, a: jacrev(jacrev(f, a), a), lambda f, a: jacrev(jacfwd(f, a), a)],
    ids=["hessian", "reverse-over-reverse", "reverse-over-forward"],
)
def test_hessian(transform: Callable[..., Callable[..., object]], act: Act, has_residual: bool, training: bool) -> None:
    p = make_parameters(2, torch.float64)
    ours, theirs = pair(p, training, act)
    args = arguments(p, has_residual, (3, 2, 2))
    argnums = tuple(range(len(args)))
    assert_equal(transform(scalar(ours), argnums)(*args), transform(scalar(theirs), argnums)(*args))


class Block(torch.nn.Module):
    """The end of a residual block."""

    def __init__(self, act: Act) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = bnext.BatchNormAct2d(4, act=act)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x), x).mean((2, 3)))


@FEW
def test_per_sample_gradients_of_a_residual_block(act: Act) -> None:
    model = Block(act).double().eval()
    model.norm.running_mean.normal_()
    xs, targets = torch.randn(6, 4, 5, 5, dtype=torch.float64), torch.randint(2, (6,))
    params, buffers = {k: v.detach() for k, v in model.named_parameters()}, dict(model.named_buffers())

    def loss(params: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        logits = functional_call(model, (params, buffers), (x.unsqueeze(0),))
        return torch.nn.functional.cross_entropy(logits, target.unsqueeze(0))

    together = vmap(grad(loss), (None, 0, 0))(params, xs, targets)
    for i in range(6):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(xs[i : i + 1]), targets[i : i + 1]).backward()
        assert_equal({k: v[i] for k, v in together.items()}, {k: p.grad for k, p in model.named_parameters()})
