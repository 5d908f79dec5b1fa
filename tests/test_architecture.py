"""Which folders and modules may use which, that kernels use no torch header, and that the stub fits the binary."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import bnext

ROOT = Path(__file__).resolve().parents[1]
CSRC, PACKAGE = ROOT / "csrc", ROOT / "bnext"
SOURCES = {".h", ".inl", ".cpp", ".cuh", ".cu"}

# The folders whose files a folder's files may include.
ALLOWED = {
    "common": {"common"},
    "cpu": {"common", "cpu"},
    "cuda": {"common", "cuda"},
    "tensor": {"common", "cpu", "cuda", "tensor"},
}
KERNELS = ("common", "cpu", "cuda")

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]', re.MULTILINE)
FOREIGN = re.compile(r"^(torch|ATen|c10|caffe2|pybind11|Python\.h)")


def includes(path: Path) -> list[tuple[str, str]]:
    """(bracket, name) of every include."""
    return INCLUDE.findall(path.read_text())


def sources(folder: str) -> list[Path]:
    found = sorted(p for p in (CSRC / folder).rglob("*") if p.suffix in SOURCES)
    assert found, f"csrc/{folder} holds no sources"
    return found


def test_every_source_lies_in_a_folder_of_the_house() -> None:
    assert {path.name for path in CSRC.iterdir()} == set(ALLOWED)


@pytest.mark.parametrize("folder", KERNELS)
def test_kernels_include_no_torch_header(folder: str) -> None:
    for path in sources(folder):
        foreign = [included for _, included in includes(path) if FOREIGN.match(included)]
        assert foreign == [], path.relative_to(ROOT)


# torch 2.11, the oldest that is supported, compiles extensions as C++17. With the headers of a newer torch the tensor
# level cannot be compiled so.
NEWER = {
    "barrier",
    "bit",
    "compare",
    "concepts",
    "coroutine",
    "expected",
    "format",
    "generator",
    "latch",
    "mdspan",
    "numbers",
}
NEWER |= {
    "print",
    "ranges",
    "semaphore",
    "source_location",
    "span",
    "stacktrace",
    "stop_token",
    "syncstream",
    "version",
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_no_header_is_newer_than_cxx17(folder: str) -> None:
    for path in sources(folder):
        assert [name for _, name in includes(path) if name in NEWER] == [], path.relative_to(ROOT)


# Of the instruction sets only one: the files of all include the same.
@pytest.mark.parametrize(
    "source",
    [
        str(path.relative_to(ROOT))
        for path in (*sources("cpu"), *sources("cuda"))
        if path.suffix == ".cpp" and not path.name.startswith("avx")
    ],
)
def test_kernels_are_cxx17(source: str) -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not here")
    command = [compiler, "-std=c++17", "-fsyntax-only", "-fopenmp", source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ALLOWED)
def test_includes_point_towards_common(folder: str) -> None:
    for path in sources(folder):
        for bracket, included in includes(path):
            if bracket == "<":
                continue
            candidates = [path.parent / included, CSRC / included]
            target = next((c.resolve() for c in candidates if c.exists()), None)
            assert target is not None, f"{path.relative_to(ROOT)} includes {included}, which is not there"
            parts = target.relative_to(CSRC).parts
            assert parts[0] in ALLOWED[folder], f"{path.relative_to(ROOT)} includes {included}"


def test_only_backends_know_the_kernels() -> None:
    knowing = {p.name for p in sources("tensor") if any(i.startswith(("../cpu/", "../cuda/")) for _, i in includes(p))}
    # module.cpp reports what was built, output_memory.cpp makes tensors; every call passes through a backend.
    assert knowing == {"cpu_backend.cpp", "cuda_backend.cpp", "module.cpp", "output_memory.cpp"}


@pytest.mark.parametrize("folder", ALLOWED)
def test_includes_have_no_circle(folder: str) -> None:
    """A header and its source count as one file."""
    included: dict[str, set[str]] = {}
    for path in sources(folder):
        own = {Path(i).stem for bracket, i in includes(path) if bracket == '"' and (path.parent / i).exists()}
        included[path.stem] = included.get(path.stem, set()) | own - {path.stem}
    graphlib.TopologicalSorter(included).prepare()


def test_calls_pass_from_autograd_to_the_backends() -> None:
    """Each of these files of csrc/tensor includes none of those after it."""
    order = ["backend", "tensors", "forward", "backward", "dispatcher", "sync", "autograd", "module"]
    for position, name in enumerate(order):
        files = [path for path in sources("tensor") if path.stem == name]
        assert files, f"csrc/tensor/{name}.* is gone"
        for path in files:
            assert {Path(i).stem for bracket, i in includes(path) if bracket == '"'}.isdisjoint(
                order[position + 1 :]
            ), path.name


# Modules and packages by name, and the files of each.
MODULES = {path.stem: [path] for path in sorted(PACKAGE.glob("*.py"))}
MODULES |= {path.parent.name: sorted(path.parent.glob("*.py")) for path in sorted(PACKAGE.glob("*/__init__.py"))}


def imported_modules(name: str) -> set[str]:
    """The other modules of the package that one imports at any level; names taken from the package itself count as
    `__init__`, unless they are modules."""
    return set().union(*map(imported_by, MODULES[name])) - {name}


def imported_by(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "bnext"]
            found |= {n.split(".")[1] if "." in n else "__init__" for n in names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.split(".")[0] != "bnext":
                continue
            inner = module if node.level else module.partition(".")[2]
            if inner:
                found.add(inner.split(".")[0])
            else:
                found |= {a.name if a.name in MODULES or a.name == "_C" else "__init__" for a in node.names}
    return found


def test_python_imports_have_no_circle() -> None:
    graphlib.TopologicalSorter({name: imported_modules(name) & set(MODULES) for name in MODULES}).prepare()


def test_python_imports_point_from_convert_to_functional() -> None:
    order = ["ops", "native", "functional", "modules", "sync", "known", "fusion", "convert"]
    assert set(order) <= set(MODULES)
    for position, name in enumerate(order):
        assert imported_modules(name).isdisjoint({*order[position + 1 :], "__init__", "__main__"}), name
    assert "functional" in imported_modules("modules")
    assert {"modules", "fusion"} <= imported_modules("convert")


# Prints the attributes of torch's modules and classes that were replaced while bnext was imported. Two are replaced on
# purpose, to see that a patch is noticed, and no others may be. A module that is imported meanwhile becomes a new
# attribute, and replaces none.
IMPORT = """
import sys
import torch, torch.distributed, torch.nn.parallel

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] != "torch" or module is None:
            continue
        found.update({(name, key): value for key, value in list(vars(module).items())})
        for each in list(vars(module).values()):
            # isinstance() reads __class__, at which torch's deprecated objects warn.
            if issubclass(type(each), type) and each.__module__ == name:
                found.update({(f"{name}.{each.__qualname__}", key): value for key, value in list(vars(each).items())})
    return found

before = attributes()
torch.nn.parallel.DistributedDataParallel.forward = torch.relu = lambda *args: None
import bnext
after = attributes()
for place, value in before.items():
    if callable(value) and after.get(place) is not value:
        print(".".join(place))
assert not torch.cuda.is_initialized()
assert "torch._inductor" not in sys.modules
bnext.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), fuse=True)
assert sys.modules.keys().isdisjoint({"timm", "torchvision", "detectron2"})
"""


def test_import_is_quiet_and_patches_nothing(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The import loads no compiler either, and a conversion none of the libraries whose layers it knows."""
    done = run_python("-W", "error", "-c", IMPORT)
    planted = {"torch.nn.parallel.distributed.DistributedDataParallel.forward", "torch.relu"}
    assert (done.returncode, set(done.stdout.split()), done.stderr) == (0, planted, "")


def test_stub_agrees_with_the_binary() -> None:
    stub = ast.parse((PACKAGE / "_C.pyi").read_text()).body
    constants = [node.target.id for node in stub if isinstance(node, ast.AnnAssign)]
    callables = [node.name for node in stub if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    binary = {name: callable(getattr(bnext._C, name)) for name in dir(bnext._C) if not name.startswith("_")}
    assert dict.fromkeys(callables, True) | dict.fromkeys(constants, False) == binary
    owners = {bnext._C: stub} | {getattr(bnext._C, n.name): n.body for n in stub if isinstance(n, ast.ClassDef)}
    for owner, body in owners.items():
        functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
        if isinstance(owner, type):
            assert {name for name in vars(owner) if not name.startswith("_")} == functions.keys() - {"__init__"}
        for name, node in functions.items():
            # pybind11 writes the signature into the first line of the docstring: "name(a: int) -> str".
            (signature,) = ast.parse(f"def {getattr(owner, name).__doc__.splitlines()[0]}: ...").body
            assert [a.arg for a in signature.args.args] == [a.arg for a in node.args.args], name
            assert ast.unparse(signature.returns) == ast.unparse(node.returns), name
