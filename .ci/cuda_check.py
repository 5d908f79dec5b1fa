"""Compile every CUDA source for three generations of GPU, and read what came out; no GPU is needed.

    python .ci/cuda_check.py            print a table; exit status 1 if a rule is broken
    python .ci/cuda_check.py --update   write loop_steps.json: the current numbers of instructions

Rules: there are no compiler warnings; no kernel spills registers or has a stack frame; the machine code of each kernel
that handles elements moves them by 128-bit loads and stores, does not split vectors in shared memory, and never uses
local memory; on sm_90 the inner loops take as many instructions as loop_steps.json says, within a tenth
(machine_code.py). A lower number must be recorded too, since benchmarks/cuda/predict.py predicts times from it. Each
source is also compiled for the host, as in a build, and the tensor-level file against the installed torch. Without nvcc
the script says so and checks nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from machine_code import Call, Steps, steps

ROOT = Path(__file__).resolve().parents[1]
# The architectures, by the PTX that their machine code is made from. Making PTX takes most of the time, and no source
# has code for sm_100 alone, so the PTX for sm_90 serves it, too.
SHARED_PTX = {"80": ("80",), "90": ("90", "100")}
ARCHITECTURES = tuple(itertools.chain(*SHARED_PTX.values()))
SOURCES = tuple(sorted([*(ROOT / "csrc" / "cuda").glob("*.cu"), *(ROOT / "benchmarks" / "cuda").glob("*.cu")]))
LONGEST = ("backward_activated", "backward", "forward")  # to compile, so they come first
TENSOR_LEVEL = ROOT / "csrc" / "tensor" / "cuda_backend.cpp"
# The register file: two blocks of 256 threads on an SM.
MAX_REGISTERS = 128

COUNTED = "90"
# With this PTX nvcc makes the object files that a build makes, which compiles each source for the host, too.
WHOLE = "90"

# Instructions for a step of 16 bytes of each input, by kernel: request, reduce, map. At an H200's memory rate there is
# time for 249, 373, 373 and 498 instructions for 16-bit data, in the order of CALLS.
STEPS_FILE = Path(__file__).with_name("loop_steps.json")
STEPS_TOLERANCE = 0.1

# The calls that are counted, by reduction and map. With an activation there is a residual, which forward loads in its
# map, and a mask, which forward stores and backward reads. Kernels without sums are not counted.
CALLS = {
    "MomentSums, Normalize": Call(copies=1, stores=1),
    "GradSums, GradInput": Call(copies=2, stores=1),
    "MomentSums, ActivatedNormalize": Call(copies=1, stores=2),
    "ActivatedGradSums, ActivatedGrad": Call(copies=3, stores=2),
}
COUNTED_KERNELS = len(CALLS) * 2 * 3  # kinds of tiles, dtypes


class Kernel(NamedTuple):
    """What ptxas and the disassembler report for one kernel and architecture."""

    name: str
    architecture: str
    registers: int
    stack: int
    spills: int
    wide_loads: int
    wide_stores: int
    local: int
    narrow_shared: int
    steps: Steps | None  # of the kernels that CALLS names, on COUNTED

    @property
    def faults(self) -> list[str]:
        found = []
        if self.stack or self.spills:
            found.append(f"{self.stack} bytes of stack, {self.spills} of spills")
        if self.local > 0:
            found.append(f"{self.local} accesses to local memory")
        if self.registers > MAX_REGISTERS:
            found.append(f"{self.registers} registers")
        if "batch_norm_kernel" in self.name and 0 in (self.wide_loads, self.wide_stores):
            found.append(f"{self.wide_loads} loads and {self.wide_stores} stores of 128 bits")
        if self.narrow_shared > 0:
            found.append(f"{self.narrow_shared} loads of less than 32 bits from shared memory")
        if self.steps is not None:
            for phase, count, before in zip(Steps._fields, self.steps, self.expected_steps, strict=True):
                if count <= 0 or abs(count - before) > STEPS_TOLERANCE * before:
                    found.append(
                        f"{count:.1f} instructions a step in its loop to {phase}, expected about {before:.1f} "
                        "(--update writes down what there are)"
                    )
        return found

    @property
    def expected_steps(self) -> Steps:
        return Steps(*json.loads(STEPS_FILE.read_text()).get(self.name, (0.0, 0.0, 0.0)))


def functors(name: str) -> str:
    """A kernel's reduction and map."""
    return ", ".join(name.partition("<")[2].rstrip(">").split(", ")[2:4])


def count_steps(name: str, architecture: str, sass: str | None) -> Steps | None:
    call = CALLS.get(functors(name))
    if sass is None or call is None or architecture != COUNTED or "<double" in name:
        return None
    return steps(sass, call)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    return next(filter(None, map(shutil.which, [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc"])), None)


def find_disassembler() -> str | None:
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia"
    inside = sorted(str(path) for path in packaged.glob("*/bin/nvdisasm"))
    return next(filter(None, map(shutil.which, [*inside, "nvdisasm", "/usr/local/cuda/bin/nvdisasm"])), None)


def demangled(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    output = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return output.splitlines()


def short(name: str) -> str:
    """batch_norm_kernel<float, BackwardOp, GradSums, GradInput, kChannel>, without namespaces and arguments."""
    name = re.sub(r"\(bnext::cuda::Tile\)0", "kChannel", name)
    name = re.sub(r"\(bnext::cuda::Tile\)1", "kColumns", name)
    name = re.sub(r"^void |bnext::|cuda::|\(anonymous namespace\)::", "", name)
    return re.sub(r"\(.*", "", name)


def machine_code(disassembler: str | None, cubin: Path) -> dict[str, str]:
    """SASS by mangled kernel name."""
    if disassembler is None:
        return {}
    text = subprocess.run([disassembler, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\.text\.(\S+):\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def count(pattern: str, sass: str | None) -> int:
    """The number of instructions that match; -1 without a disassembly."""
    return -1 if sass is None else len(re.findall(pattern, sass))


def torch_flags() -> list[str]:
    """The flags of torch's extensions, with which conversions of half types must be explicit."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    return list(COMMON_NVCC_FLAGS)


def compile_one(nvcc: str, disassembler: str | None, source: Path, ptx: str, folder: Path) -> list[Kernel]:
    """A source's kernels for the architectures that share the PTX of compute capability `ptx`."""
    folder = folder / f"{source.stem}-{ptx}"
    folder.mkdir()
    code = [f"sm_{architecture}" for architecture in SHARED_PTX[ptx]]
    flags = [
        *torch_flags(),
        "-std=c++17",  # the oldest standard that a supported torch compiles with
        "-O3",
        f"-gencode=arch=compute_{ptx},code=[{','.join(code)}]",
        "-Xptxas=-v,-warn-spills",
        "-Werror=all-warnings",
    ]
    if ptx == WHOLE:
        flags += ["-c", "-o", str(folder / "whole.o"), "-Xcompiler=-fPIC", "--keep", f"--keep-dir={folder}"]
    else:
        flags += ["-cubin", "-o", str(folder / f"{source.stem}.{code[0]}.cubin")]
    command = [nvcc, *flags, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode:
        faults = [line for line in log.splitlines() if "ptxas info" not in line and "bytes stack frame" not in line]
        raise RuntimeError(f"{' '.join(command)}\n" + "\n".join(faults))
    sass_of = {c.removeprefix("sm_"): machine_code(disassembler, folder / f"{source.stem}.{c}.cubin") for c in code}
    entries = re.findall(
        r"Compiling entry function '(\S+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        log,
        flags=re.DOTALL,
    )
    compiled = log.count("Compiling entry function")
    if len(entries) != compiled:
        raise RuntimeError(f"{source.name}: understood what ptxas says of {len(entries)} of {compiled} kernels")
    kernels = []
    for (mangled, architecture, stack, stores, loads, registers), name in zip(
        entries, demangled([entry[0] for entry in entries]), strict=True
    ):
        sass = sass_of[architecture][mangled] if disassembler is not None else None
        kernels.append(
            Kernel(
                name=short(name),
                architecture=architecture,
                registers=int(registers),
                stack=int(stack),
                spills=int(stores) + int(loads),
                wide_loads=count(r"\bLDG(?:STS)?\.E[.\w]*\.128\b", sass),
                wide_stores=count(r"\bSTG\.E[.\w]*\.128\b", sass),
                local=count(r"\b(?:LDL|STL)\b", sass),
                narrow_shared=count(r"\bLDS\.[US](?:8|16)\b", sass),
                steps=count_steps(short(name), architecture, sass),
            )
        )
    return kernels


def compile_tensor_level(nvcc: str, folder: Path) -> str:
    """csrc/tensor/cuda_backend.cpp against this environment's torch, without its libraries."""
    from torch.utils.cpp_extension import include_paths

    # A torch without CUDA lacks one generated header, which only holds build options.
    stub = folder / "c10" / "cuda" / "impl"
    stub.mkdir(parents=True, exist_ok=True)
    (stub / "cuda_cmake_macros.h").write_text("")
    includes = [*(f"-isystem={path}" for path in include_paths()), f"-isystem={folder}"]
    # nvcc only adds the toolkit's headers; the file is host code.
    flags = ["-x", "c++", "-std=c++20", "-DBNEXT_CUDA", "-Xcompiler=-Wall,-Werror", "-c", "-o", str(folder / "level.o")]
    command = [nvcc, *flags, *includes, str(TENSOR_LEVEL)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return f"{TENSOR_LEVEL.relative_to(ROOT)}: compiles"


def table(kernels: list[Kernel], shown_architectures: tuple[str, ...]) -> Iterator[str]:
    """A kernel a line: registers, and 128-bit loads and stores in the code, for each architecture."""
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.architecture] = kernel
    width = max(map(len, by_name))
    heads = "".join(f"  {'sm_' + a:>6} {'ld128':>5} {'st128':>5}" for a in shown_architectures)
    yield f"{'kernel, registers a thread':<{width}}{heads}"
    for name, row in sorted(by_name.items()):
        cells = (
            f"  {k.registers:>6} {'?' if k.wide_loads < 0 else k.wide_loads:>5} "
            f"{'?' if k.wide_stores < 0 else k.wide_stores:>5}"
            for k in (row[a] for a in shown_architectures)
        )
        yield f"{name:<{width}}{''.join(cells)}"


def step_table(kernels: list[Kernel]) -> Iterator[str]:
    """Instructions of the inner loops."""
    yield f"instructions for a step of 16 bytes of each input, sm_{COUNTED}: request + reduce + map, and as committed"
    for k in sorted(k for k in kernels if k.steps is not None):
        assert k.steps is not None
        found, before = (" + ".join(f"{part:.1f}" for part in parts) for parts in (k.steps, k.expected_steps))
        yield f"  {k.name}: {found} = {sum(k.steps):.0f}, before {before} = {sum(k.expected_steps):.0f}"


def save_steps(kernels: list[Kernel]) -> None:
    lines = (f'  "{k.name}": {[round(part, 1) for part in k.steps]}' for k in sorted(kernels) if k.steps is not None)
    STEPS_FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write loop_steps.json")
    update = parser.parse_args().update
    nvcc = find_nvcc()
    if nvcc is None:
        print("cuda-check: no nvcc here, so the CUDA sources were not compiled (install the toolkit, or set CUDA_HOME)")
        return 0
    disassembler = find_disassembler()
    if disassembler is None:
        print("cuda-check: no nvdisasm here, so the machine code is not looked at (pip install nvidia-cuda-nvdisasm)")
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs) as pool:
        folder = Path(name)
        waiting = [
            (source, ptx, pool.submit(compile_one, nvcc, disassembler, source, ptx, folder))
            for source in sorted(SOURCES, key=lambda s: s.stem not in LONGEST)
            for ptx in sorted(SHARED_PTX, key=int, reverse=True)  # the longest first
        ]
        tensor_level = pool.submit(compile_tensor_level, nvcc, folder)
        kernels: list[Kernel] = []
        try:
            for source, ptx, result in waiting:
                kernels += result.result()
                names = " ".join(f"sm_{architecture}" for architecture in SHARED_PTX[ptx])
                print(f"{source.relative_to(ROOT)} {names}: {time.monotonic() - started:.0f} s", flush=True)
            print(tensor_level.result())
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            print(f"cuda-check failed: {error}", file=sys.stderr)
            return 1
    print("\n".join(table(kernels, ARCHITECTURES)))
    print("\n".join(step_table(kernels)))
    if update:
        save_steps(kernels)
    print("Static shared memory: none. Dynamic: launch_plan.cpp, half an SM at most for two blocks; for parts 6 KB.")
    broken = [f"{k.name} sm_{k.architecture}: {fault}" for k in kernels for fault in k.faults]
    counted = sum(k.steps is not None for k in kernels)
    if disassembler is not None and counted != COUNTED_KERNELS:
        broken.append(f"the loops of {counted} kernels were counted, expected {COUNTED_KERNELS}")
    for line in broken:
        print(f"cuda-check failed: {line}", file=sys.stderr)
    print(f"cuda-check: {len(kernels)} kernels for {', '.join('sm_' + a for a in ARCHITECTURES)}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
