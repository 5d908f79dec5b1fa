"""Builds the emulated device: the CUDA kernels, the tensor level above them and the emulator, as one shared library;
and beside it `selftest`, a program that tests the emulator.

    python tests/simt/build.py          # prints the library's path; compiles only what changed

The kernels are compiled with the instrumentation of -fsanitize=thread, whose hooks the emulator defines: that is how
it sees every load and store.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
BUILD = ROOT / "build" / "simt"

KERNELS = (
    "csrc/cuda/backward_activated.cu",
    "csrc/cuda/backward.cu",
    "csrc/cuda/forward.cu",
    "csrc/cuda/parts_backward.cu",
    "csrc/cuda/parts_forward.cu",
)
HOST = ("csrc/cuda/counters.cu", "csrc/cuda/limits.cu", "csrc/cuda/launch_plan.cpp", "csrc/cuda/part_plan.cpp")
TENSOR_LEVEL = (
    "csrc/tensor/forward.cpp",
    "csrc/tensor/backward.cpp",
    "csrc/tensor/tensors.cpp",
    "csrc/tensor/checks.cpp",
    "tests/simt/backend_simt.cpp",
)

COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas")
CHECKED_FLAGS = (
    "-O1",
    "-g",
    "-fno-var-tracking",  # findings name lines, and no variables: less to compile
    "-fsanitize=thread",
    "--param tsan-distinguish-volatile=1",
    "--param tsan-instrument-func-entry-exit=0",
)


def emulator_sources() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in SIMT.glob("*.cpp") if p.name != "backend_simt.cpp")


def torch_flags() -> tuple[list[str], list[str]]:
    """The compiler's flags for torch, and the linker's."""
    import torch
    from torch.utils.cpp_extension import include_paths

    library = Path(torch.__file__).parent / "lib"
    include = [f"-isystem {path}" for path in include_paths()]
    return include, [f"-L{library}", f"-Wl,-rpath,{library}", "-lc10", "-ltorch_cpu", "-ltorch"]


def ninja_file(kernels: dict[str, Path], objects: Path | None) -> str:
    """The text of build.ninja. `kernels` maps sources to the copies of the tree that they are compiled from; with any,
    there is no selftest. The other objects are taken from the folder `objects`; if it is None, they are compiled."""
    include, link = torch_flags()
    fake_cuda = f"-I{SIMT / 'include'}"
    common = " ".join(COMMON_FLAGS)
    lines = [
        f"cxx = {os.environ.get('CXX', 'g++')}",
        "rule compile",
        "  command = $cxx -MMD -MF $out.d -x c++ $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = $in",
        "rule link",
        "  command = $cxx -o $out $in $flags -ldl",
        "  description = $out",
    ]
    linked = []

    def add(source: str, flags: str) -> None:
        target = source.replace("/", "-") + ".o"
        if source not in kernels and objects is not None:
            linked.append(str(objects / target))
            return
        linked.append(target)
        lines.append(f"build {target}: compile {kernels.get(source, ROOT) / source}")
        lines.append(f"  flags = {common} {flags}")

    for source in KERNELS:
        add(source, " ".join((*CHECKED_FLAGS, fake_cuda)))
    for source in (*HOST, *emulator_sources()):
        add(source, f"-O2 {fake_cuda}")
    for source in TENSOR_LEVEL:
        add(source, f"-O1 {fake_cuda} {' '.join(include)}")
    lines.append(f"build libbnext_simt.so: link {' '.join(linked)}")
    lines.append(f"  flags = -shared -Wl,-Bsymbolic {' '.join(link)}")
    if kernels:
        return "\n".join([*lines, ""])

    emulator = [source.replace("/", "-") + ".o" for source in emulator_sources()]
    linked.clear()
    add("tests/simt/selftest/driver.cpp", f"-O2 {fake_cuda}")
    for path in sorted((SIMT / "selftest").glob("*.cu")):
        add(str(path.relative_to(ROOT)), " ".join((*CHECKED_FLAGS, fake_cuda)))
    lines.append(f"build selftest: link {' '.join((*linked, *emulator))}")
    return "\n".join([*lines, ""])


def build(folder: Path = BUILD, kernels: dict[str, Path] | None = None, objects: Path | None = None) -> Path:
    """Builds into `folder`; returns the library. Raises RuntimeError with the compiler's output."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
    ninja = [sys.executable, "-m", "ninja", "-C", str(folder), "-j", jobs]
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several processes of tests may find it out of date at once
        content = ninja_file(kernels or {}, objects)
        file = folder / "build.ninja"
        if not file.exists() or file.read_text() != content:
            file.write_text(content)
        done = subprocess.run(ninja, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(ninja)} failed:\n{done.stdout[-6000:]}{done.stderr[-2000:]}")
    return folder / "libbnext_simt.so"


if __name__ == "__main__":
    print(build())
