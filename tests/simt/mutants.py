"""Proof that the checked emulation bites: take each synchronisation out of the kernels, and expect the tests to fail.

    python tests/simt/mutants.py              all mutants, 16 to 75 seconds each; exit status 1 if one survives
    python tests/simt/mutants.py --list       their names
    python tests/simt/mutants.py NAME...      these

A mutant is a copy of csrc/ with one barrier, wait, release or acquire taken away or weakened. Every synchronisation
lies in a header that the forward and the backward kernels share: only the forward ones are compiled anew. Three lines
matter only to a backward pass with an activation, which reduces with coefficients by column, and may begin in float64.
The kernels for padding and parts have headers and tests of their own.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutation.runner import failed_test, main
from simt.build import BUILD, ROOT, build

KERNELS = ROOT / "csrc" / "cuda"
# The tests of which one has to fail: one dtype on every way through the kernels.
TESTS = ("tests/cuda/test_cuda_kernels.py", "tests/cuda/test_emulated_kernels.py", "-k")
TESTS_OF_PARTS = "tests/cuda/test_cuda_parts.py"
FORWARD = "(every_way and bfloat16) or cannot_hold or several or share_the_additions"
ACTIVATED = "(with_an_epilogue and bfloat16-relu-residual) or coefficients_float32_cannot_hold"

# The rules of mutation: a pattern in a line, and what takes its place.
RULES: tuple[tuple[str, str], ...] = (
    (r"^\s*(if .*)?__syncthreads\(\);", ""),
    (r"__syncthreads_or\((.*?)\) (!=|==) 0", r"(\1) \2 0"),
    (r"^\s*cluster_barrier\(\);", ""),
    (r"if \(plan\.group == Group::kCluster\) cluster_barrier_wait\(\);", ""),
    (r"if \(requested\) wait_prior<0>\(\);", ""),
    (r"if \(asks\) __pipeline_commit\(\);", ""),
    (r"^\s*grid_group_barrier\(.*\);", ""),
    (r"bnext_add_acq_rel\(counter, share\)", "atomicAdd(counter, share)"),
    (r"\? kPhase - static_cast<unsigned>\(group_blocks - 1\)", "? kPhase - static_cast<unsigned>(group_blocks - 2)"),
    (r"bnext_load_acquire\(counter\)", "*static_cast<const volatile unsigned*>(counter)"),
    (r"^\s*wait_for_stage\(stage\);", ""),
    (r"^\s*wait_prior<(kRingSlots - 1|0)>\(\);", ""),
    (r"wait_prior<kRingSlots - 1>\(\);", "wait_prior<kRingSlots>();"),
    (r"(case|default)(.*)wait_prior<(\d)>\(\);", r"\1\2wait_prior<\3 + 1>();"),
    (r"^\s*__pipeline_wait_prior\(kGroups\);", ""),
    (r"^\s*__pipeline_commit\(\);", ""),
    (r"& 1\) \* values", "& 0) * values"),
    (r"\(self\.round & 1\)\) \* plan", "(self.round & 0)) * plan"),
)


class Mutant(NamedTuple):
    """One line of one header, changed by one rule."""

    file: str
    line: int
    rule: int
    before: str
    after: str

    @property
    def of_parts(self) -> bool:
        """Whether the line belongs to the kernels for padding and parts."""
        return self.file.startswith("part_")

    @property
    def activated(self) -> bool:
        """Whether the line matters only to a backward pass with an activation."""
        texts = ("Reduce, kTile", "return __syncthreads_or")
        return any(text in self.before for text in texts) or self.before.strip() == "wait_prior<0>();"

    @property
    def kernels(self) -> str:
        """The source that is compiled with the changed line."""
        stem = "parts_forward" if self.of_parts else "backward_activated" if self.activated else "forward"
        return f"csrc/cuda/{stem}.cu"

    @property
    def tests(self) -> tuple[str, ...]:
        if self.of_parts:
            return (TESTS_OF_PARTS,)
        return (*TESTS, ACTIVATED if self.activated else FORWARD)

    @property
    def name(self) -> str:
        return f"{self.file}:{self.line}:{self.rule}"

    def __str__(self) -> str:
        return f"{self.name}  {self.before.strip()}  ->  {self.after.strip() or 'nothing'}"


def all_mutants() -> Iterator[Mutant]:
    for path in sorted(KERNELS.glob("*.cuh")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for index, (pattern, replacement) in enumerate(RULES):
                changed = re.sub(pattern, replacement, line)
                if changed != line:
                    yield Mutant(path.name, number, index, line, changed)


def compiled(mutant: Mutant, folder: Path) -> Path:
    """The emulated device with the mutant's kernels."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    path = folder / "csrc" / "cuda" / mutant.file
    lines = path.read_text().splitlines(keepends=True)
    lines[mutant.line - 1] = mutant.after + "\n"
    path.write_text("".join(lines))
    return build(folder / "build", kernels={mutant.kernels: folder}, objects=BUILD)


def noticed_by(mutant: Mutant) -> str | None:
    """The first test that fails with the mutant, None if none does. They run in a process of their own, since torch
    cannot unload a library."""
    with tempfile.TemporaryDirectory() as folder:
        library = str(compiled(mutant, Path(folder)))
        return failed_test(*mutant.tests, timeout=3600, BNEXT_SIMT_LIBRARY=library, PYTHONPATH=str(ROOT))


def prepare(_mutants: Sequence[Mutant], _folder: Path) -> Callable[[Mutant], str | None]:
    build()
    return noticed_by


if __name__ == "__main__":
    sys.exit(main(__doc__, list(all_mutants()), prepare))
