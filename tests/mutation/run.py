"""Proof that the tests bite: plant faults that a careless change would make, and expect the tests to fail.

    python tests/mutation/run.py              all, a minute on two idle cores; exit status 1 if one survives
    python tests/mutation/run.py --list       their names
    python tests/mutation/run.py NAME...      these

The faults are in faults.py. Those in C++ sources are compiled once, all together, and turned on one at a time; each of
those in Python files is written into a copy of the package. A fault is caught if the test named beside it fails, which
has to pass without it first. tests/simt/mutants.py does the same to the CUDA kernels.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutation import schemata
from mutation.edits import Fault, planted
from mutation.faults import FAULTS
from mutation.runner import ROOT, failed_test, in_parallel, main

JOBS = os.cpu_count() or 1
LIBRARY = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def copy_package(library: Path, folder: Path) -> Path:
    """Puts the package into the folder, with this extension; returns the folder."""
    package = folder / "bnext"
    shutil.copytree(ROOT / "bnext", package, ignore=shutil.ignore_patterns("_C*.so", "__pycache__"))
    (package / LIBRARY).symlink_to(library)
    return folder


def failed(folder: Path, tests: Sequence[str], number: int) -> str | None:
    """The first test that the package in `folder` fails with the compiled fault `number` (0: no fault), or None."""
    return failed_test(
        *("-o", f"pythonpath={folder}", "-m", "not slow and not simt", *(f"tests/{test}" for test in tests)),
        timeout=120,
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",  # hypothesis alone takes longer to import than most tests run
        OMP_NUM_THREADS="1",  # as many runs at a time as cores
        BNEXT_CPU_ISA="default",
        BNEXT_FAULT=str(number),
    )


def prepare(faults: Sequence[Fault], folder: Path) -> Callable[[Fault], str | None]:
    """Builds the extension, and runs the tests without a fault; returns what runs the test of one fault."""
    compiled = [fault for fault in faults if fault.file.startswith("csrc/")]
    library = ROOT / "bnext" / LIBRARY
    if compiled:
        library = folder / LIBRARY
        print(f"build: {len(compiled)} faults in {', '.join(schemata.sources_of(compiled))}", flush=True)
        schemata.build(compiled, folder, library, JOBS)
    sound = copy_package(library, folder / "sound")

    def require_passing(tests: Sequence[str]) -> None:
        if (test := failed(sound, tests, 0)) is not None:
            raise RuntimeError(f"{test} fails without a fault, too")

    tests = sorted({fault.test for fault in faults})
    print(f"test: {len(tests)} tests without a fault", flush=True)
    in_parallel(JOBS, require_passing, [part for i in range(JOBS) if (part := tests[i::JOBS])])

    def judge(fault: Fault) -> str | None:
        if fault in compiled:
            return failed(sound, [fault.test], compiled.index(fault) + 1)
        faulty = copy_package(library, folder / fault.name)
        path = faulty / fault.file
        path.write_text(planted(path.read_text(), [fault], lambda it: it.after))
        return failed(faulty, [fault.test], 0)

    return judge


if __name__ == "__main__":
    sys.exit(main(__doc__, FAULTS, prepare, JOBS))
