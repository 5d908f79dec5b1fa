"""The interpreter is interrupted, or ends, while bnext computes or holds memory."""

from __future__ import annotations

import gc
import inspect
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import torch
from marks import FORK_WARNING, needs_fork
from outputs import MIB, in_new_process
from torch import Tensor, nn

import bnext
from bnext import _C


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(x)
    return [y.detach(), leaf.grad]


def train_and_interrupt() -> None:
    # A shell starts its background jobs with SIGINT ignored, and the tests may run in one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for shape in ((5, 4, 3, 3), (34, 4, 256, 256)):  # the outputs of the second are cached
        layer, x = bnext.BatchNormAct2d(4, act="silu"), torch.randn(shape)
        expected = step(layer, x)
        caught = 0
        for i in range(12):
            # A thread sends the signal, so that it comes at any point of a step, in the operators too.
            timer = threading.Timer(0.02 + 0.003 * i, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:
                    step(layer, x)
            except KeyboardInterrupt:
                caught += 1
            assert all(map(torch.equal, step(layer, x), expected))
            assert all(bool(t.isfinite().all()) for t in layer.state_dict().values())
        assert caught == 12
    # What the interrupted steps held is free again.
    gc.collect()
    cached = _C.cached_bytes()
    assert 34 * MIB <= cached <= _C.max_cached_bytes()
    step(layer, x)
    assert _C.cached_bytes() == cached


@needs_fork
def test_interrupted_training_goes_on() -> None:
    in_new_process(train_and_interrupt)


EXITS = {
    "with graphs": """
        layer = bnext.BatchNormAct2d(4, act="gelu")
        y = layer(small, small.detach())
        first = torch.autograd.grad(y.sum(), small, create_graph=True)
        cycle = bnext.BatchNorm2d(4)(small)
        cycle.itself = cycle
        cycle.grad_fn.metadata["output"] = cycle
        hooked = bnext.BatchNorm2d(4)(small)
        hooked.register_hook(lambda g: hooked * g)
        hooked.grad_fn.register_hook(lambda *gs: None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t,), lambda t: t[0]):
            packed = bnext.BatchNorm2d(4)(small)
        model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        converted = bnext.convert(model, fuse=True)(small)
    """,
    "with large outputs": """
        bnext.BatchNorm2d(4)(large)
        sys.modules["held"] = bnext.BatchNorm2d(4)(large)
        outputs = [bnext.BatchNorm2d(4)(large)]
        atexit.register(outputs.clear)
        atexit.register(lambda: step(bnext.BatchNorm2d(4)))
        if os.fork():
            assert os.wait()[1] == 0
            os._exit(0)  # the fork goes on
        torch.set_num_threads(1)
    """,
    "with threads": """
        layer, ready = bnext.BatchNorm2d(4), threading.Barrier(3)
        def work(waits):
            local = layer(small), step(layer)
            ready.wait()
            if waits:
                time.sleep(1000)
            for i in range(20):
                local = step(layer)
        threading.Thread(target=work, args=(True,), daemon=True).start()
        threading.Thread(target=work, args=(False,)).start()
        ready.wait()
    """,
    "by sys.exit": """
        y = bnext.BatchNorm2d(4)(large)
        print("by sys.exit")
        sys.exit()
    """,
}
# Each runs in a fork of a process that has imported bnext and computed nothing, and so has no thread yet. The fork runs
# the main module to the end, so that its interpreter ends as any does.
CODE = """
import atexit, os, signal, sys, threading, time
import torch
import bnext

def step(layer):
    y = layer(large)
    y.backward(y.detach())

for name, code in CODES.items():
    if os.fork() == 0:
        signal.alarm(60)
        small = torch.linspace(-2, 3, 5 * 4 * 9).view(5, 4, 3, 3).requires_grad_()
        large = torch.linspace(-2, 3, 34 * 2**18).view(34, 4, 256, 256).requires_grad_()  # whose outputs are cached
        exec(code)
        break
    assert os.wait()[1] == 0, name
else:
    name = "all"
print(name)
"""


@needs_fork
def test_interpreters_end_in_silence(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    codes = {name: inspect.cleandoc(code) for name, code in EXITS.items()}
    done = run_python("-W", "error", "-W", FORK_WARNING, "-c", f"CODES = {codes!r}\n{CODE}")
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, [*EXITS, "all"], "")
