"""The interpreter is interrupted, or ends, while bnext computes or holds memory."""

from __future__ import annotations

import inspect
import subprocess
from collections.abc import Callable

from marks import FORK_WARNING, needs_fork, posix_only

SETUP = """
import atexit, gc, os, signal, sys, threading, time
import torch
import bnext
from bnext import _C

# A shell's background jobs, and so whoever runs the tests in one, are born with it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
MIB = 2**20

def step(layer, x):
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    y.backward(x)
    return [y.detach(), leaf.grad]

def same(a, b):
    return all(map(torch.equal, a, b))
"""
TENSORS = """
small = torch.linspace(-2, 3, 5 * 4 * 9).view(5, 4, 3, 3)
large = torch.linspace(-2, 3, 34 * MIB // 4).view(34, 4, 256, 256)  # whose outputs are kept
"""


@posix_only
def test_interrupted_training_goes_on(check_script: Callable[..., None]) -> None:
    code = """
    interrupts = 12
    for x in (small, large):
        layer = bnext.BatchNormAct2d(4, act="silu")
        expected = step(layer, x)
        caught = 0
        for i in range(interrupts):
            # From a thread, so that it comes at any point of a step, in the operators too.
            timer = threading.Timer(0.02 + 0.003 * i, os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:
                    step(layer, x)
            except KeyboardInterrupt:
                caught += 1
            assert same(step(layer, x), expected)
            assert all(bool(t.isfinite().all()) for t in layer.state_dict().values())
        assert caught == interrupts, caught
        # What the interrupted steps held is free again.
        gc.collect()
        assert _C.cached_bytes() <= _C.max_cached_bytes()
        kept = _C.cached_bytes()
        step(layer, x)
        assert _C.cached_bytes() == kept
    print("done")
    """
    check_script(SETUP + TENSORS + inspect.cleandoc(code))


EXITS = {
    "a live graph": """
        layer = bnext.BatchNormAct2d(4, act="gelu")
        y = layer(small.requires_grad_(), small.detach())
        first = torch.autograd.grad(y.sum(), small, create_graph=True)
    """,
    "a cycle": """
        y = bnext.BatchNorm2d(4)(small)
        y.itself = y
        y.grad_fn.metadata["output"] = y
    """,
    "large outputs": """
        kept = bnext.BatchNorm2d(4)(large)
        del kept
        graph = bnext.BatchNorm2d(4)(large.requires_grad_())
        sys.modules["held"] = graph
    """,
    "outputs freed at exit": """
        outputs = [bnext.BatchNorm2d(4)(large)]
        atexit.register(outputs.clear)
        atexit.register(lambda: step(bnext.BatchNorm2d(4), large))
    """,
    "a thread": """
        layer, ready = bnext.BatchNorm2d(4), threading.Event()
        def work():
            for i in range(20):
                local = step(layer, large if i == 10 else small)
                ready.set()
        threading.Thread(target=work).start()
        ready.wait()
    """,
    "a waiting daemon": """
        layer, ready = bnext.BatchNorm2d(4), threading.Event()
        def work():
            local = step(layer, large), layer(small.requires_grad_())
            ready.set()
            time.sleep(1000)
        threading.Thread(target=work, daemon=True).start()
        ready.wait()
    """,
    "a converted model": """
        model = torch.nn.Sequential(torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        y = bnext.convert(model, fuse=True)(small.requires_grad_())
    """,
    "a hook": """
        y = bnext.BatchNorm2d(4)(small.requires_grad_())
        y.register_hook(lambda g: y * g)
        y.grad_fn.register_hook(lambda *gs: None)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (t,), lambda t: t[0]):
            z = bnext.BatchNorm2d(4)(small)
    """,
    "sys.exit": """
        y = bnext.BatchNorm2d(4)(large.requires_grad_())
        print("sys.exit")
        sys.exit()
    """,
}


@needs_fork
def test_interpreters_end_in_silence(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    # Each in a fork of a process that has imported, and computed nothing: it has no thread yet. Its main module is run
    # to the end, where its interpreter ends as any does.
    codes = {name: TENSORS + inspect.cleandoc(code) for name, code in EXITS.items()}
    code = f"""
held = None
for name, code in {codes!r}.items():
    if os.fork() == 0:
        signal.alarm(60)
        held = name
        break
    assert os.wait()[1] == 0, name
if held:
    exec(code)
print(held)
"""
    done = run_python("-W", "error", "-W", FORK_WARNING, "-c", SETUP + code)
    assert (done.returncode, done.stdout.splitlines(), done.stderr) == (0, [*EXITS, "None"], "")
