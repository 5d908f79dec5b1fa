"""Calls that raise, that dynamo cannot capture, or that come from several threads; garbage collections during calls."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from networks import assert_close
from observe import Net, assert_fuses, assert_same_steps, count, fused_names, pair, sequential, small
from torch import Tensor, nn

import bnext

X = torch.linspace(-9, 6, 120, dtype=torch.float64).sin().view(2, 3, 5, 4)


class Fails(Net):
    when = "never"

    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        if self.when == "before":
            raise LookupError("before")
        y = F.relu(self.bn(x))
        if self.when == "behind":
            raise LookupError("behind")
        return y


@pytest.mark.parametrize("when", ["before", "behind"])
@pytest.mark.parametrize("first", [True, False], ids=["in the first call", "later"])
def test_an_exception_of_the_forward_comes_out_once(first: bool, when: str) -> None:
    original, fused = pair(Fails)
    if not first:
        assert_same_steps(original, fused, X, modes=("training",))
    original.when = fused.when = when
    for _ in range(2):
        for model in (original, fused):
            with pytest.raises(LookupError, match=when):
                model(X)
    assert fused.calls == original.calls
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    original.when = fused.when = "never"
    assert_same_steps(original, fused, X, modes=("training",))
    assert_fuses(original, fused, X)


def test_errors_of_the_layers_are_torchs() -> None:
    original, fused = pair(Net.with_forward(lambda self, x: F.relu(self.bn(self.conv(x)))))
    bnext.convert(original)  # since torch's layers count batches that raise, too
    for bad in (torch.randn(2, 4, 5, 5).double(), torch.randn(2, 3, 5, 5), torch.randn(3).double()):
        errors = []
        for model in (original, fused):
            with pytest.raises((RuntimeError, ValueError)) as caught:
                model(bad)
            errors.append((type(caught.value), str(caught.value).splitlines()[0]))
        assert errors[1] == errors[0]
    for model in (original, fused):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.randn(1, 3, 1, 1).double())
    assert_close(list(fused.buffers()), list(original.buffers()), "buffers")
    assert_same_steps(original, fused, X, modes=("training",))
    assert_fuses(original, fused, X)


def test_a_model_that_cannot_be_captured_runs_unfused_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Uncapturable(Net):
        @torch._dynamo.disable
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.bn(x))

    original, fused = pair(Uncapturable)
    with caplog.at_level(logging.WARNING):
        assert_same_steps(original, fused, X)
    said = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [r.name for r in said] == ["bnext"], [r.getMessage() for r in said]
    assert fused_names(fused) == []
    assert count(fused.train()(X)) == 1


def test_a_callback_of_the_garbage_collector_does_not_prevent_fusing() -> None:
    """Python calls it in the middle of a forward that dynamo captures, but it is no part of the forward."""

    def callback(phase: str, info: dict[str, int]) -> None:
        with warnings.catch_warnings():
            pass

    gc.callbacks.append(callback)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        original, fused = pair(Fails)
        assert_fuses(original, fused, X)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(callback)


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of the calls, which all start at once."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("same", [True, False], ids=["one model", "copies"])
def test_first_calls_in_several_threads(same: bool) -> None:
    original, fused = pair()
    fused.eval()
    models = [fused] * 4 if same else [copy.deepcopy(fused) for _ in range(4)]
    inputs = [small() for _ in models]
    outputs = in_threads([lambda m=m, x=x: m(x) for m, x in zip(models, inputs, strict=True)])
    for output, x in zip(outputs, inputs, strict=True):
        assert_close(output, original.eval()(x), "output")
    assert_fuses(original, fused, small())


def test_models_of_several_threads_are_reported_each_by_itself() -> None:
    models = [bnext.convert(sequential(act=act), fuse=True) for act in (nn.ReLU(), nn.SiLU(), nn.GELU())]
    x = torch.randn(2, 3, 4, 4)
    for _ in range(2):  # a call beside a compilation may run unfused
        in_threads([lambda m=m: m(x) for m in models])
    for model in models:
        model(x)
    whats = [[what for _, what in bnext.fusion_report(m).fused] for m in models]
    assert whats == [["batch norm -> relu"], ["batch norm -> silu"], ["batch norm -> gelu"]]
