"""Fixtures and options of the whole suite; marks.py has the parametrisations.

`device` is where a test's tensors are: the CPU, a GPU where there is one, and, for tests marked `kernels`, the CPU with
the CUDA kernels in emulation below bnext's operators.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest
import torch
import torch_warnings
from cases import seed
from marks import GPUS, SIMT
from processes import Pool
from simt.device import emulated
from torch import distributed

import bnext

# Packages that only tests of the benchmark, of the tuning study and of other libraries' models need.
OPTIONAL_PACKAGES = ("matplotlib", "optuna", "pandas", "rich", "sklearn", "sqlalchemy", "timm", "torchvision")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # What is `not_emulated` is removed from the emulated tests, so that it does not count as deselected.
    items[:] = [item for item in items if not {"simt", "not_emulated"} <= {m.name for m in item.iter_markers()}]
    # Slow tests come first, so that none starts when the other processes have finished; in reverse order, since the
    # slowest are collected last.
    slow = [item for item in items if item.get_closest_marker("slow")]
    items[:] = [*reversed(slow), *(item for item in items if not item.get_closest_marker("slow"))]
    if not config.getoption("--long"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="takes minutes; --long runs it"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip the tests of a file that imports an optional package which is not installed."""
    report = yield
    missing = re.search(rf"No module named '({'|'.join(OPTIONAL_PACKAGES)})\b", str(report.longrepr))
    if report.failed and missing is not None:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: needs {missing[1]}, which is not installed")
    return report


def pytest_collection_finish() -> None:
    # Tests are a million objects that live to the end. Each collection would take half a second to traverse them, and
    # leak tests, fused models and torch's compiler collect often.
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernels: its `device` is also the emulated one")
    config.addinivalue_line("markers", "not_emulated: not in emulation, although its file is marked `kernels`")
    config.addinivalue_line("markers", "simt: runs CUDA kernels in emulation (deselect with -m 'not simt')")
    config.addinivalue_line("markers", "gpu: runs on a GPU (select with -m gpu)")
    config.addinivalue_line("markers", "long: only with --long, since these tests take minutes together")
    config.addinivalue_line("markers", "slow: takes several seconds (deselect with -m 'not slow')")
    for line in torch_warnings.pytest_lines():
        config.addinivalue_line("filterwarnings", line)
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        # More threads than cores would wait for each other. A test about threads sets a number of its own.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        simt = [SIMT] if metafunc.definition.get_closest_marker("kernels") else []
        metafunc.parametrize("device", ["cpu", *GPUS, *simt], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "simt":
        yield request.param
        return
    with emulated():
        yield "cpu"


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    """Each test has random numbers of its own, independent of the order of tests."""
    seed(zlib.crc32(request.node.nodeid.split("/")[-1].encode()))


@pytest.fixture(params=bnext._C.cpu_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with each instruction set that this machine has."""
    before = bnext._C.cpu_isa()
    bnext._C.set_cpu_isa(request.param)
    assert bnext._C.cpu_isa() == request.param
    yield request.param
    bnext._C.set_cpu_isa(before)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Starts and ends without compiled code."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs this interpreter with these arguments and the bnext under test."""
    root = str(Path(bnext.__file__).resolve().parents[1])

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        return subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.fixture
def check_script(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., None]:
    """Runs code that must print "done", and neither a warning nor anything else."""

    def check(code: str, *options: str, **environment: str) -> None:
        done = run_python("-W", "error", *options, "-c", code, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")

    return check


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], Pool]]:
    """Gives the pool of a size, which the whole session shares."""
    by_size: dict[int, Pool] = {}
    try:
        yield lambda size: by_size.setdefault(size, Pool(size))
    finally:
        for pool in by_size.values():
            pool.close()


@pytest.fixture
def short_lived() -> Iterator[Callable[..., Pool]]:
    """Makes pools for one test, with a timeout of their groups."""
    created: list[Pool] = []

    def make(size: int, group_timeout: float = 30.0) -> Pool:
        created.append(Pool(size, group_timeout))
        return created[-1]

    yield make
    for pool in created:
        pool.close()


@pytest.fixture(scope="module")
def group() -> Iterator[tuple[int, str]]:
    """A process group of this process alone, whose collectives return their input."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield 1, distributed.group.WORLD.group_name
    distributed.destroy_process_group()
