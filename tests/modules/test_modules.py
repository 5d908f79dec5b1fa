"""The layers are compared with torch.nn's: constructor options, state_dict, repr, errors, lazy layers, copies, casts.

Where an `act` is None the layer is BatchNorm*, else BatchNormAct*, which is compared with torch's layer followed by an
addition and an activation.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import ACTS, TORCH_HAS_BIAS_OPTION, make_grad, make_input, make_residual, name, pairwise, same_bits
from marks import FEW, FLAGS, PLAIN_OR_ACT, each, label, pairs
from networks import saved
from reference import Act
from torch import Tensor, nn

import bnext

DIMS = (1, 2, 3)
SHAPES = {1: [(6, 5), (4, 5, 3)], 2: [(3, 5, 4, 3)], 3: [(2, 5, 2, 3, 4)]}
EACH_DIM = each(dim=DIMS)

OPTIONS = {
    "eps": (1e-5, 1e-3),
    "momentum": (0.1, None, 0.0, 1.0),
    "affine": FLAGS,
    "track_running_stats": FLAGS,
    # BatchNormAct* takes no `bias`.
    "bias": FLAGS if TORCH_HAS_BIAS_OPTION else (True,),
}
WITHOUT_BIAS = {key: values for key, values in OPTIONS.items() if key != "bias"}

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


def supported(options: dict[str, object]) -> dict[str, object]:
    """Those of the options that the installed torch takes."""
    return options if TORCH_HAS_BIAS_OPTION else {key: value for key, value in options.items() if key != "bias"}


def option_name(options: dict[str, object]) -> str:
    return "-".join(f"{key}={value}" for key, value in options.items() if value != OPTIONS[key][0]) or "default"


def combined(options: dict[str, tuple[object, ...]], **others: tuple[object, ...]) -> pytest.MarkDecorator:
    """Parametrises over `others` and over `options`, as a dict: every two values of two of all these meet."""
    table = [
        (*row[: len(others)], dict(zip(options, row[len(others) :], strict=True)))
        for row in pairwise(*others.values(), *options.values())
    ]
    ids = ["-".join([*map(label, others, row), option_name(row[-1])]) for row in table]
    return pytest.mark.parametrize((*others, "options"), table, ids=ids)


def activated(dim: int, act: Act, **options: object) -> nn.Module:
    """torch's layer with an addition and one of torch's activations: the same state_dict, another forward."""
    base = getattr(nn, f"BatchNorm{dim}d")
    activation = TORCH_ACTS[act]

    class Model(base):
        def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
            y = super().forward(input)
            return activation(y if residual is None else y + residual)

    return Model(5, **options)


def both(dim: int, act: Act = None, **options: object) -> tuple[nn.Module, nn.Module]:
    """bnext's layer of five channels, and what torch has in its place."""
    if act is None:
        return getattr(bnext, f"BatchNorm{dim}d")(5, **options), getattr(nn, f"BatchNorm{dim}d")(5, **options)
    return getattr(bnext, f"BatchNormAct{dim}d")(5, act=act, **options), activated(dim, act, **options)


def both_lazy(dim: int, **options: object) -> tuple[nn.Module, nn.Module]:
    ours, theirs = (getattr(namespace, f"LazyBatchNorm{dim}d")(**options) for namespace in (bnext, nn))
    return ours, theirs


# Float64: a thousand roundings, for sums of under a hundred terms.
CLOSE = {"rtol": 1e-13, "atol": 1e-13}


def assert_same_state(ours: nn.Module, theirs: nn.Module) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert list(a) == list(b)
    assert a._metadata == b._metadata
    torch.testing.assert_close(a, b, **CLOSE)


def assert_same_step(ours: nn.Module, theirs: nn.Module, shape: tuple[int, ...], has_residual: bool = False) -> None:
    """Compare outputs and gradients of one step of both in their present modes, and the state that it leaves."""
    values = [make_input(shape, dtype=torch.float64) for _ in range(1 + has_residual)]
    g = make_grad(shape, dtype=torch.float64)
    results = []
    for module in (ours, theirs):
        leaves = [value.detach().requires_grad_() for value in values]
        module.zero_grad()
        y = module(*leaves)
        y.backward(g)
        results.append([y, *(leaf.grad for leaf in leaves), *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*results, **CLOSE)
    assert_same_state(ours, theirs)


def check_training_and_evaluation(ours: nn.Module, theirs: nn.Module, dim: int, has_residual: bool = False) -> None:
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.copy_(q.normal_())
    for shape in SHAPES[dim]:
        for _ in range(2):
            assert_same_step(ours.train(), theirs.train(), shape, has_residual)
        assert_same_step(ours.eval(), theirs.eval(), shape, has_residual)


@combined(OPTIONS, dim=DIMS)
def test_every_constructor_option_behaves_as_in_torch(dim: int, options: dict[str, object]) -> None:
    ours, theirs = both(dim, dtype=torch.float64, **supported(options))
    assert repr(ours) == repr(theirs)
    assert isinstance(ours, type(theirs))
    check_training_and_evaluation(ours, theirs, dim)


@combined(WITHOUT_BIAS, act=ACTS, dim=DIMS, has_residual=FLAGS)
def test_every_activation_behaves_as_torchs(act: Act, dim: int, has_residual: bool, options: dict[str, object]) -> None:
    ours, theirs = both(dim, act, dtype=torch.float64, **options)
    assert isinstance(ours, getattr(bnext, f"BatchNorm{dim}d"))
    check_training_and_evaluation(ours, theirs, dim, has_residual)


@EACH_DIM
def test_arguments_by_position_are_torchs(dim: int) -> None:
    for args in ((5,), (5, 1e-3), (5, 1e-3, None), (5, 1e-3, 0.3, False), (5, 1e-3, 0.3, True, False)):
        ours, theirs = (getattr(namespace, f"BatchNorm{dim}d")(*args) for namespace in (bnext, nn))
        assert repr(ours) == repr(theirs)
        assert_same_state(ours, theirs)
    args = (5, 1e-3, 0.3, True, True, "cpu", torch.bfloat16)
    ours, theirs = (getattr(namespace, f"BatchNorm{dim}d")(*args) for namespace in (bnext, nn))
    assert_same_state(ours, theirs)
    assert ours.weight.dtype == torch.bfloat16


@pairs(dim=DIMS, dtype=(torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_dtype_and_device_options(dim: int, dtype: torch.dtype, device: str) -> None:
    ours, theirs = both(dim, dtype=dtype, device=device)
    assert_same_state(ours, theirs)
    assert {t.device for t in ours.state_dict().values()} == {t.device for t in theirs.state_dict().values()}
    ours, _ = both(dim, dtype=dtype, device="meta")
    assert {t.device.type for t in ours.state_dict().values()} == {"meta"}


@pairs(dim=DIMS, act=(None, "gelu"))
def test_state_dict_loads_both_ways(dim: int, act: Act) -> None:
    ours, theirs = both(dim, act, dtype=torch.float64)
    assert_same_state(ours, theirs)
    ours.weight.data.normal_()
    for _ in range(3):
        ours(make_input(SHAPES[dim][-1], dtype=torch.float64))
    result = theirs.load_state_dict(ours.state_dict(), strict=True)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_step(ours, theirs, SHAPES[dim][-1])
    fresh, _ = both(dim, act, dtype=torch.float64)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_step(fresh, theirs, SHAPES[dim][-1])
    assert act is None or fresh.act == act


@EACH_DIM
def test_state_dict_of_version_1_loads(dim: int) -> None:
    # Written before num_batches_tracked existed: the key is missing, and so is the version.
    old = {name: torch.rand(5) for name in ("weight", "bias", "running_mean", "running_var")}
    ours, theirs = both(dim)
    for module in (ours, theirs):
        module.num_batches_tracked.fill_(8)
        module.load_state_dict(dict(old), strict=True)
    assert_same_state(ours, theirs)


def test_load_state_dict_complains_as_torch_does() -> None:
    ours, theirs = both(2)
    for bad in (nn.BatchNorm2d(4).state_dict(), {}, {**theirs.state_dict(), "extra": torch.ones(1)}):
        # A dict without metadata counts as version 1, in which the counter may be missing.
        messages = []
        for module in (ours, theirs):
            with pytest.raises(RuntimeError) as caught:
                module.load_state_dict(bad)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


@pairs(dim=DIMS, rank=(1, 2, 3, 4, 5, 6), act=(None, "relu"))
def test_wrong_rank_raises_as_in_torch(dim: int, rank: int, act: Act) -> None:
    shape = (4, 5, 2, 2, 2, 2)[:rank]
    ours, theirs = both(dim, act)
    outcomes = []
    for module in (ours, theirs):
        try:
            outcomes.append(module(torch.ones(shape)).shape)
        except ValueError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert ours.num_batches_tracked.item() == (outcomes[0] == shape)


MANIPULATIONS = {
    "momentum set later": lambda m: setattr(m, "momentum", 0.5),
    "momentum unset later": lambda m: setattr(m, "momentum", None),
    "eps set later": lambda m: setattr(m, "eps", 0.1),
    "tracking switched off": lambda m: setattr(m, "track_running_stats", False),
    "counter removed": lambda m: setattr(m, "num_batches_tracked", None),
    "counter and momentum removed": lambda m: [setattr(m, a, None) for a in ("num_batches_tracked", "momentum")],
    "stats removed": lambda m: [setattr(m, a, None) for a in ("running_mean", "running_var")],
    "weight frozen": lambda m: m.weight.requires_grad_(False),
    "stats reset": lambda m: m.reset_running_stats(),
    "parameters reset": lambda m: m.reset_parameters(),
}


@pytest.mark.parametrize("change", MANIPULATIONS)
@each(act=(None, "relu"))
def test_attributes_may_change_after_construction(act: Act, change: str) -> None:
    ours, theirs = both(2, act, dtype=torch.float64)
    assert_same_step(ours, theirs, (3, 5, 4, 3), has_residual=act is not None)
    for module in (ours, theirs):
        MANIPULATIONS[change](module)
    assert_same_step(ours, theirs, (3, 5, 4, 3), has_residual=act is not None)
    assert_same_step(ours.eval(), theirs.eval(), (3, 5, 4, 3), has_residual=act is not None)


@combined(OPTIONS, dim=DIMS)
def test_lazy_layers_behave_as_torchs(dim: int, options: dict[str, object]) -> None:
    ours, theirs = both_lazy(dim, dtype=torch.float64, **supported(options))
    assert repr(ours) == repr(theirs)
    assert ours.has_uninitialized_params() == theirs.has_uninitialized_params()
    assert_same_step(ours, theirs, SHAPES[dim][-1])
    assert type(ours) is getattr(bnext, f"BatchNorm{dim}d")
    assert type(theirs) is getattr(nn, f"BatchNorm{dim}d")
    assert repr(ours) == repr(theirs)
    assert_same_step(ours.eval(), theirs.eval(), SHAPES[dim][-1])


@EACH_DIM
def test_lazy_layers_load_a_state_dict_before_their_first_call(dim: int) -> None:
    source = getattr(nn, f"BatchNorm{dim}d")(5, dtype=torch.float64)
    source(make_input(SHAPES[dim][-1], dtype=torch.float64))
    ours, theirs = both_lazy(dim, dtype=torch.float64)
    for module in (ours, theirs):
        module.load_state_dict(source.state_dict())
    assert_same_step(ours, theirs, SHAPES[dim][-1])


@pairs(dim=DIMS, act=PLAIN_OR_ACT)
def test_pickle_and_deepcopy(dim: int, act: Act) -> None:
    module, _ = both(dim, act)
    module(make_input(SHAPES[dim][-1]))
    copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), saved(module)]
    inputs = [make_input(SHAPES[dim][-1])] + [make_residual(SHAPES[dim][-1])] * (act is not None)
    expected = module(*inputs)
    for twin in copies:
        assert (type(twin), repr(twin)) == (type(module), repr(module))
        assert same_bits(twin(*inputs), expected)
        for (key, a), b in zip(module.state_dict().items(), twin.state_dict().values(), strict=True):
            assert same_bits(a, b), key
        if act is not None:
            assert twin.act == act
            twin.act = "relu" if act != "relu" else "gelu"
    module.weight.data.fill_(7)
    assert all(not (twin.weight == 7).any() for twin in copies)
    assert act is None or module.act == act


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtype_that_torch_gives(dtype: torch.dtype) -> None:
    ours, theirs = both(2)
    conv = nn.Conv2d(5, 5, 1)
    x = make_input((3, 5, 4, 3), dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == theirs(x).dtype == dtype
        after_conv = conv(x.float())
        assert ours(after_conv).dtype == theirs(after_conv).dtype == torch.bfloat16


# Each activation as it stands in a repr.
NAMES = {act: name(act) for act in ACTS} | {"leaky_relu": "leaky_relu(0.01)", "elu": "elu(1.0)"}


def expected_repr(dim: int, act: Act, **options: object) -> str:
    theirs = repr(getattr(nn, f"BatchNorm{dim}d")(5, **options))
    return theirs.replace("BatchNorm", "BatchNormAct").replace(")", f", act={NAMES[act]})")


@EACH_DIM
def test_arguments_by_position_with_an_activation(dim: int) -> None:
    cls = getattr(bnext, f"BatchNormAct{dim}d")
    module = cls(5, 1e-3, 0.3, False, True, "silu", "meta", torch.bfloat16)
    assert repr(module) == expected_repr(dim, "silu", eps=1e-3, momentum=0.3, affine=False)
    assert (module.running_mean.dtype, module.running_mean.is_meta) == (torch.bfloat16, True)


@combined(WITHOUT_BIAS, act=ACTS, dim=DIMS)
def test_repr_is_torchs_with_the_activation(act: Act, dim: int, options: dict[str, object]) -> None:
    cls = getattr(bnext, f"BatchNormAct{dim}d")
    assert repr(cls(5, act=act, **options)) == expected_repr(dim, act, **options)
    assert repr(cls(5, act=None)) == repr(cls(5, act="identity"))


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
