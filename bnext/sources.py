"""What the source of a function shows that a run of it, with stand-ins for its arguments, does not."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from collections.abc import Collection, Iterator

import torch

# Harmless on what a module holds; on an argument they answer for the stand-in.
_INQUIRIES = {"type", "hasattr", "getattr", "id", "callable", "vars", "dir"}
_WRITERS = {"setattr", "delattr", "print", "input", "open", "exec", "eval", "globals", "locals"}
_CHANGES = {"append", "extend", "insert", "update", "setdefault", "pop", "popitem", "popleft", "appendleft", "clear"}
_LOOKS = {"modules", "named_modules", "parameters", "named_parameters", "buffers", "named_buffers"}
_DECORATORS = {"staticmethod", "classmethod", "property"}

_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@functools.lru_cache(maxsize=1024)
def _parse(code: types.CodeType) -> ast.Module | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError):
        return None


def not_traceable(code: types.CodeType) -> str | None:
    """Why a trace through this function would be wrong for other arguments; None where nothing says so."""
    if code.co_name.startswith("<") and code.co_name != "<lambda>":
        return None  # a comprehension: part of its function
    tree = _parse(code)
    if tree is None:
        return f"cannot be checked: {code.co_name} has no source"
    for node in ast.walk(tree):
        reason = _objection(node, code)
        if reason:
            return f"{reason} (line {code.co_firstlineno + getattr(node, 'lineno', 1) - 1})"
    return None


def _objection(node: ast.AST, code: types.CodeType) -> str | None:
    if isinstance(node, (ast.With, ast.AsyncWith)):
        return "has a with block"
    if isinstance(node, ast.Try) or type(node).__name__ == "TryStar":
        return "catches exceptions"
    if isinstance(node, (ast.Global, ast.Nonlocal)):
        return "assigns to names outside of it"
    if isinstance(node, (ast.Yield, ast.YieldFrom, ast.Await)):
        return "is a generator or a coroutine"
    if isinstance(node, ast.Compare) and any(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops):
        if not all(isinstance(side, ast.Constant) or _is_held(side) for side in (node.left, *node.comparators)):
            return "asks whether an argument is None, or which object it is"
    elif isinstance(node, _Function):
        decorators = getattr(node, "decorator_list", [])
        if any(not (isinstance(d, ast.Name) and d.id in _DECORATORS) for d in decorators):
            return "is decorated"
    elif isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
        if isinstance(node, ast.Attribute) or not _is_local(node.value, code):
            return "stores what outlives the call"
    elif isinstance(node, ast.Call):
        return _call_objection(node, code)
    return None


def _call_objection(call: ast.Call, code: types.CodeType) -> str | None:
    if isinstance(call.func, ast.Name):
        if call.func.id in _WRITERS:
            return f"calls {call.func.id}()"
        if call.func.id in _INQUIRIES and not (call.args and _is_held(call.args[0])):
            return f"asks {call.func.id}() of a value"
    elif isinstance(call.func, ast.Attribute) and call.func.attr in _CHANGES and not _is_local(call.func.value, code):
        return "stores what outlives the call"
    return None


def _is_held(node: ast.expr) -> bool:
    """Whether it is ``self`` or reached from there, so no argument."""
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return isinstance(node, ast.Name) and node.id == "self"


def _is_local(node: ast.expr, code: types.CodeType) -> bool:
    return isinstance(node, ast.Name) and node.id in code.co_varnames


def _methods(cls: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Those that are not torch's, and run after the construction."""
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in ("torch", "builtins", "bnext"):
            continue
        for name, value in vars(base).items():
            function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if isinstance(function, types.FunctionType) and name != "__init__":
                yield name, function


def calling_methods(cls: type, names: Collection[str]) -> list[str]:
    """Methods besides ``forward`` that call a submodule of one of these names, as far as can be seen."""
    return [
        method
        for method, tree in _mentioning(cls, names)
        if method != "forward" and (tree is None or any(_calls(node, names) for node in ast.walk(tree)))
    ]


def reaching_methods(cls: type, names: Collection[str]) -> list[str]:
    """Methods that call a submodule of one of these names of another object than ``self``."""
    return [
        method
        for method, tree in _mentioning(cls, names)
        if tree is not None and any(_calls(node, names, of_self=False) for node in ast.walk(tree))
    ]


def stepping_methods(cls: type, name: str, depth: int, *, skip: str = "") -> list[str]:
    """Methods that take a container of this name apart (loop over it, index it), ``depth`` levels deep."""
    return [
        method
        for method, tree in _mentioning(cls, {name})
        if method != skip and (tree is None or _steps(tree, name, depth))
    ]


def _mentioning(cls: type, names: Collection[str]) -> Iterator[tuple[str, ast.Module | None]]:
    for method, function in _methods(cls):
        if _mentions(function.__code__, names):
            yield method, _parse(function.__code__)


def _mentions(code: types.CodeType, names: Collection[str]) -> bool:
    codes = (code, *(c for c in code.co_consts if isinstance(c, types.CodeType)))
    return any(not set(names).isdisjoint(c.co_names) for c in codes)


def _calls(node: ast.AST, names: Collection[str], *, of_self: bool = True) -> bool:
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    while isinstance(called, ast.Subscript):
        called = called.value
    if not isinstance(called, ast.Attribute) or called.attr not in names:
        return False
    return of_self or not (isinstance(called.value, ast.Name) and called.value.id == "self")


def _steps(tree: ast.Module, name: str, depth: int) -> bool:
    """Loops and subscripts, level by level: what a loop over the container binds stands for one of its items."""
    items: set[str] = set()
    for level in range(depth):
        found = [target for node in ast.walk(tree) for target in _items_of(node, name if level == 0 else "", items)]
        if not found:
            return False
        items = {n.id for target in found if target is not None for n in ast.walk(target) if isinstance(n, ast.Name)}
        if any(target is None for target in found):
            # A subscript: its levels are not counted.
            return True
    return True


def _items_of(node: ast.AST, name: str, items: set[str]) -> Iterator[ast.expr | None]:
    """The target of a loop over ``.name`` or over one of the items; None for a subscript of it."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _is_one(node.value, name, items):
        yield None
    if isinstance(node, (ast.For, ast.comprehension)):
        parts = list(ast.walk(node.iter))
        looks = any(isinstance(n, ast.Attribute) and n.attr in _LOOKS for n in parts)
        if not looks and any(_is_one(n, name, items) for n in parts):
            yield node.target


def _is_one(node: ast.AST, name: str, items: set[str]) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == name) or (isinstance(node, ast.Name) and node.id in items)


def mentions_batch_norm(cls: type[torch.nn.Module]) -> bool:
    """Whether some method may call ``torch.nn.functional.batch_norm``."""
    return any(_mentions(function.__code__, {"batch_norm"}) for _, function in _methods(cls))
