"""Build of the extension bnext._C. Everything else about the package is in pyproject.toml.

BNEXT_CUDA=1 requires the CUDA kernels, 0 leaves them out; by default they are built where torch has CUDA and nvcc is
found. The build needs no GPU. BNEXT_SANITIZE=1 is for .ci/sanitize.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

SOURCES = [
    "csrc/tensor/module.cpp",
    "csrc/tensor/autograd.cpp",
    "csrc/tensor/nodes.cpp",
    "csrc/tensor/compiled_autograd.cpp",
    "csrc/tensor/node_attributes.cpp",
    "csrc/tensor/recomputation.cpp",
    "csrc/tensor/saved_tensor_hooks.cpp",
    "csrc/tensor/direct_calls.cpp",
    "csrc/tensor/derivatives.cpp",
    "csrc/tensor/forward.cpp",
    "csrc/tensor/backward.cpp",
    "csrc/tensor/tensors.cpp",
    "csrc/tensor/checks.cpp",
    "csrc/tensor/collectives.cpp",
    "csrc/tensor/all_reduce.cpp",
    "csrc/tensor/sync.cpp",
    "csrc/tensor/backend.cpp",
    "csrc/tensor/cpu_backend.cpp",
    "csrc/tensor/output_memory.cpp",
    "csrc/cpu/batch_norm.cpp",
    "csrc/cpu/channels_first.cpp",
    "csrc/cpu/plane_columns.cpp",
    "csrc/cpu/channels_last.cpp",
    "csrc/cpu/parts.cpp",
    "csrc/cpu/valid.cpp",
    "csrc/cpu/huge_page_cache.cpp",
    "csrc/cpu/output_pool.cpp",
    "csrc/cpu/isa/dispatch.cpp",
    # An instruction set's kernels, the longest to compile first.
    *(
        f"csrc/cpu/isa/{isa}_{kernels}.cpp"
        for kernels in ("map_columns", "map_segments", "reduce_segments", "reduce_columns", "kernel_table")
        for isa in ("avx512", "avx2", "default")
    ),
]
CUDA_SOURCES = [
    "csrc/tensor/cuda_backend.cpp",
    "csrc/cuda/backward_activated.cu",
    "csrc/cuda/backward.cu",
    "csrc/cuda/forward.cu",
    "csrc/cuda/parts_backward.cu",
    "csrc/cuda/parts_forward.cu",
    "csrc/cuda/counters.cu",
    "csrc/cuda/limits.cu",
    "csrc/cuda/launch_plan.cpp",
    "csrc/cuda/part_plan.cpp",
]

# The kernels read no errno and unmask no floating-point trap, so these flags change no result. Debug information, which
# Python's own flags request, would be nine tenths of the compiled size and a fifth of the time.
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-g0"]
LINK_FLAGS = []
if sys.platform == "linux":
    # Without OpenMP, torch's parallel_for, a template in a header, silently compiles to a serial loop.
    CXX_FLAGS.append("-fopenmp")
    LINK_FLAGS.append("-fopenmp")

if os.environ.get("BNEXT_SANITIZE") == "1":
    # The last -O counts. At a higher level, or with pointer checks that AddressSanitizer makes anyway, the vector code
    # takes a quarter of an hour to compile.
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize=null,pointer-overflow,object-size,vptr"]
    SANITIZERS += ["-fno-sanitize-recover=all"]
    CXX_FLAGS += [*SANITIZERS, "-O1", "-g1", "-D_GLIBCXX_ASSERTIONS"]
    LINK_FLAGS += SANITIZERS

NVCC_FLAGS = ["-O3", "-Xcompiler=-fvisibility=hidden", "-Xptxas=-warn-spills"]
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


def find_toolkit() -> None:
    """Correct torch's guess of where the CUDA toolkit is.

    torch takes the parent of nvcc's folder. Where nvcc is a script that calls another nvcc, that folder has no headers;
    a dry run of nvcc prints where they are.
    """
    nvcc = shutil.which("nvcc")
    guess = cpp_extension.CUDA_HOME
    if guess is None or nvcc is None or Path(guess, "include", "cuda_runtime.h").exists():
        return
    dry_run = subprocess.run([nvcc, "--dryrun", "-c", "none.cu"], capture_output=True, text=True, check=False)
    found = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr, re.MULTILINE)
    if found and Path(found[1], "include", "cuda_runtime.h").exists():
        cpp_extension.CUDA_HOME = str(Path(found[1]).resolve())


def builds_cuda() -> bool:
    """Whether to build the CUDA kernels; exits with a remedy where BNEXT_CUDA=1 requires what the machine lacks."""
    wish = os.environ.get("BNEXT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"BNEXT_CUDA: expected 0, 1 or nothing, got {wish!r}")
    lacking = []
    if torch.version.cuda is None:
        lacking.append(f"a torch with CUDA (torch {torch.__version__} has none; see https://pytorch.org)")
    if cpp_extension.CUDA_HOME is None:
        lacking.append("nvcc (install the CUDA toolkit, or set CUDA_HOME)")
    if wish == "1" and lacking:
        sys.exit(f"BNEXT_CUDA=1 needs {' and '.join(lacking)}")
    return wish != "0" and not lacking


find_toolkit()
if builds_cuda():
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        # Without a visible GPU torch's own choice of architectures fails.
        found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        visible = ";".join(sorted({f"{major}.{minor}" for major, minor in found}))
        os.environ["TORCH_CUDA_ARCH_LIST"] = visible or DEFAULT_ARCHITECTURES
    # The macro has no quotes, spaces or semicolons, which shells and build files interpret. nvcc does not get it, since
    # it takes what follows a comma for another macro.
    architectures = re.sub("[ ;]+", ",", os.environ["TORCH_CUDA_ARCH_LIST"])
    extension = CUDAExtension(
        "bnext._C",
        SOURCES + CUDA_SOURCES,
        define_macros=[("BNEXT_CUDA", None)],
        extra_compile_args={"cxx": [*CXX_FLAGS, f"-DBNEXT_CUDA_ARCHITECTURES={architectures}"], "nvcc": NVCC_FLAGS},
        extra_link_args=LINK_FLAGS,
    )
else:
    extension = CppExtension("bnext._C", SOURCES, extra_compile_args={"cxx": CXX_FLAGS}, extra_link_args=LINK_FLAGS)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
