"""``torch.fx`` traces that tell the truth, or a reason why there is none.

fx runs a forward once, with stand-ins for its inputs, and takes down what happened to them. What the forward decides
by anything else is frozen without a word: a test of an argument against None, a flag, a ``with`` block, a number
drawn, a counter raised. A trace is returned only where none of this was seen, neither in the sources of the functions
that ran nor in what they left behind, and where the traces in training and evaluation, with gradients and without,
are one. Nothing that a module holds is different afterwards.

What stays frozen is the value of plain attributes that the forward reads, such as ``self.drop_rate``.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import operator
import os
import sys
import sysconfig
import types
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import Attribute, TraceError

from bnext import snapshot, sources

_TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep

# Who may ask a stand-in what it is: fx itself, and what fx asks through.
_INSIDERS = tuple(_TORCH + path for path in ("fx" + os.sep, "utils/_pytree.py", "overrides.py"))


class Refused(Exception):  # noqa: N818 - an answer, not an error
    """The message says, of the module's forward, why its trace cannot be trusted."""


def trace(module: torch.nn.Module, inlined: Collection[torch.nn.Module] = ()) -> fx.Graph:
    """The graph of a module's forward.

    Its submodules are called as they are, except ``inlined``, whose own submodules are. A constant that follows
    ``module.training`` is a node that reads it.

    Raises:
        Refused: a graph would not be the whole truth.
    """
    _check_signature(module)
    graph = _run(module, inlined, own=True, others=True, grad=True)
    evaluation = _run(module, inlined, own=False, others=True, grad=True)
    flags = _merge(graph, evaluation, "does something else in training than in evaluation")
    for others, grad in ((False, True), (True, False)):
        other = _run(module, inlined, own=True, others=others, grad=grad)
        reason = "depends on the mode of its submodules or on whether gradients are wanted"
        if _merge(graph, other, reason):
            raise Refused(reason)
    for node, args, kwargs in flags:
        with graph.inserting_before(node):
            flag = graph.create_node("get_attr", "training")
        node.args, node.kwargs = _fill(args, flag), _fill(kwargs, flag)
    _check_in_place(graph)
    for node in graph.nodes:
        node.type = None  # annotations name what the generated code would not find
    return graph


def _check_signature(module: torch.nn.Module) -> None:
    forward = type(module).forward
    if "forward" in module.__dict__:
        raise Refused("is an attribute of the instance")
    if not isinstance(forward, types.FunctionType) or hasattr(forward, "__wrapped__"):
        raise Refused("is not a plain function")
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.kind is not parameter.POSITIONAL_OR_KEYWORD:
            raise Refused(f"takes *args, **kwargs or a keyword-only parameter ({parameter})")
        if parameter.default is not parameter.empty:
            raise Refused(f"has a parameter with a default ({parameter.name})")


def _run(
    module: torch.nn.Module, inlined: Collection[torch.nn.Module], *, own: bool, others: bool, grad: bool
) -> fx.Graph:
    """One trace, with the training flags of the module and of all below it set, and gradients on or off."""
    printed = io.StringIO()
    ran: dict[types.CodeType, None] = {}
    with _nothing_changes(module), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for m in module.modules():
            m.__dict__["training"] = others
        module.__dict__["training"] = own
        try:
            with (
                contextlib.redirect_stdout(printed),
                contextlib.redirect_stderr(printed),
                torch.set_grad_enabled(grad),
                _observed(type(module).forward.__code__, ran),
            ):
                graph = _Tracer(inlined).trace(module)
        except Exception as error:
            first_line = str(error).strip().split("\n")[0]
            raise Refused(f"cannot be traced: {first_line or type(error).__name__}") from error
    if printed.getvalue() or warned:
        raise Refused("prints or warns")
    for code in ran:
        reason = sources.not_traceable(code)
        if reason:
            raise Refused(reason)
    return graph


@contextlib.contextmanager
def _observed(forward: types.CodeType, ran: dict[types.CodeType, None]) -> Iterator[None]:
    """Collects the code of every function outside torch that the forward runs.

    The garbage collector waits: its callbacks and the finalisers it runs are functions the forward did not ask for.
    """

    def profile(frame: types.FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code in ran or code.co_filename.startswith((_TORCH, _HERE)):
            return
        caller = frame.f_back.f_code if frame.f_back is not None else None
        if code is forward or (ran and (caller in ran or not _is_stdlib(code.co_filename))):
            ran[code] = None

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def _is_stdlib(path: str) -> bool:
    return path.startswith((_STDLIB, "<")) and "-packages" not in path


def _modes() -> tuple[bool, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # a buffer that the forward changes is a node, and not changed by the trace

    def __init__(self, inlined: Collection[torch.nn.Module]) -> None:
        super().__init__()
        self._inlined = {id(m) for m in inlined}
        self._modes = _modes()

    def is_leaf_module(self, m: torch.nn.Module, module_qualified_name: str) -> bool:
        return id(m) not in self._inlined

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _StandIn(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise TraceError("it changes the gradient or autocast mode on the way")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, (dict, list)) and type(a).__module__ != "torch.fx.immutable_collections":
            if type(a) not in (dict, list):
                raise TraceError(f"it makes a {type(a).__name__}")
        elif isinstance(a, Tensor) and not self._is_registered(a):
            raise TraceError("it uses a tensor that is neither a parameter nor a buffer")
        return super().create_arg(a)

    def _is_registered(self, tensor: Tensor) -> bool:
        return any(tensor is t for tensors in (self.root.parameters(), self.root.buffers()) for t in tensors)


def _asked_from_outside() -> bool:
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename == _TORCH + "nn/parameter.py":
        frame = frame.f_back  # isinstance(…, Parameter) is a Python function, for whoever called it
    return frame is None or not frame.f_code.co_filename.startswith(_INSIDERS)


class _StandIn(fx.Proxy):
    """Raises where fx's own would give an answer that is not the tensor's."""

    def _type(self) -> type:
        if _asked_from_outside():
            raise TraceError("it asks for the type of a value")
        return type(self)

    __class__ = property(_type)

    def __hash__(self) -> int:
        if _asked_from_outside():
            raise TraceError("it looks a value up in a table")
        return id(self)

    def __repr__(self) -> str:
        if _asked_from_outside():
            raise TraceError("it makes a string of a value")
        return fx.Proxy.__repr__(self)

    def __getattr__(self, k: str) -> Attribute:
        return _StandInAttribute(self, k)

    def __setattr__(self, k: str, v: object) -> None:
        if _asked_from_outside():
            raise TraceError(f"it sets the attribute {k} of a value")
        object.__setattr__(self, k, v)


class _StandInAttribute(_StandIn, Attribute):
    pass


def _in_place(name: str) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def record(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return record


# fx takes `a += b` for `a = a + b`, which is another thing where `a` has a second name.
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_StandIn, f"__{_name}__", _in_place(_name))


def _check_in_place(graph: fx.Graph) -> None:
    """The generated code of ``c = operator.iadd(a, b)`` is ``a += b; c = a``; where ``a`` is a number that is used
    again, as its old value, that is wrong."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if getattr(node.target, "__module__", "") != "_operator" or not node.target.__name__.startswith("i"):
            continue
        first = node.args[0]
        if (
            node.target.__name__ in _IN_PLACE_NAMES
            and isinstance(first, fx.Node)
            and any(position[user] > position[node] for user in first.users)
        ):
            raise Refused("changes a value in place that it uses again by another name")


_IN_PLACE_NAMES = frozenset(("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"))


class _Flag:
    """Stands for an argument that is True in training and False in evaluation."""


class _DifferentError(Exception):
    pass


def _merge(a: fx.Graph, b: fx.Graph, reason: str) -> list[tuple[fx.Node, Any, Any]]:
    """The nodes of ``a`` with arguments that are True there and False in ``b``, and those arguments with a
    :class:`_Flag` in each such place.

    Raises:
        Refused: the graphs differ in anything else; with this reason.
    """
    matching = dict(zip(a.nodes, b.nodes, strict=False))

    def merge(x: Any, y: Any) -> Any:
        if isinstance(x, fx.Node):
            if matching.get(x) is not y:
                raise _DifferentError
            return x
        if type(x) is not type(y):
            raise _DifferentError
        if isinstance(x, (tuple, list)):
            if len(x) != len(y):
                raise _DifferentError
            return type(x)(merge(i, j) for i, j in zip(x, y, strict=True))
        if isinstance(x, dict):
            if list(x) != list(y):
                raise _DifferentError
            return {key: merge(x[key], y[key]) for key in x}
        if isinstance(x, slice):
            return slice(merge(x.start, y.start), merge(x.stop, y.stop), merge(x.step, y.step))
        if x is True and y is False:
            return _Flag
        if x is not y and repr(x) != repr(y):
            raise _DifferentError
        return x

    flagged = []
    try:
        if len(a.nodes) != len(b.nodes):
            raise _DifferentError
        for x, y in matching.items():
            if (x.op, x.target, x.name) != (y.op, y.target, y.name):
                raise _DifferentError
            args, kwargs = merge(x.args, y.args), merge(x.kwargs, y.kwargs)
            if _holds_flag(args) or _holds_flag(kwargs):
                flagged.append((x, args, kwargs))
    except _DifferentError:
        raise Refused(reason) from None
    return flagged


def _holds_flag(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_flag, value.values()))
    return value is _Flag or (isinstance(value, (tuple, list)) and any(map(_holds_flag, value)))


def _fill(value: Any, flag: fx.Node) -> Any:
    if isinstance(value, dict):
        return {key: _fill(v, flag) for key, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_fill(v, flag) for v in value)
    return flag if value is _Flag else value


@contextlib.contextmanager
def _nothing_changes(module: torch.nn.Module) -> Iterator[None]:
    """Puts back what the module and all below it hold, training flags included, and the states of the global
    random generators.

    Raises:
        Refused: there was something to put back, other than training flags.
    """
    flags = [(m, m.__dict__.get("training")) for m in module.modules()]
    held = [snapshot.held(m.__dict__) for m in module.modules()]
    generators = snapshot.generators()
    try:
        yield
    finally:
        for m, flag in flags:
            m.__dict__["training"] = flag
        changed = [restore() for restore in held]
        drew = [restore() for restore in generators]
    if any(changed):
        raise Refused("changes what its module holds, such as a counter or a cache")
    if any(drew):
        raise Refused("draws random numbers")
