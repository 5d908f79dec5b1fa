"""How many instructions the CPU kernels take for an element, against the numbers that are committed.

    python tests/instructions/check.py              # status 1 where one takes over 3 % more than in baseline.json
    python tests/instructions/check.py --update     # write baseline.json

Instructions, unlike seconds, are the same on every run. valgrind counts them in two runs, one of which makes ten calls
more. It knows no AVX-512, so the AVX2 kernels are counted; all instruction sets share their source. The numbers are
those of one compiler: another one's are shown and not judged.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
BASELINE = HERE / "baseline.json"
BUILD = ROOT / "build" / "instructions"
ELEMENTS = 8 * 32 * 28 * 28  # of a tensor in driver.cpp, in small_planes too
CALLS = 10
TOLERANCE = 1.03

LAYOUTS = ("contiguous", "channels_last")
CASES = [
    *itertools.product(("float32", "bfloat16", "float16"), LAYOUTS, ("forward", "eval", "backward"), ("none",)),
    *itertools.product(("float32",), ("small_planes",), ("forward", "backward"), ("none",)),
    *itertools.product(("float32", "bfloat16"), LAYOUTS, ("forward", "backward"), ("add+relu",)),
    *itertools.product(("float32", "bfloat16"), ("contiguous",), ("eval", "backward"), ("silu", "gelu")),
]


def compiler_version() -> str:
    command = [os.environ.get("CXX", "c++"), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def build(source: Path, folder: Path) -> Path:
    """The program of this source, in `folder`, linked with the objects of the extension's own build."""
    # The build's folder keeps objects of sources that are gone, and each version of Python has a folder of its own.
    objects = [
        o
        for temporary in ROOT.glob(f"build/temp.*-{sys.implementation.cache_tag}")
        for o in sorted(temporary.glob("csrc/cpu/**/*.o"))
        if (ROOT / o.relative_to(temporary)).with_suffix(".cpp").exists()
    ]
    if not objects:
        raise FileNotFoundError(f"{source.name}: the extension is not built: make build")
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / source.stem
    flags = ["-std=c++20", "-O1", "-fopenmp"]
    command = [os.environ.get("CXX", "c++"), *flags, str(source), *map(str, objects), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def instructions_of_run(driver: Path, case: tuple[str, ...], calls: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", str(driver), *case, str(calls)]
    environment = {**os.environ, "BNEXT_CPU_ISA": "avx2"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.search(r"Collected : (\d+)", run.stderr)
    if run.returncode != 0 or found is None:
        sys.exit(f"check.py: {' '.join(command)}: {run.stderr}")
    return int(found[1])


def count(driver: Path, case: tuple[str, ...]) -> float:
    """The instructions a call takes for an element."""
    more = instructions_of_run(driver, case, 1 + CALLS) - instructions_of_run(driver, case, 1)
    return more / CALLS / ELEMENTS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the baseline")
    update = parser.parse_args().update
    if shutil.which("valgrind") is None:
        sys.exit("check.py: valgrind is not installed (apt install valgrind)")
    try:
        driver = build(HERE / "driver.cpp", BUILD)
    except FileNotFoundError as e:
        sys.exit(f"check.py: {e}")
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"compiler": "", "instructions": {}}
    judged = baseline["compiler"] == compiler_version()
    found: dict[str, float] = {}
    worse = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for case, value in zip(CASES, pool.map(lambda case: count(driver, case), CASES), strict=True):
            name = " ".join(case)
            found[name] = round(value, 4)
            before = baseline["instructions"].get(name)
            print(f"{name:44s} {value:7.3f}" + (f"  was {before:7.3f}" if before else ""), flush=True)
            if before is None or value > TOLERANCE * before:
                worse.append(name)
    if update:
        BASELINE.write_text(json.dumps({"compiler": compiler_version(), "instructions": found}, indent=2) + "\n")
        return 0
    if not judged:
        print(f"not judged: the baseline is of {baseline['compiler']}, this is {compiler_version()}")
        return 0
    for name in worse:
        print(f"over {TOLERANCE - 1:.0%} more instructions, or not in the baseline: {name}", file=sys.stderr)
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
