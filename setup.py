"""Build of the extension bnext._C. Everything else about the package is in pyproject.toml."""

import sys

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

SOURCES = [
    "csrc/bindings.cpp",
    "csrc/autograd.cpp",
    "csrc/derivatives.cpp",
    "csrc/batch_norm.cpp",
    "csrc/cpu/batch_norm.cpp",
    "csrc/cpu/channels_first.cpp",
    "csrc/cpu/channels_last.cpp",
    "csrc/cpu/huge_pages.cpp",
    "csrc/cpu/isa.cpp",
    "csrc/cpu/isa_default.cpp",
    "csrc/cpu/isa_avx2.cpp",
    "csrc/cpu/isa_avx512.cpp",
]

# Neither flag changes a result: the kernels read no errno and unmask no floating-point trap.
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
LINK_FLAGS = []
if sys.platform == "linux":
    # Without it torch's parallel_for, a template in a header, silently compiles to a serial loop.
    CXX_FLAGS.append("-fopenmp")
    LINK_FLAGS.append("-fopenmp")

setup(
    ext_modules=[CppExtension("bnext._C", SOURCES, extra_compile_args={"cxx": CXX_FLAGS}, extra_link_args=LINK_FLAGS)],
    cmdclass={"build_ext": BuildExtension},
)
