"""Direct calls, by which Python runs an operator without matching its schema: the results are the operator's. Where a
direct call would not do, it returns None, and Python calls the operator through torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from cases import make_input, make_parameters
from refusals import ORDINARY
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bnext
from bnext import _C, ops

SHAPE = (4, 3, 5, 2)
EPILOGUES = ((), (None, "silu", 0.0), (torch.ones(SHAPE), "relu", 0.0), (None, "leaky_relu", 0.3))


def training_arguments() -> list[object]:
    params = make_parameters(3)
    counter = torch.tensor(3)
    return [make_input(SHAPE), params.weight, params.bias, torch.zeros(3), torch.ones(3), counter, None, 1e-5]


def evaluation_arguments() -> list[object]:
    params = make_parameters(3)
    return [make_input(SHAPE), params.weight, params.bias, torch.full((3,), 0.5), torch.full((3,), 2.0), 1e-5]


CALLS = [
    pytest.param(_C.batch_norm_train, ops.batch_norm_train, training_arguments, id="training"),
    pytest.param(_C.batch_norm_eval, ops.batch_norm_eval, evaluation_arguments, id="evaluation"),
]
Direct = Callable[..., Tensor | None]
Operator = Callable[..., tuple[Tensor, ...]]
Arguments = Callable[[], list[object]]


def copied(arguments: list[object]) -> list[object]:
    return [a.clone() if isinstance(a, Tensor) else a for a in arguments]


@pytest.mark.parametrize("epilogue", EPILOGUES, ids=["plain", "silu", "add+relu", "leaky_relu"])
@pytest.mark.parametrize(("direct", "operator", "arguments"), CALLS)
def test_a_direct_call_does_what_the_operator_does(
    direct: Direct, operator: Operator, arguments: Arguments, epilogue: tuple[object, ...]
) -> None:
    given = arguments()
    ours, theirs = copied(given), copied(given)
    output = direct(*ours, *epilogue)
    assert output is not None
    assert torch.equal(output, operator(*theirs, *epilogue)[0])
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b


class Subclass(Tensor):
    pass


class Recorder(TorchDispatchMode):
    """The operators that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def replaced(index: int, value: object) -> Callable[[list[object]], list[object]]:
    return lambda given: [*given[:index], value, *given[index + 1 :]]


# Changes of valid arguments to some that direct calls do not take.
NOT_TAKEN: dict[str, Callable[[list[object]], list[object]]] = {
    "a subclass as input": lambda given: [given[0].as_subclass(Subclass), *given[1:]],
    "a subclass as weight": lambda given: [given[0], given[1].as_subclass(Subclass), *given[2:]],
    "no tensor": replaced(0, [1.0]),
    "no weight at all": lambda given: given[:1],
    "a number for a vector": replaced(1, 1.0),
    "eps as a whole number": lambda given: [*given[:-1], 1],
    "half of an epilogue": lambda given: [*given, None, "relu"],
    "more than an epilogue": lambda given: [*given, None, "relu", 0.0, True],
    "an activation that is no name": lambda given: [*given, None, 1, 0.0],
    "a counter of floats": replaced(5, torch.tensor(1.0)),
    "a counter on meta": replaced(5, torch.tensor(1).to("meta")),
    "one dimension": replaced(0, torch.ones(3)),
    "no data": replaced(0, torch.ones(0)),
    "meta": lambda given: [a.to("meta") if isinstance(a, Tensor) else a for a in given],
    "sparse": lambda given: [given[0].to_sparse(), *given[1:]],
    "mkldnn": lambda given: [given[0].to_mkldnn(), *given[1:]],
    "nested": lambda given: [torch.nested.nested_tensor([torch.ones(3, 4)] * 2), *given[1:]],
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("change", NOT_TAKEN)
@pytest.mark.parametrize(("direct", "operator", "arguments"), CALLS)
def test_what_is_not_taken_gives_none(direct: Direct, operator: Operator, arguments: Arguments, change: str) -> None:
    given = NOT_TAKEN[change](arguments())
    before = copied(given)
    assert direct(*given) is None
    for a, b in zip(given, before, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.layout == torch.strided and not a.is_nested:
            assert a.is_meta or torch.equal(a, b)


def test_under_modes_transforms_and_tracers_a_direct_call_gives_none() -> None:
    given = evaluation_arguments()
    assert _C.batch_norm_eval(*given) is not None
    with TorchFunctionMode():
        assert _C.batch_norm_eval(*given) is None
    with torch.device("cpu"):
        assert _C.batch_norm_eval(*given) is None
    outputs: list[object] = []

    def call(x: Tensor) -> Tensor:
        outputs.append(_C.batch_norm_eval(x, *given[1:]))
        return x

    torch.func.vmap(call)(torch.ones(2, *SHAPE))
    torch.func.functionalize(call)(given[0])
    with torch.no_grad():
        torch.jit.trace(call, given[0], check_trace=False)
    assert outputs == [None, None, None]


def test_dispatch_modes_and_the_profiler_see_direct_calls() -> None:
    evaluation, training = evaluation_arguments(), training_arguments()
    with Recorder() as recorder:
        _C.batch_norm_eval(*evaluation)
        _C.batch_norm_train(*training)
    assert recorder.seen == [ops.batch_norm_eval, ops.batch_norm_train]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        _C.batch_norm_eval(*evaluation_arguments())
    assert "bnext::batch_norm_eval" in {event.name for event in profiled.events()}


@pytest.mark.parametrize(
    ("index", "value"),
    [(0, torch.ones(1, 3)), (1, torch.ones(4)), (2, torch.ones(3, dtype=torch.int64)), (7, -1.0)],
    ids=["one value", "channels", "dtype", "eps"],
)
def test_errors_are_the_operators(index: int, value: object) -> None:
    given = replaced(index, value)(training_arguments())
    errors = []
    for call in (_C.batch_norm_train, ops.batch_norm_train):
        with pytest.raises(ORDINARY) as raised:
            call(*given)
        errors.append((type(raised.value), str(raised.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("under", [nullcontext, torch.inference_mode, torch.no_grad])
def test_layers_make_direct_calls(under: Callable[[], AbstractContextManager[object]], monkeypatch) -> None:
    # A call that matches a schema would fail.
    monkeypatch.setattr(bnext.ops, "batch_norm_eval", None)
    monkeypatch.setattr(bnext.ops, "batch_norm_train", None)
    layer = bnext.BatchNorm2d(3)
    with under():
        layer(make_input(SHAPE))
        layer.eval()(make_input(SHAPE))
        bnext.BatchNormAct2d(3, act=("elu", 0.5))(make_input(SHAPE), make_input(SHAPE))
    assert layer.num_batches_tracked == 1
