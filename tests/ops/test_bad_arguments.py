"""Every argument of every public call with every wrong value: an ordinary exception names the argument, and nothing has
changed. The arguments come from the operators' schemas and the functions' signatures."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import bad_values
import pytest
from bad_values import EXTENSION, HELD, INTERNAL, LAYERS, Bad, Target, functions, layers, operators
from refusals import ORDINARY, Arguments, remember, told

import bnext
from bnext import _C

pytestmark = [pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")]

CALLED = [*operators(), *functions(), *layers(), HELD, *EXTENSION]

SPARSE = r"with arguments from the '(Sparse|SparseCsr)CPU' backend"
# Regular expressions for (target, argument, value): what the message says in place of the argument's name.
UNNAMED = {
    # torch's dispatcher finds no kernel for the backend, and names it.
    (".*", ".*", "coo|csr"): SPARSE,
    # Without a tensor the dispatcher finds no backend.
    ("operator_batch_norm_stats", "input", "none"): "no tensor arguments",
    ("operator_sequence_mask", "lengths", "none"): "no tensor arguments",
    # Where two arguments do not fit each other, the dependent one is named.
    (".*", "input|grad_output", ".*"): "expected (mask|lengths|valid) to have|expected lengths from 0 to",
    # torch converts the list to a std::array.
    (".*", "output_mask", "of_."): "List with . elements to a fixed-size array of size 4",
    # Errors of torch's registry of groups, and of gloo, which knows the number of processes.
    (".*", "group_name", ".*"): "Could not resolve the process group",
    (".*", "group_size", "too_many"): "invalid size of output tensor",
    (".*", ".*", "negative"): "cap_cuda_device: bnext was built without CUDA",
    # That given means have no derivative is checked first.
    (".*backward", "mean_grads", ".*"): "require grad with mean_grads",
    # The rank of a mask tells the layout.
    (".*backward.*", "mask", "scalar|flat|of_channels_last"): r"expected mask to have shape torch.Size\(\[100, 4\]\)",
}


def need_not_name(message: str, target: str, argument: str, row: str) -> bool:
    """Whether the message is one that need not name the argument."""
    return any(
        all(map(re.fullmatch, where, (target, argument, row))) and re.search(text, message)
        for where, text in UNNAMED.items()
    )


def error_of(call: Callable[..., object], values: Arguments) -> Exception | None:
    try:
        call(**values)
    except Exception as error:
        return error
    return None


def complaint_about(target: Target, argument: str, row: Bad, values: Arguments) -> str:
    """What is wrong with the way in which the call refuses the values; empty if nothing is."""
    unchanged = remember(values)
    error = error_of(target.call, values)
    try:
        unchanged()
    except AssertionError as changed:
        return str(changed)
    if error is None:
        return "not refused"
    if isinstance(error, AssertionError):
        return f"in the layer, {error}"
    message = str(error).split("Declaration:")[0]
    if any(text in message for text in INTERNAL):
        return f"an internal text: {message}"
    parts = (rf"\b{argument}\b", *told(values[argument], target.good().get(argument)))
    missing = [part for part in parts if not re.search(part, message, re.IGNORECASE)]
    if isinstance(error, ORDINARY) and (not missing or need_not_name(message, target.name, argument, row.id)):
        return ""
    theirs = target.reference and error_of(target.reference, values)
    return "" if same_error(error, theirs) else f"the message does not match {missing}: {error!r}"


def same_error(ours: Exception | None, theirs: Exception | None) -> bool:
    return type(ours) is type(theirs) and str(ours) == str(theirs)


@pytest.mark.parametrize("target", CALLED, ids=str)
def test_every_argument_is_covered(target: Target) -> None:
    missing = [argument for argument in target.arguments if not bad_values.bad_values(target, argument)]
    assert missing == [], "no bad values in bad_values.KINDS"


# Public functions that only layers call. They pass their arguments on to the operators, which check them.
NOT_CALLED = {"train_batch_norm", "eval_batch_norm", "keeps_operators"}


def takes_any_object(function: ast.FunctionDef) -> bool:
    """Whether the function refuses nothing: it returns None for arguments that it does not take (see
    test_direct_calls.py)."""
    return all(a.annotation is not None and ast.unparse(a.annotation) == "object" for a in function.args.args)


def test_everything_public_is_covered() -> None:
    assert {
        *(cls.__name__ for cls in LAYERS),
        "convert",
        "freeze",
        "fusion_report",
        "keep_freed_memory",
        "recompute",
        "revert",
        "unfreeze",
        "update_bn",
        "functional",
        "__version__",
    } == set(bnext.__all__)
    module = bnext.functional
    public = {name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    called = {target.call.__name__ for target in functions()}
    assert {name for name in public if not name.startswith("_")} == called | NOT_CALLED
    stub = ast.parse((Path(bnext.__file__).parent / "_C.pyi").read_text()).body
    functions_of_stub = [each for each in stub if isinstance(each, ast.FunctionDef) and each.args.args]
    taking = {f.name: tuple(a.arg for a in f.args.args) for f in functions_of_stub if not takes_any_object(f)}
    assert taking == {target.name: target.arguments for target in EXTENSION}


@pytest.mark.parametrize("target", CALLED, ids=str)
def test_the_good_values_are_taken(target: Target, group: tuple[int, str]) -> None:
    values = target.good()
    if target.name == "cap_cuda_device" and not _C.cuda:
        with pytest.raises(RuntimeError, match="built without CUDA"):
            target.call(**values)
        return
    target.call(**values | ({"group_name": group[1]} if "group_name" in values else {}))


@pytest.mark.parametrize("grad", [False, True], ids=["nograd", "grad"])
@pytest.mark.parametrize(
    ("target", "argument"),
    [pytest.param(t, argument, id=f"{t.name}-{argument}") for t in CALLED for argument in t.arguments],
)
def test_a_bad_argument_is_refused(target: Target, argument: str, grad: bool, group: tuple[int, str]) -> None:
    isa = _C.cpu_isa()
    wrong = {}
    for row in bad_values.bad_values(target, argument):
        values = target.good() | ({"group_name": group[1]} if "group_name" in target.arguments else {})
        if grad and argument != "mean_grads":
            values.pop("mean_grads", None)  # with which the operator has no derivative
        values[argument] = row.make()
        for leaf in {"input", "weight"} & set(values) if grad else ():
            if leaf != argument:
                values[leaf].requires_grad_()
        complaint = complaint_about(target, argument, row, values)
        if complaint:
            wrong[row.id] = complaint
    assert wrong == {}
    assert _C.cpu_isa() == isa


@pytest.mark.parametrize("target", [target for target in CALLED if target is not HELD], ids=str)
def test_missing_and_unknown_arguments_are_refused(target: Target) -> None:
    values = target.good()
    required = [key for key in values if not has_default(target, key)]
    for key in required:
        with pytest.raises(ORDINARY, match=rf"\b{key}\b"):
            target.call(**{k: v for k, v in values.items() if k != key})
    with pytest.raises(ORDINARY, match=r"nonsense|at most"):
        target.call(**values, nonsense=1)
    with pytest.raises(ORDINARY, match=r"argument|without CUDA"):
        target.call(*values.values(), *[1] * (1 + len(target.arguments)))


def has_default(target: Target, argument: str) -> bool:
    if target.name.startswith("operator"):
        return next(a for a in target.call.default._schema.arguments if a.name == argument).has_default_value()
    if target.name.startswith("function"):
        return inspect.signature(target.call).parameters[argument].default is not inspect.Parameter.empty
    return argument in ("residual", "lengths", "mask", "sms", "shared_per_block", "max_cluster", "max_row_bytes")
