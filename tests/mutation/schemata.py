"""One build of the extension with all faults of the C++ sources in it: BNEXT_FAULT, read once, turns one of them on.

An expression becomes `planted_fault == 3 ? faulty : as it was`. Sources with faults are compiled anew, and not
optimised, since the tests are small. Of the microkernels only those of the default instruction set have faults. All
other objects are those of `make build`.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from mutation.edits import Fault, planted
from mutation.runner import ROOT, in_parallel, run

BUILT = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"

# The sources to compile for a fault in a folder; for one in any other folder, the file itself.
USERS = {
    "csrc/common/": (
        *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc" / "cpu" / "isa").glob("default_*.cpp"))),
        "csrc/cpu/batch_norm.cpp",
    )
}

SWITCH = """#pragma once
#include <cstdlib>
namespace bnext {
inline const int planted_fault = [] {
  const char* number = std::getenv("BNEXT_FAULT");
  return number == nullptr ? 0 : std::atoi(number);
}();
}  // namespace bnext
"""


def plant_all(faults: Sequence[Fault], folder: Path) -> None:
    """Writes csrc/ with all faults into the folder; the first of them has the number 1."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "switch.h").write_text(SWITCH)

    def switched(fault: Fault) -> str:
        return f"(::bnext::planted_fault == {faults.index(fault) + 1} ? ({fault.after}) : ({fault.before}))"

    for file in {fault.file for fault in faults}:
        here = [fault for fault in faults if fault.file == file]
        (folder / file).write_text(planted((ROOT / file).read_text(), here, switched))


def sources_of(faults: Sequence[Fault]) -> list[str]:
    """The sources to compile for these faults."""
    found: set[str] = set()
    for fault in faults:
        users = [files for prefix, files in USERS.items() if fault.file.startswith(prefix)]
        found.update(users[0] if users else (fault.file,))
    # The largest first, so that no core waits for it in the end.
    return sorted(
        found,
        key=lambda source: (
            "columns" not in source,
            "segments" not in source,
            "checks" in source,
            "cpu/" in source,
            source,
        ),
    )


def build(faults: Sequence[Fault], folder: Path, library: Path, jobs: int) -> None:
    """Builds the extension with the faults.

    Raises:
        RuntimeError: with the compiler's output.
    """
    plant_all(faults, folder)
    ninja_file = BUILT / "build.ninja"
    if not ninja_file.exists():
        raise RuntimeError(f"{ninja_file} is not there: run `make build`")
    _checked([sys.executable, "-m", "ninja", "-C", str(BUILT)])
    rules = ninja_file.read_text()
    compiler, before, after = (_variable(rules, name) for name in ("cxx", "cflags", "post_cflags"))
    objects = {f"csrc/{o.split('/csrc/')[-1]}": o for o in re.findall(r"^build (\S+\.o): ", rules, re.MULTILINE)}

    def compile_one(source: str) -> None:
        target = str(folder / source.replace("/", "-")) + ".o"
        objects[str(Path(source).with_suffix(".o"))] = target
        flags = [*after, "-O0", "-w", "-include", str(folder / "switch.h")]
        _checked([*compiler, *before, str(folder / source), "-o", target, *flags])

    in_parallel(jobs, compile_one, sources_of(faults))
    libraries = _libraries(cuda="-DBNEXT_CUDA" in [*before, *after])
    _checked([*compiler, "-shared", *objects.values(), "-o", str(library), *after, *libraries])


def _variable(rules: str, name: str) -> list[str]:
    return shlex.split(re.search(rf"^{name} = (.*)$", rules, re.MULTILINE)[1])  # type: ignore[index]


def _libraries(cuda: bool) -> list[str]:
    """The linker's options for torch's libraries, as in setup.py."""
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    extension = (CUDAExtension if cuda else CppExtension)("bnext._C", [])
    return [*(f"-L{path}" for path in extension.library_dirs), *(f"-l{name}" for name in extension.libraries)]


def _checked(command: list[str]) -> None:
    done = run(command)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-3000:]}")
