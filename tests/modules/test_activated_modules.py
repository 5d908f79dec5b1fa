"""What BatchNormAct* have beside torch's layers: the activation, the residual."""

from __future__ import annotations

import pytest
import torch
from cases import ACTS, make_input, make_residual, name, same_bits
from marks import EVERY_ACT, FEW, FLAGS, pairs
from reference import Act
from test_modules import DIMS, EACH_DIM, SHAPES, WITHOUT_BIAS, assert_same_step, both, combined
from torch import nn

import bnext
from bnext.functional import batch_norm_act

WORDS = {act: name(act) for act in ACTS} | {"leaky_relu": "leaky_relu(0.01)", "elu": "elu(1.0)"}  # in a repr


@pairs(act=ACTS, dim=DIMS, has_residual=FLAGS)
def test_every_activation_behaves_as_torchs(act: Act, dim: int, has_residual: bool) -> None:
    ours, theirs = both(dim, act, dtype=torch.float64)
    for shape in SHAPES[dim]:
        assert_same_step(ours.train(), theirs.train(), shape, has_residual)
        assert_same_step(ours.eval(), theirs.eval(), shape, has_residual)


def fused(dim: int) -> type[nn.Module]:
    return getattr(bnext, f"BatchNormAct{dim}d")


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


@EACH_DIM
def test_arguments_by_position(dim: int) -> None:
    module = fused(dim)(5, 1e-3, 0.3, False, True, "silu", "meta", torch.bfloat16)
    assert repr(module) == expected_repr(dim, "silu", eps=1e-3, momentum=0.3, affine=False)
    assert (module.running_mean.dtype, module.running_mean.is_meta) == (torch.bfloat16, True)


@combined(WITHOUT_BIAS, act=ACTS, dim=DIMS)
def test_repr_is_torchs_with_the_activation(act: Act, dim: int, options: dict[str, object]) -> None:
    assert repr(fused(dim)(5, act=act, **options)) == expected_repr(dim, act, **options)
    assert repr(fused(dim)(5, act=None)) == repr(fused(dim)(5, act="identity"))


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


@pytest.mark.parametrize("act", WRONG_ACTS, ids=str)
def test_unknown_activation_is_refused(act: object) -> None:
    with pytest.raises(ValueError, match=LISTED):
        bnext.BatchNormAct2d(5, act=act)
    module = bnext.BatchNormAct2d(5, act="silu")
    with pytest.raises(ValueError, match=LISTED):
        module.act = act
    assert module.act == "silu"
    assert "act=silu" in repr(module)


def test_residual_is_a_keyword_too() -> None:
    module = bnext.BatchNormAct2d(5).eval()
    x, residual = make_input((3, 5, 4, 3)), make_residual((3, 5, 4, 3))
    assert same_bits(module(input=x, residual=residual), module(x, residual))
    assert same_bits(module(x, None), module(x))
    assert not torch.equal(module(x), module(x, residual))
