"""Calls, valid values of all of their arguments, and wrong values of each.

The wrong values follow from an argument's name and its valid value. An argument that `KINDS` does not have fails
test_every_argument_is_covered.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from cases import make_grad, make_input, make_parameters, make_residual, seed
from refusals import Arguments, remember
from torch import Tensor

import bnext
from bnext import _C

CHANNELS = 3
SHAPE = (4, CHANNELS, 5, 5)
# No message may contain these texts, which torch writes for errors of its own.
INTERNAL = ("INTERNAL ASSERT", "report a bug", "Exception raised from", "undefined Tensor")


class Bad(NamedTuple):
    """A wrong value, which `make` returns."""

    id: str
    make: Callable[[], object]


class Target(NamedTuple):
    """A function that is called by keywords, and torch's counterpart if the errors may be the same as torch's."""

    name: str
    call: Callable[..., object]
    arguments: tuple[str, ...]
    good: Callable[[], Arguments]
    reference: Callable[..., object] | None = None

    def __str__(self) -> str:
        return self.name


# Values of a wrong type. Nothing but the type of the list is wrong: it has a number for each channel.


def _constants(**values: object) -> list[Bad]:
    return [Bad(key, lambda v=value: v) for key, value in values.items()]


NONSENSE = [*_constants(str="five", list=[1.0, 1.0, 1.0], dict={}, type=int), Bad("object", object)]
NOT_A_TENSOR = [*NONSENSE, *_constants(int=1, float=1.0, bool=True, array=np.ones(3, dtype=np.float32))]
# As in torch, a bool is a number, and so is a tensor of one element.
NOT_A_NUMBER = [*NONSENSE, *_constants(complex=1j, huge=10**400), Bad("vector", lambda: torch.ones(2))]
NOT_A_STRING = [*_constants(int=1, float=0.5, bool=True, list=["relu"], dict={}), Bad("object", object)]
NOT_A_BOOL = [*NONSENSE, Bad("vector", lambda: torch.ones(2))]
IS_NONE = _constants(none=None)

# The kernels have the first four.
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2),
    *(torch.uint8, torch.int32, torch.int64, torch.bool, torch.complex64),
)


def _cast(dtypes: tuple[torch.dtype, ...], good: Callable[[], Tensor]) -> list[Bad]:
    return [Bad(str(d).removeprefix("torch."), lambda d=d: good().to(d)) for d in dtypes]


def _elsewhere(good: Callable[[], Tensor]) -> list[Bad]:
    """The valid tensor on another device, and sparse. CSR tensors have two dimensions or more."""
    rows = [Bad("meta", lambda: good().to("meta")), Bad("coo", lambda: good().to_sparse())]
    return rows if good().dim() < 2 else [*rows, Bad("csr", lambda: good().flatten(1).to_sparse_csr())]


def _reshaped(good: Callable[[], Tensor]) -> list[Bad]:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "scalar": lambda t: t.flatten()[0],
        "longer": lambda t: torch.cat([t, t[..., :1]], -1),
        "shorter": lambda t: t[..., :-1],
        "empty": lambda t: t[:0],
    }
    if good().dim() > 1:  # a vector may have any shape of as many values
        changes |= {
            "deeper": lambda t: t.unsqueeze(0),
            "column": lambda t: t.unsqueeze(-1),
            "flat": torch.flatten,
            "repeated": lambda t: torch.cat([t, t[:1]]),
            "transposed": lambda t: t.transpose(0, 1),
        }
    return [Bad(key, lambda change=change: change(good())) for key, change in changes.items()]


def _data(t: Target, name: str) -> list[Bad]:
    """input or grad_output, which alone may have any floating dtype and any shape of two dimensions or more."""
    good = lambda: t.good()[name]  # noqa: E731
    rows = [Bad("scalar", lambda: torch.tensor(1.0)), Bad("vector", lambda: torch.ones(CHANNELS))]
    rows += _cast(DTYPES[4:], good) + _elsewhere(good) + NOT_A_TENSOR + IS_NONE
    others = set(t.arguments) - {name}
    if t.name.startswith("layer"):
        rows.append(Bad("deeper", lambda: good().unsqueeze(0)))
    if (t.name.startswith("layer") and "Lazy" not in t.name) or others & {"weight", "save_stats", "gathered_stats"}:
        rows += [Bad("channels", lambda: good()[:, :-1]), Bad("no_channels", lambda: good()[:, :0])]
    if others & {"residual", "input"}:
        rows += [row for row in _alongside(t, name) if row.id not in {bad.id for bad in rows}]
    # A call's only tensor may be on any device.
    return rows if others - {"eps"} or t.name.startswith("layer") else [row for row in rows if row.id != "meta"]


def _alongside(t: Target, name: str) -> list[Bad]:
    """A tensor that must have the shape, dtype and device of another one."""
    good = lambda: t.good()[name]  # noqa: E731
    others = tuple(d for d in DTYPES if d != torch.float32)
    return _reshaped(good) + _cast(others, good) + _elsewhere(good) + NOT_A_TENSOR


def _input(t: Target, name: str) -> list[Bad]:
    return _alongside(t, name) + IS_NONE if "grad_output" in t.arguments else _data(t, name)


def _exactly(t: Target, name: str, optional: bool = True) -> list[Bad]:
    """A tensor of one shape and one dtype."""
    good = lambda: t.good()[name]  # noqa: E731
    others = tuple(d for d in DTYPES if d != good().dtype)
    return _reshaped(good) + _cast(others, good) + _elsewhere(good) + NOT_A_TENSOR + ([] if optional else IS_NONE)


def _running(t: Target, name: str) -> list[Bad]:
    """In training, when a statistic is written to, its elements must not share memory."""
    written = "eval" not in t.name
    rows = _exactly(t, name, optional=written)
    if not t.name.endswith("gathered"):  # the operator on gathered stats has no autograd kernel
        rows.append(Bad("requires_grad", lambda: t.good()[name].requires_grad_()))
    return [*rows, Bad("expanded", lambda: torch.ones(1).expand(CHANNELS))] if written else rows


def _counter(t: Target, name: str) -> list[Bad]:
    good = lambda: t.good()[name]  # noqa: E731
    rows = _cast(tuple(d for d in DTYPES if d != torch.int64), good) + _elsewhere(good)
    if t.name == "held":  # as torch's, a layer counts in any dtype and on any device
        rows = [row for row in rows if row.id == "coo"]
    return [*rows, *NOT_A_TENSOR, *(Bad(f"of_{n}", lambda n=n: torch.zeros(n, dtype=torch.int64)) for n in (0, 2))]


def _count(t: Target, name: str) -> list[Bad]:
    good = lambda: t.good()[name]  # noqa: E731
    rows = _cast(tuple(d for d in DTYPES if d != torch.float64), good) + _elsewhere(good) + NOT_A_TENSOR + IS_NONE
    return rows + [Bad(f"of_{n}", lambda n=n: torch.ones(n, dtype=torch.float64)) for n in (0, 1, CHANNELS)]


def _gathered_stats(t: Target, name: str) -> list[Bad]:
    # The number of rows is free, since it is the number of processes.
    return [row for row in _exactly(t, name, optional=False) if row.id not in {"empty", "repeated"}]


def _eps(t: Target, name: str) -> list[Bad]:
    rows = NOT_A_NUMBER + IS_NONE
    if "backward" in t.name:
        return rows  # backward does not use eps
    rows = rows + _constants(negative=-1e-5, minus_infinite=-math.inf)
    return rows if "eval" in t.name else rows + _constants(zero=0.0)


def _momentum(t: Target, name: str) -> list[Bad]:
    # For operators and layers None is the cumulative average; functions take a number alone, as torch's do. Evaluation
    # does not convert the momentum to a double, and so does not notice that it cannot.
    rows = [row for row in NOT_A_NUMBER if not ("evaluation" in t.name and row.id in {"huge", "vector"})]
    return rows + (IS_NONE if "function" in t.name else [])


def _strict_bool(t: Target, name: str) -> list[Bad]:
    # For operators torch converts None and numbers to bool.
    rows = NOT_A_BOOL
    return rows + IS_NONE + _constants(int=1, float=0.0) if "function" in t.name or t.name == "convert" else rows


def _act(t: Target, name: str) -> list[Bad]:
    unknown = _constants(unknown="swish", empty="", upper="RELU", nul="relu\0", surrogate="\ud800", bytes=b"swish")
    return unknown + NOT_A_STRING + ([] if "operator" not in t.name else IS_NONE)


def _mask(t: Target, name: str) -> list[Bad]:
    """A rectifier's mask for an operator, a mask of padding for a function or a layer."""
    if not t.name.startswith("operator"):
        return _exactly(t, name)
    return [*_exactly(t, name), Bad("of_channels_last", lambda: t.good()[name].flatten(0, 1))]


def _part_size(t: Target, name: str) -> list[Bad]:
    rows = NOT_A_NUMBER + _constants(negative=-1, float=1.5)
    return rows + (IS_NONE if t.name.startswith("operator") else _constants(bool=True, zero=0))


def _lengths(t: Target, name: str) -> list[Bad]:
    values = {"long": [9, 1, 1, 1], "negative": [1, -1, 1, 1], "few": [1, 1], "column": [[1]] * 4}
    rows = [*NOT_A_TENSOR, *(Bad(key, lambda v=value: torch.tensor(v)) for key, value in values.items())]
    rows += _cast(tuple(d for d in DTYPES if d not in (torch.int32, torch.int64)), lambda: torch.ones(4))
    rows.append(Bad("meta", lambda: torch.ones(4, dtype=torch.int64, device="meta")))
    return rows + IS_NONE if t.name.startswith("operator") else rows


def _group(t: Target, name: str) -> list[Bad]:
    if name == "group_name":
        return _constants(unknown="nobody", empty="", nul="0\0") + NOT_A_STRING + IS_NONE
    return NOT_A_NUMBER + _constants(none=None, float=1.5, zero=0, negative=-1, too_many=2, int64=2**63)


TENSOR = Bad("tensor", lambda: torch.ones(2))
CAP = [*NONSENSE, *_constants(float=1.5, int64=2**40, negative=-1)]

# By argument: its wrong values, or a function that makes them.
KINDS: dict[str, list[Bad] | Callable[[Target, str], list[Bad]]] = {
    "input": _input,
    "grad_output": _data,
    "residual": _alongside,
    "weight": _exactly,
    "bias": _exactly,
    "running_mean": _running,
    "running_var": _running,
    "num_batches_tracked": _counter,
    "gathered_stats": _gathered_stats,
    "save_stats": functools.partial(_exactly, optional=False),
    "mean_grads": _exactly,
    "count": _count,
    "tensor": NOT_A_TENSOR + IS_NONE,  # torch's collective checks which tensors it can sum
    "mask": _mask,
    "valid": _exactly,
    "lengths": _lengths,
    "batch": _group,
    "size": _group,
    "device": _constants(unknown="nowhere", int=-5) + NOT_A_STRING + IS_NONE,
    "virtual_batch_size": _part_size,
    "update_in_backward": _strict_bool,
    "momentum": _momentum,
    "eps": _eps,
    "slope": NOT_A_NUMBER + IS_NONE,
    "training": _strict_bool,
    "with_mask": _strict_bool,
    "output_mask": [
        *_constants(str="five", int=1, bool=True, strings=["yes"] * 4),
        *_constants(**{f"of_{n}": [True] * n for n in (0, 1, 3, 5)}),
        *IS_NONE,
        Bad("object", object),
    ],
    "act": _act,
    "group_size": _group,
    "group_name": _group,
    "module": [*NOT_A_TENSOR, *IS_NONE, TENSOR, Bad("class", lambda: torch.nn.BatchNorm2d)],
    "fuse": _strict_bool,
    "recompute": _strict_bool,
    "sync": _strict_bool,
    "verbose": _strict_bool,
    "single_value": NOT_A_STRING + _constants(unknown="skip"),
    "process_group": [*NONSENSE, *_constants(int=1, empty=[], name="0"), TENSOR],
    "name": [
        *_constants(unknown="mmx", empty="", upper="AVX2", nul="default\0", surrogate="\ud800"),
        *NOT_A_STRING,
        *IS_NONE,
    ],
    "sms": CAP,
    "shared_per_block": CAP,
    "max_cluster": CAP,
    "max_row_bytes": CAP,
}


def bad_values(target: Target, argument: str) -> list[Bad]:
    """The wrong values of an argument; none if `KINDS` does not have it."""
    kind = KINDS.get(argument, [])
    return kind(target, argument) if callable(kind) else kind


# The calls.


def forward_arguments() -> Arguments:
    """A valid value for each argument of the functions, and of the operators without a grad_output."""
    seed(0)
    p = make_parameters(CHANNELS)
    return {
        "input": make_input(SHAPE),
        **p._asdict(),
        "num_batches_tracked": torch.tensor(5),
        "momentum": 0.1,
        "eps": 1e-5,
        "residual": make_residual(SHAPE),
        "act": "relu",
        "slope": 0.0,
        "with_mask": True,
        "save_stats": torch.ones(2, CHANNELS, dtype=torch.float64),
        "gathered_stats": torch.ops.bnext.batch_norm_stats(make_input(SHAPE), 1e-5).repeat(2, 1),
        "tensor": make_input(SHAPE),
        "group_size": 1,
        "group_name": "0",
        "training": True,
        "valid": no_padding(SHAPE),
        "virtual_batch_size": 0,
        "update_in_backward": True,
        "lengths": torch.tensor([5, 1, 0, 2]),
        "batch": 4,
        "size": 5,
        "device": "cpu",
    }


def no_padding(shape: tuple[int, ...]) -> Tensor:
    return torch.ones((shape[0], *shape[2:]), dtype=torch.bool)


def backward_arguments() -> Arguments:
    """A valid value for each argument of the operators with a grad_output."""
    forward = forward_arguments()
    x, weight, bias, residual = (forward[key] for key in ("input", "weight", "bias", "residual"))
    settings = (0.1, 1e-5, residual, "relu", 0.0, True)
    _, stats, mask = torch.ops.bnext.batch_norm_train(x, weight, bias, None, None, None, *settings)
    return {
        **{key: forward[key] for key in ("input", "weight", "bias", "residual", "training", "eps", "act", "slope")},
        "grad_output": make_grad(SHAPE),
        "save_stats": stats,
        "output_mask": [True] * 4,
        "mask": mask,
        "mean_grads": torch.ones(2, CHANNELS),
        "count": torch.tensor(100.0, dtype=torch.float64),
        "group_name": "0",
        "valid": no_padding(SHAPE),
        "virtual_batch_size": 0,
    }


def operators() -> list[Target]:
    """Each registered operator, with the arguments of its schema."""
    targets = []
    for schema in sorted(torch._C._jit_get_all_schemas(), key=lambda schema: schema.name):
        if schema.name.startswith("bnext::"):
            name = schema.name.removeprefix("bnext::")
            arguments = tuple(argument.name for argument in schema.arguments)
            make = backward_arguments if "grad_output" in arguments else forward_arguments
            good = lambda make=make, arguments=arguments: {k: v for k, v in make().items() if k in arguments}  # noqa: E731
            targets.append(Target(f"operator_{name}", getattr(torch.ops.bnext, name), arguments, good))
            if "training" in arguments:
                frozen = lambda good=good: {**good(), "training": False, "mean_grads": None}  # noqa: E731
                frozen_arguments = tuple(argument for argument in arguments if argument != "mean_grads")
                targets.append(
                    Target(f"operator_{name}_frozen", getattr(torch.ops.bnext, name), frozen_arguments, frozen)
                )
    return targets


def functions() -> list[Target]:
    """The public functions, in training and in evaluation."""
    targets = []
    for function in (bnext.functional.batch_norm, bnext.functional.batch_norm_act):
        arguments = tuple(inspect.signature(function).parameters)
        for mode in ("training", "evaluation"):

            def good(arguments: tuple[str, ...] = arguments, mode: str = mode) -> Arguments:
                values = {**forward_arguments(), "training": mode == "training"}
                values |= {"mask": no_padding(SHAPE), "virtual_batch_size": 2}
                # A call takes either mask or lengths.
                return {k: v for k, v in values.items() if k in arguments and k != "lengths"}

            targets.append(Target(f"function_{function.__name__}_{mode}", function, arguments, good))
    return targets


LAYERS = [getattr(bnext, name) for name in bnext.__all__ if isinstance(getattr(bnext, name), type)]
RANKS = {"1d": (4, CHANNELS, 6), "2d": SHAPE, "3d": (4, CHANNELS, 2, 3, 2), "rm": SHAPE}


def layers() -> list[Target]:
    """The forward of a new layer of each class, in training and in evaluation."""
    return [_layer(cls, mode) for cls in LAYERS for mode in ("training", "eval")]


def _layer(cls: type, mode: str) -> Target:
    is_lazy = "Lazy" in cls.__name__
    shape = RANKS[cls.__name__[-2:]]
    # lengths= is for sequences, mask= for images.
    other = "mask" if len(shape) == 3 else "lengths"
    takes = tuple(name for name in inspect.signature(cls.forward).parameters if name not in ("self", other))

    def good() -> Arguments:
        seed(0)
        padding = {"lengths": torch.tensor([6, 1, 0, 2]), "mask": no_padding(shape)}
        return {key: padding[key] if key in padding else make_input(shape) for key in takes}

    def new_layer(cls: type) -> torch.nn.Module:
        return cls(*[] if is_lazy else [CHANNELS]).train(mode == "training")

    def call(**values: object) -> object:
        module, checks = new_layer(cls), []
        # This hook runs after the one in which a lazy layer takes its size from the input; both run before any check.
        module.register_forward_pre_hook(lambda m, _: checks.append(remember(m.state_dict(keep_vars=True))))
        try:
            return module(**values)
        except Exception:
            for check in checks:
                check()
            raise

    def reference(**values: object) -> object:
        return new_layer(torchs(cls))(values["input"])

    return Target(f"layer_{cls.__name__}_{mode}", call, takes, good, reference)


def _held_by_a_layer(**values: object) -> object:
    """A call of a layer whose buffers have been replaced by these values."""
    layer = bnext.BatchNorm2d(CHANNELS)
    for key, value in values.items():
        setattr(layer, key, value)
    return layer(make_input(SHAPE))


BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
HELD = Target("held", _held_by_a_layer, BUFFERS, lambda: {k: v for k, v in forward_arguments().items() if k in BUFFERS})


def torchs(cls: type) -> type:
    """The class of torch that a layer stands for."""
    return getattr(torch.nn, cls.__name__.replace("Act", ""))


# Functions of the extension have signatures in the stub alone, which test_architecture.py compares with the binary.
EXTENSION = [
    Target("set_cpu_isa", _C.set_cpu_isa, ("name",), lambda: {"name": _C.cpu_isa()}),
    Target("cap_cuda_device", _C.cap_cuda_device, ("sms", "shared_per_block", "max_cluster", "max_row_bytes"), dict),
]
