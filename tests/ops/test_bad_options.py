"""Wrong options of layers and of calls on whole models; and odd values that bnext takes because torch does."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable

import bad_values
import numpy as np
import pytest
import torch
from bad_values import BUFFERS, CHANNELS, LAYERS, RANKS, SHAPE, Target, torchs
from cases import make_input, make_parameters, same_bits, seed
from marks import MODES, needs_todays_rule_for_eps
from refusals import ORDINARY, Arguments, raised, remember
from test_bad_arguments import complaint_about, error_of, same_error
from torch import Tensor, nn

import bnext
from bnext.functional import batch_norm

# Options that torch's constructors do not have.
OWN = {"act"}

# Values of torch's options: torch's constructors refuse some of them, and its calls refuse others.
ODD: dict[str, list[object]] = {
    "num_features": ["five", None, -1, 0, 2, 1.5, [3], True, object, 2**63, math.nan],
    "eps": ["tiny", None, [1e-5], 1j, object, -1e-5, -math.inf, 0.0, 0, math.nan, math.inf, 1, True],
    "momentum": ["half", [0.1], 1j, object, torch.ones(2), -1, 0, 2, None, True, math.nan, math.inf, np.float32(0.1)],
    "affine": ["no", None, 0, [], [1]],
    "track_running_stats": ["no", None, 0, [], [1]],
    "bias": ["no", None, 0, [], [1]],
    "device": ["nowhere", "cuda:x", 1.5, [], object, "meta"],
    "dtype": ["float32", 32, float, object, torch.int64, torch.bool, torch.complex64, torch.float64],
    "process_group": ["world", 1, [], object],
}


def options(cls: type) -> list[str]:
    return [p.name for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD]


def build(cls: type, option: str, value: object) -> nn.Module:
    first = {} if "Lazy" in cls.__name__ else {"num_features": CHANNELS}
    return cls(**{**first, option: value})


def each_option(is_chosen: Callable[[str], bool]) -> pytest.MarkDecorator:
    """Parametrises over every class of layers and the chosen ones of its options."""
    pairs = [
        pytest.param(cls, option, marks=needs_todays_rule_for_eps if option == "eps" else ())
        for cls in LAYERS
        for option in options(cls)
        if is_chosen(option)
    ]
    return pytest.mark.parametrize(("cls", "option"), pairs, ids=lambda v: getattr(v, "__name__", v))


@each_option(lambda option: True)
def test_every_option_is_covered(cls: type, option: str) -> None:
    assert option in (bad_values.KINDS if option in OWN else ODD)
    assert (option in OWN) != (option in inspect.signature(torchs(cls)).parameters)


# Tensors that a message may name in place of the option that gave them their length, dtype or device.
NAMED_INSTEAD = dict.fromkeys(("num_features", "dtype", "device"), "weight|running_mean")


@each_option(lambda option: option in ODD and option != "process_group")
def test_an_option_of_torch_does_what_it_does_there(cls: type, option: str) -> None:
    # The constructor raises the same errors. A layer that was made runs if torch's does, and else raises before its
    # state changes.
    theirs = nn.BatchNorm2d if cls is bnext.SyncBatchNorm else torchs(cls)  # torch's runs on GPUs alone
    for value in ODD[option]:
        refusal = error_of(build, {"cls": torchs(cls), "option": option, "value": value})
        error = error_of(build, {"cls": cls, "option": option, "value": value})
        assert same_error(error, refusal), (value, error)
        for training in (True, False) if error is None else ():
            run_both(build(theirs, option, value).train(training), build(cls, option, value).train(training), option)


def run_both(theirs: nn.Module, ours: nn.Module, option: str) -> None:
    """Asserts that our layer runs if theirs does, and else names the option and keeps its state."""
    x = make_input(RANKS[type(ours).__name__[-2:]])
    is_lazy = ours.has_uninitialized_params() if hasattr(ours, "has_uninitialized_params") else False
    unchanged = remember({} if is_lazy else ours.state_dict(keep_vars=True))
    refusal, error = error_of(theirs, {"input": x}), error_of(ours, {"input": x})
    if refusal is None:
        assert error is None
    elif option == "momentum" and not ours.training:
        assert error is None  # bnext's evaluation does not look at the momentum
    else:
        unchanged()
        assert isinstance(error, ORDINARY)
        named = re.search(rf"\b({option}|{NAMED_INSTEAD.get(option, option)})\b", str(error))
        assert named or same_error(error, refusal), (error, refusal)


@each_option(lambda option: option in OWN)
def test_wrong_values_of_bnexts_own_options_are_refused(cls: type, option: str) -> None:
    target = Target(f"options_{cls.__name__}", lambda **values: cls(CHANNELS, **values), (option,), dict)
    wrong = {}
    for row in bad_values.bad_values(target, option):
        complaint = complaint_about(target, option, row, {option: row.make()})
        if complaint:
            wrong[row.id] = complaint
    assert wrong == {}


def model() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.BatchNorm2d(CHANNELS))


def test_every_argument_of_whole_model_calls_is_covered() -> None:
    for function in (bnext.convert, bnext.revert, bnext.SyncBatchNorm.convert_sync_batchnorm):
        assert set(inspect.signature(function).parameters) <= set(bad_values.KINDS)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        *(
            (bnext.convert, argument)
            for argument in inspect.signature(bnext.convert).parameters
            if argument != "process_group"
        ),
        (bnext.revert, "module"),
        (bnext.fusion_report, "module"),
        (bnext.SyncBatchNorm.convert_sync_batchnorm, "module"),
    ],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_wrong_arguments_of_whole_model_calls_are_refused(function: Callable[..., object], argument: str) -> None:
    whole = model()
    classes = [type(m) for m in whole.modules()]
    target = Target(function.__name__, function, (argument,), dict)
    rows = bad_values.bad_values(target, argument)
    wrong = {row.id: complaint_about(target, argument, row, {"module": whole, argument: row.make()}) for row in rows}
    assert {key: complaint for key, complaint in wrong.items() if complaint} == {}
    assert [type(m) for m in whole.modules()] == classes


def test_recompute_without_fuse_is_refused() -> None:
    whole = model()
    with pytest.raises(ValueError, match="fuse=True with recompute=True"):
        bnext.convert(whole, recompute=True)
    assert all("forward" not in vars(m) for m in whole.modules())


@pytest.mark.parametrize("how", ["constructor", "convert"])
def test_a_wrong_process_group_is_refused_by_the_call(how: str, group: tuple[int, str]) -> None:
    # As torch's, the constructor takes any object.
    target = Target("process_group", lambda process_group: None, ("process_group",), dict)
    for row in bad_values.bad_values(target, "process_group"):
        value = row.make()
        if how == "constructor":
            layer = bnext.SyncBatchNorm(CHANNELS, process_group=value)
        else:
            layer = bnext.convert(nn.BatchNorm2d(CHANNELS), sync=True, process_group=value)
        unchanged = remember(layer.state_dict(keep_vars=True))
        with pytest.raises(TypeError, match=r"\bprocess_group\b"):
            layer(make_input(SHAPE))
        unchanged()


WRONG_WHEN_COMPILED: dict[str, tuple[str, Callable[[], object]]] = {
    "length": ("running_mean", lambda: torch.zeros(1)),
    "dtype": ("bias", lambda: torch.ones(CHANNELS, dtype=torch.int64)),
    "length of weight": ("weight", lambda: torch.ones(1)),
    "dtype of input": ("input", lambda: torch.ones(SHAPE, dtype=torch.int64)),
    "eps": ("eps", lambda: -1.0),
}


@pytest.mark.parametrize("wrong", WRONG_WHEN_COMPILED)
def test_compiled_evaluation_does_not_broadcast(wrong: str, fresh_compiler: None) -> None:
    # Without gradients evaluation is compiled as arithmetic, which would broadcast or convert these.
    key, make = WRONG_WHEN_COMPILED[wrong]
    args = {**values(), "eps": 1e-5, key: make()}
    compiled = torch.compile(lambda args: batch_norm(**args), backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(ORDINARY, match=rf"\b{key}\b"):
        compiled(args)


# Odd values that torch takes, and bnext with it.


def values() -> dict[str, Tensor]:
    """The tensors of a valid call, of the same values each time."""
    seed(0)
    return {"input": make_input(SHAPE), **make_parameters(CHANNELS)._asdict()}


NUMBERS = (
    math.nan, math.inf, -math.inf, -1.0, 0.0, 1, 2, True, 1e30, 5e-324, np.float32(0.1), np.int64(1), np.bool_(True),
)  # fmt: skip


@MODES
@pytest.mark.parametrize("option", ["momentum", pytest.param("eps", marks=needs_todays_rule_for_eps)])
@pytest.mark.parametrize("number", [*NUMBERS, torch.tensor(0.5)], ids=repr)
def test_bnext_takes_the_numbers_that_torch_takes(number: object, option: str, training: bool) -> None:
    theirs, ours = values(), values()
    call = {"training": training, option: number}
    refusal = error_of(lambda: torch.nn.functional.batch_norm(**theirs, **call), {})
    error = error_of(lambda: batch_norm(**ours, **call), {})
    assert (error is None) == (refusal is None), (error, refusal)
    if error is not None:
        assert str(error) == str(refusal)
        return
    expected = torch.nn.functional.batch_norm(**values(), **call)
    torch.testing.assert_close(batch_norm(**values(), **call), expected, equal_nan=True, rtol=1e-4, atol=1e-5)
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[key], theirs[key], equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("written", ["running_mean", "running_var", "both"])
def test_statistics_made_in_inference_mode_are_updated(written: str) -> None:
    # Such tensors have no version counter; torch writes to them, too.
    args, expected = values(), values()
    with torch.inference_mode():
        for key in ("running_mean", "running_var") if written == "both" else (written,):
            args[key] = args[key].clone()
    batch_norm(**expected, training=True)
    batch_norm(**args, training=True)
    for key, tensor in args.items():
        assert same_bits(tensor, expected[key]), key


@pytest.mark.parametrize("unsavable", ["input", "weight", "residual"])
def test_a_tensor_that_cannot_be_saved_is_found_before_statistics_are_written(unsavable: str) -> None:
    args = {**values(), "residual": make_input(SHAPE)}
    args["bias" if unsavable != "weight" else "input"].requires_grad_()
    args["weight"].requires_grad_(unsavable != "weight")
    with torch.inference_mode():
        args[unsavable] = args[unsavable].detach().clone()
    unchanged = remember(args)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        bnext.functional.batch_norm_act(**args, training=True, act="silu")
    unchanged()


def train_op(args: Arguments) -> object:
    return torch.ops.bnext.batch_norm_train(**args, momentum=0.1, eps=1e-5)


@pytest.mark.parametrize("negated", BUFFERS)
def test_lazily_negated_buffers_are_read_and_never_written(negated: str) -> None:
    args = {**values(), "num_batches_tracked": torch.tensor(5)}
    args[negated] = torch._neg_view(-args[negated])
    raised(train_op, args, rf"\b{negated}\b")
    if negated != "num_batches_tracked":
        evaluation = {**values(), negated: args[negated]}
        assert same_bits(batch_norm(**evaluation), batch_norm(**evaluation | {negated: args[negated].resolve_neg()}))


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("grad", [False, True], ids=["nograd", "grad"])
def test_what_is_written_to_has_a_new_version_and_nothing_else_has(grad: bool, strided: bool) -> None:
    # Else autograd would not notice that a tensor saved for backward has changed.
    args = {**values(), "num_batches_tracked": torch.tensor(5)}
    args["weight"].requires_grad_(grad)
    for key in BUFFERS[:2] if strided else ():
        args[key] = args[key].repeat_interleave(2)[::2]
    without_counter = {key: args[key] for key in args.keys() - {"num_batches_tracked"}}
    for call, written in (
        (lambda: train_op(args), {*BUFFERS}),
        (lambda: batch_norm(**without_counter, training=True), {*BUFFERS[:2]}),
    ):
        before = {key: tensor._version for key, tensor in args.items()}
        call()
        assert {key for key, tensor in args.items() if tensor._version > before[key]} == written
