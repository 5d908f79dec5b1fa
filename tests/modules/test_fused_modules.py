"""BatchNormAct* against torch's layers with an addition and an activation behind them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from cases import ACTS, FEW_ACTS, make_grad, make_input, make_residual, name, same_bits
from reference import Act
from test_modules import (
    DIMS,
    MANIPULATIONS,
    OPTIONS,
    SHAPES,
    assert_same_results,
    assert_same_state,
    assert_same_step,
    option_name,
)
from torch import Tensor, nn

import bnext
from bnext.functional import batch_norm_act

# bnext's fused layers take the options that the contract names; torch's `bias` is none of them.
FUSED_OPTIONS = [{k: v for k, v in o.items() if k != "bias"} for o in OPTIONS if o.get("bias", True)]

TORCH_ACTS = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "leaky_relu": nn.LeakyReLU(),
    ("leaky_relu", -0.5): nn.LeakyReLU(-0.5),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
    "elu": nn.ELU(),
    ("elu", 0.5): nn.ELU(0.5),
}
WORDS = {act: name(act) for act in ACTS} | {"leaky_relu": "leaky_relu(0.01)", "elu": "elu(1.0)"}  # in a repr
EVERY_ACT = pytest.mark.parametrize("act", ACTS, ids=name)
FEW = pytest.mark.parametrize("act", FEW_ACTS, ids=name)
RESIDUAL = pytest.mark.parametrize("has_residual", [True, False], ids=["residual", "plain"])


def fused(dim: int) -> type[nn.Module]:
    return getattr(bnext, f"BatchNormAct{dim}d")


def model_of(dim: int, act: Act, **options: object) -> nn.Module:
    """torch's layer with an addition and one of torch's activations: the same state_dict, another forward."""
    base = getattr(nn, f"BatchNorm{dim}d")
    activation = TORCH_ACTS[act]

    class Model(base):
        def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
            y = super().forward(input)
            return activation(y if residual is None else y + residual)

    return Model(5, dtype=torch.float64, **options)


@DIMS
@RESIDUAL
@pytest.mark.parametrize("options", FUSED_OPTIONS, ids=option_name)
def test_every_constructor_option_behaves_as_in_torch(options: dict[str, object], has_residual: bool, dim: int) -> None:
    ours, theirs = fused(dim)(5, dtype=torch.float64, **options), model_of(dim, "relu", **options)
    assert isinstance(ours, getattr(bnext, f"BatchNorm{dim}d"))
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.copy_(q.normal_())
    for shape in SHAPES[dim]:
        for _ in range(2):
            assert_same_step(ours.train(), theirs.train(), shape, has_residual)
        assert_same_step(ours.eval(), theirs.eval(), shape, has_residual)


@DIMS
@RESIDUAL
@EVERY_ACT
def test_every_activation_behaves_as_torchs(act: Act, has_residual: bool, dim: int) -> None:
    ours, theirs = fused(dim)(5, act=act, dtype=torch.float64), model_of(dim, act)
    for shape in SHAPES[dim]:
        assert_same_step(ours.train(), theirs.train(), shape, has_residual)
        assert_same_step(ours.eval(), theirs.eval(), shape, has_residual)


@EVERY_ACT
def test_equal_to_a_sequential_step_by_step(act: Act) -> None:
    # Trained by the same optimiser, the two stay together; the state_dict of one is that of the other's first layer.
    ours, theirs = (
        bnext.BatchNormAct2d(5, act=act, dtype=torch.float64),
        nn.Sequential(nn.BatchNorm2d(5, dtype=torch.float64), copy.deepcopy(TORCH_ACTS[act])),
    )
    optimisers = [torch.optim.SGD(model.parameters(), 0.1, 0.9) for model in (ours, theirs)]
    for _ in range(5):
        assert_same_results(ours, theirs, (3, 5, 4, 3))
        for optimiser in optimisers:
            optimiser.step()
        assert_same_state(ours, theirs[0])
    theirs[0].load_state_dict(ours.state_dict(), strict=True)
    assert_same_results(ours.eval(), theirs.eval(), (3, 5, 4, 3))


@EVERY_ACT
def test_equal_to_the_functional_form(act: Act) -> None:
    module = bnext.BatchNormAct2d(5, eps=1e-3, momentum=0.3, act=act)
    mean, var = module.running_mean.clone(), module.running_var.clone()
    for training in (True, False):
        module.train(training)
        for residual in (None, make_residual((3, 5, 4, 3))):
            x = make_input((3, 5, 4, 3))
            expected = batch_norm_act(x, mean, var, module.weight, module.bias, residual, training, 0.3, 1e-3, act)
            assert same_bits(module(x, residual), expected)
            assert same_bits(module.running_mean, mean)
            assert same_bits(module.running_var, var)
    assert module.num_batches_tracked.item() == 2


def expected_repr(dim: int, act: Act, **options: object) -> str:
    theirs = repr(getattr(nn, f"BatchNorm{dim}d")(5, **options))
    return theirs.replace("BatchNorm", "BatchNormAct").replace(")", f", act={WORDS[act]})")


@DIMS
def test_arguments_by_position(dim: int) -> None:
    module = fused(dim)(5, 1e-3, 0.3, False, True, "silu", "cpu", torch.bfloat16)
    assert repr(module) == expected_repr(dim, "silu", eps=1e-3, momentum=0.3, affine=False)
    assert module.running_mean.dtype == torch.bfloat16
    assert fused(dim)(5, device="meta").weight.is_meta


@DIMS
@EVERY_ACT
def test_repr_is_torchs_with_the_activation(act: Act, dim: int) -> None:
    for options in FUSED_OPTIONS:
        assert repr(fused(dim)(5, act=act, **options)) == expected_repr(dim, act, **options)
    assert repr(fused(dim)(5, act=None)) == repr(fused(dim)(5, act="identity"))


@DIMS
def test_state_dict_is_torchs_and_loads_both_ways(dim: int) -> None:
    ours, theirs = fused(dim)(5, dtype=torch.float64), getattr(nn, f"BatchNorm{dim}d")(5, dtype=torch.float64)
    assert_same_state(ours, theirs)
    ours.weight.data.normal_()
    for _ in range(3):
        ours(make_input(SHAPES[dim][-1], dtype=torch.float64))
    result = theirs.load_state_dict(ours.state_dict(), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_state(ours, theirs)
    fresh = fused(dim)(5, act="gelu", dtype=torch.float64)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(fresh, theirs)
    assert fresh.act == "gelu"


@DIMS
@FEW
def test_pickle_and_deepcopy(act: Act, dim: int) -> None:
    module = fused(dim)(5, act=act)
    module(make_input(SHAPES[dim][-1]))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(buffer, weights_only=False)]
    x, residual = make_input(SHAPES[dim][-1]), make_residual(SHAPES[dim][-1])
    expected = module(x, residual)
    for twin in copies:
        assert (type(twin), twin.act, repr(twin)) == (type(module), act, repr(module))
        assert same_bits(twin(x, residual), expected)
        twin.act = "relu" if act != "relu" else "gelu"
    assert module.act == act


@FEW
def test_activation_may_be_set(act: Act) -> None:
    module, expected = bnext.BatchNormAct2d(5, act="silu"), bnext.BatchNormAct2d(5, act=act)
    module.act = act
    assert module.act == act
    assert repr(module) == repr(expected)
    x, residual = make_input((3, 5, 4, 3)), make_residual((3, 5, 4, 3))
    assert same_bits(module(x, residual), expected(x, residual))


LISTED = "identity, relu, relu6, leaky_relu, silu, gelu, hardswish, mish, elu"
WRONG_ACTS = ["swish", "ReLU", "", 5, True, 0.1, ("relu", 1), ("leaky_relu",), ("elu", float("nan")), nn.ReLU]


@DIMS
@pytest.mark.parametrize("act", WRONG_ACTS, ids=str)
def test_unknown_activation_is_refused(act: object, dim: int) -> None:
    with pytest.raises(ValueError, match=LISTED):
        fused(dim)(5, act=act)
    module = fused(dim)(5, act="silu")
    with pytest.raises(ValueError, match=LISTED):
        module.act = act
    assert module.act == "silu"
    assert "act=silu" in repr(module)


@pytest.mark.parametrize("change", MANIPULATIONS)
def test_attributes_may_change_after_construction(change: str) -> None:
    ours, theirs = bnext.BatchNormAct2d(5, dtype=torch.float64), model_of(2, "relu")
    assert_same_step(ours, theirs, (3, 5, 4, 3), has_residual=True)
    for module in (ours, theirs):
        MANIPULATIONS[change](module)
    assert_same_step(ours, theirs, (3, 5, 4, 3), has_residual=True)
    assert_same_step(ours.eval(), theirs.eval(), (3, 5, 4, 3), has_residual=True)


def test_residual_is_a_keyword_too() -> None:
    module = bnext.BatchNormAct2d(5).eval()
    x, residual = make_input((3, 5, 4, 3)), make_residual((3, 5, 4, 3))
    assert same_bits(module(input=x, residual=residual), module(x, residual))
    assert same_bits(module(x, None), module(x))
    assert not torch.equal(module(x), module(x, residual))


@DIMS
@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 6])
def test_wrong_rank_raises_as_in_torch(rank: int, dim: int) -> None:
    shape = (4, 5, 2, 2, 2, 2)[:rank]
    ours, theirs = fused(dim)(5), getattr(nn, f"BatchNorm{dim}d")(5)
    outcomes = []
    for module in (ours, theirs):
        try:
            outcomes.append(module(torch.ones(shape)).shape)
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert ours.num_batches_tracked.item() == (outcomes[0] == shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_modules_and_float32_parameters_agree(dtype: torch.dtype) -> None:
    # The weight (1) and bias (0) are exact in either: the same arithmetic, the same bits.
    x, residual, g = (make((3, 5, 4, 3), dtype=dtype) for make in (make_input, make_residual, make_grad))
    results = []
    for module in (bnext.BatchNormAct2d(5), bnext.BatchNormAct2d(5).to(dtype)):
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        y = module(*leaves)
        y.backward(g)
        assert module.weight.grad.dtype == module.weight.dtype
        results.append((y, *(leaf.grad for leaf in leaves)))
    assert all(map(same_bits, *results))
    assert results[0][0].dtype == dtype


def test_autocast_gives_the_dtype_of_the_input() -> None:
    module = bnext.BatchNormAct2d(5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, residual = make_input((3, 5, 4, 3), dtype=dtype), make_residual((3, 5, 4, 3), dtype=dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x, residual)
        assert y.dtype == dtype
        assert same_bits(bnext.BatchNormAct2d(5)(x, residual), y)
