"""Which batch norms of a model take an activation over, and what changes for it.

Every place is looked at from where a layer can be called: the forward of each module that holds it, read in its trace
(:mod:`bnext.tracing`), and its slot in an ``nn.Sequential``. A layer is fused where all of them want the same, and
nothing else can be seen to call it; otherwise it stays, and the report has the reason.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import fx, nn

from bnext import forwards, patterns, sources, tracing
from bnext.activations import Act
from bnext.patterns import Match

_ADDED = "_added_by_convert"


@dataclass
class Report:
    """What :func:`fuse` did: (name, what) and (name, why not)."""

    fused: list[tuple[str, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    alone: int = 0  # batch norms that were seen to have no activation behind them

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} batch norm(s):", *(f"  {name}: {what}" for name, what in self.fused)]
        if self.left:
            lines += ["left as it was:", *(f"  {name}: {why}" for name, why in self.left)]
        if self.alone:
            lines.append(f"{self.alone} batch norm(s) have no activation behind them")
        return "\n".join(lines)


class _Left(Exception):  # noqa: N818 - an answer, not an error
    """Why a layer is not fused."""


@dataclass
class _Slot:
    """The place of the activation right behind a batch norm, in a Sequential."""

    parent: nn.Module
    key: str
    activation: nn.Module
    act: Act


class _Owner(NamedTuple):
    """A module whose forward can call a layer, under a path that begins with ``name``."""

    module: nn.Module
    name: str
    depth: int
    in_sequential: bool


class _Trace:
    """The forward of a module, and the Sequentials that it is seen through."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.inlined: list[nn.Module] = []
        self.graph = patterns.Graph(module, tracing.trace(module))
        for match in self.graph.matches():
            tail = self.graph.module(match.bn)
            while tail is not None and patterns.is_sequential(tail):
                self.inlined.append(tail)
                tail = tail[-1]  # type: ignore[index]
        if self.inlined:
            self.graph = patterns.Graph(module, tracing.trace(module, self.inlined))
        self.matches = {match.bn: match for match in self.graph.matches()}
        self.wanted: list[Match] = []


def fuse(model: nn.Module) -> Report:
    """Fuse what can be; every layer of a known class is bnext's already."""
    undo(model)
    return _Fusion(model).run()


def undo(model: nn.Module) -> list[str]:
    """Take back all that :func:`fuse` did; what it gives back are the names of activated layers it did not make."""
    strangers = []
    plain = {fused: layer for layer, fused in patterns.LAYERS.items()}
    for name, module in list(model.named_modules()):
        if forwards.is_generated(type(module)):
            module.__class__ = forwards.original(type(module))
        if type(module) in plain and not patterns.fusible(module):
            if _ADDED not in module.__dict__:
                strangers.append(name)
                continue
            for key in module.__dict__.pop(_ADDED):
                module.__dict__.pop(key, None)
            module.__class__ = plain[type(module)]
        for key, child in module._modules.items():
            if isinstance(child, forwards.FusedActivation):
                child.activation.training = child.training
                module._modules[key] = child.activation
    return strangers


class _Fusion:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.report = Report()
        self.classes = {type(m) for m in model.modules()}
        self.names = {id(m): name or "(the module itself)" for name, m in model.named_modules()}
        self.parents: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for key, child in parent._modules.items():
                if child is not None:
                    self.parents.setdefault(id(child), []).append((parent, key))
        self.owners: dict[int, list[_Owner]] = {}
        self.traces: list[_Trace] = []
        self.refused: dict[int, str] = {}

    def run(self) -> Report:
        for name, module in self.model.named_modules():
            if not _is_container(module):
                self._look_at(name or "(the module itself)", module)
        for module in self.model.modules():
            if patterns.fusible(module):
                self._decide(module)
        for trace in self.traces:
            self._rewrite(trace)
        return self.report

    def _look_at(self, name: str, module: nn.Module) -> None:
        """Trace the forward of a module that calls batch norms, and note what it holds."""
        cls = type(module)
        holds = False
        for path, child, in_sequential in _within(module):
            if patterns.fusible(child) or patterns.is_sequential(child):
                first, *others = path.split(".")
                owner = _Owner(module, first, len(others) + 1, in_sequential)
                self.owners.setdefault(id(child), []).append(owner)
                holds = holds or patterns.fusible(child)
        if not holds and not sources.mentions_batch_norm(cls):
            return
        try:
            if type(cls) is not type or any("__init_subclass__" in vars(c) for c in cls.__mro__[:-1]):
                raise tracing.Refused("belongs to a class that watches its subclasses")
            if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
                raise tracing.Refused("belongs to a class with a pickle format of its own")
            trace = _Trace(name, module)
            _generated(trace)  # refused now rather than when layers have changed
            self.traces.append(trace)
        except tracing.Refused as reason:
            self.refused[id(module)] = f"forward of {cls.__name__} {reason}"
            self.report.left.append((name, self.refused[id(module)]))

    def _decide(self, layer: nn.Module) -> None:
        name = self.names[id(layer)]
        try:
            slots, matches = self._sites(layer)
            if not slots and not matches:
                owners = self.owners.get(id(layer), [])
                self.report.alone += all(id(owner.module) not in self.refused for owner in owners)
                return
            if patterns.hooked(layer):
                raise _Left("it has hooks or a forward of its own")
            for slot in slots:
                self._check_slot(slot, {match.activation for _, match in matches})
        except _Left as reason:
            self.report.left.append((name, str(reason)))
            return
        _set_act(layer, slots[0].act if slots else matches[0][1].act)
        for slot in slots:
            slot.parent._modules[slot.key] = forwards.FusedActivation(slot.activation)
        for trace, match in matches:
            trace.wanted.append(match)
        what = {str(match) for _, match in matches} | {f"bn -> {patterns.label(slot.act)}" for slot in slots}
        self.report.fused.append((name, ", ".join(sorted(what))))

    def _sites(self, layer: nn.Module) -> tuple[list[_Slot], list[tuple[_Trace, Match]]]:
        """Every place that calls the layer; none where nothing could be fused.

        Raises:
            _Left: they want different things, or not all can be seen.
        """
        slots: list[_Slot] = []
        matches: list[tuple[_Trace, Match]] = []
        alone = False
        for parent, key in self.parents.get(id(layer), []):
            if patterns.is_sequential(parent) and self._runs_whole(parent):
                slot = _slot(parent, key)
                alone = alone or slot is None
                slots += [slot] if slot is not None else []
        for trace in self.traces:
            for node, module in trace.graph.calls():
                if module is layer and node in trace.matches:
                    matches.append((trace, trace.matches[node]))
                elif module is layer and node in trace.graph.left:
                    raise _Left(trace.graph.left[node])
                elif module is layer:
                    alone = True
        if not slots and not matches:
            return [], []
        if alone or len({slot.act for slot in slots} | {match.act for _, match in matches}) > 1:
            raise _Left("it is called in several places, which want different activations")
        self._check_owners(layer, matches)
        return slots, matches

    def _check_owners(self, layer: nn.Module, matches: list[tuple[_Trace, Match]]) -> None:
        owners = self.owners.get(id(layer), [])
        for parent, _ in self.parents.get(id(layer), []):
            if not patterns.is_sequential(parent) and not owners:
                raise _Left("no forward that calls it can be seen")
        for owner in owners:
            if not owner.in_sequential and id(owner.module) in self.refused:
                raise _Left(f"the {self.refused[id(owner.module)]}")
        for trace, match in matches:
            if match.act == "relu" and match.sum is None:
                continue  # doing it twice is doing it once
            names = {part for part in str(match.bn.target).split(".") if not part.isdecimal()}
            methods = sources.calling_methods(type(trace.module), names)
            if methods:
                raise _Left(f"{methods[0]}() calls it, and may itself be called from elsewhere")
            for cls in self.classes:
                methods = sources.reaching_methods(cls, names)
                if methods:
                    raise _Left(f"{cls.__name__}.{methods[0]}() may call it")

    def _runs_whole(self, sequential: nn.Module) -> bool:
        """Whether a Sequential may be called as such, rather than only be seen through in traces."""
        registered = self.parents.get(id(sequential), [])
        if len(registered) != 1:
            return True
        if patterns.is_sequential(registered[0][0]):
            return self._runs_whole(registered[0][0])
        owners = {id(owner.module) for owner in self.owners.get(id(sequential), [])}
        traces = [trace for trace in self.traces if id(trace.module) in owners]
        inlined = [trace for trace in traces if any(m is sequential for m in trace.inlined)]
        return not owners or len(inlined) != len(owners)

    def _check_slot(self, slot: _Slot, consumed: set[fx.Node]) -> None:
        """Nothing may call the activation in this slot, or stop before it, that is not fused."""
        for trace in self.traces:
            for node, _ in trace.graph.calls():
                path, _, key = str(node.target).rpartition(".")
                in_slot = key == slot.key and trace.module.get_submodule(path) is slot.parent
                if in_slot and node not in consumed:
                    raise _Left("the activation behind it is called from elsewhere, too")
        for owner in self.owners.get(id(slot.parent), []):
            traced = {type(trace.module) for trace in self.traces} - {type(owner.module)}
            if id(owner.module) not in self.refused:
                traced.add(type(owner.module))
            for cls in self.classes:
                methods = sources.stepping_methods(
                    cls, owner.name, owner.depth, skip="forward" if cls in traced else ""
                )
                if methods:
                    raise _Left(f"{cls.__name__}.{methods[0]}() takes the Sequential that holds it apart")

    def _rewrite(self, trace: _Trace) -> None:
        functions = trace.graph.functions()
        wanted = [*trace.wanted, *(m for m in trace.matches.values() if m.bn in functions)]
        fused = {match.bn for match in wanted}
        for match in wanted:
            if match.bn in functions:
                self.report.fused.append((trace.name, str(match).replace("bn", "F.batch_norm", 1)))
        for node in functions:
            if node not in fused:
                self.report.fused.append((trace.name, "F.batch_norm -> bnext.functional.batch_norm"))
                if node in trace.graph.left:
                    self.report.left.append((trace.name, f"F.batch_norm: {trace.graph.left[node]}"))
        if wanted or functions:
            patterns.rewrite(trace.graph.graph, wanted, lambda node: node.op == "call_module")
            trace.module.__class__ = forwards.with_forward(type(trace.module), *_generated(trace))


def _generated(trace: _Trace) -> tuple[str, dict[str, object]]:
    """The source of a trace's graph, and what its global names mean.

    Raises:
        Refused: a copy of the module in another process would not find one of them.
    """
    code = trace.graph.graph.python_code("self")
    used = _names(compile(code.src, "<forward>", "exec", dont_inherit=True))
    names = {name: value for name, value in code.globals.items() if name in used}
    for value in names.values():
        module = sys.modules.get(getattr(value, "__module__", None) or "")
        if (
            not isinstance(value, types.ModuleType)
            and getattr(module, getattr(value, "__name__", ""), None) is not value
        ):
            raise tracing.Refused(f"calls {value!r}, which cannot be found by its name")
    return code.src, names


def _names(code: types.CodeType) -> set[str]:
    return {*code.co_names}.union(*(_names(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _is_container(module: nn.Module) -> bool:
    return type(module) in (nn.ModuleList, nn.ModuleDict) or patterns.is_sequential(module)


def _within(module: nn.Module, prefix: str = "", in_sequential: bool = False) -> Iterator[tuple[str, nn.Module, bool]]:
    """What a forward can call without passing through another's: (path, module, whether it is in a Sequential)."""
    for key, child in module._modules.items():
        if child is not None:
            yield prefix + key, child, in_sequential
            if _is_container(child):
                yield from _within(child, f"{prefix}{key}.", in_sequential or patterns.is_sequential(child))


def _slot(parent: nn.Module, key: str) -> _Slot | None:
    keys = list(parent._modules)
    following = keys[keys.index(key) + 1 :]
    activation = parent._modules[following[0]] if following else None
    act = patterns.activation_of(activation) if activation is not None else None
    if activation is None or act is None:
        return None
    if patterns.hooked(activation):
        raise _Left("the activation behind it has hooks")
    return _Slot(parent, following[0], activation, act)


def _set_act(layer: nn.Module, act: Act) -> None:
    before = set(layer.__dict__)
    layer.__class__ = patterns.LAYERS[type(layer)]
    layer.act = act  # type: ignore[assignment]
    layer.__dict__[_ADDED] = tuple(sorted(set(layer.__dict__) - before))
