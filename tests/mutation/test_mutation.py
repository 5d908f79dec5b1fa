"""The mutation runs: every planted fault still has its place and its tests, and only a failed test catches one."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from mutation.edits import Fault, planted
from mutation.faults import FAULTS
from mutation.runner import ROOT, failed_test
from simt.mutants import all_mutants

FILES = sorted({fault.file for fault in FAULTS})


@pytest.mark.parametrize("file", FILES)
def test_every_fault_can_be_planted(file: str) -> None:
    faults = [fault for fault in FAULTS if fault.file == file]
    source = (ROOT / file).read_text()
    for fault in faults:
        changed = planted(source, [fault], lambda it: it.after)
        assert changed != source, fault.name
        if file.endswith(".py"):
            compile(changed, file, "exec")
    if not file.endswith(".py"):
        planted(source, faults, str)  # all at once


def test_every_fault_has_a_name_of_its_own_and_a_test_that_is_there() -> None:
    assert [name for name, times in Counter(fault.name for fault in FAULTS).items() if times > 1] == []
    for fault in FAULTS:
        path, name = re.fullmatch(r"((?:\w+/)*test_\w+\.py)::(\w+)(?:\[.*\])?", fault.test).groups()
        assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(), fault.test


def test_every_barrier_of_a_cuda_block_has_a_mutant() -> None:
    barriers = {
        (path.name, number)
        for path in (ROOT / "csrc" / "cuda").glob("*.cuh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "__syncthreads" in line.partition("//")[0]
    }
    assert len(barriers) > 10
    assert barriers <= {(mutant.file, mutant.line) for mutant in all_mutants()}


def fault_replacing(text: str) -> Fault:
    return Fault(f"no {text}", "file", text, "?", "")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["d"], "no d: 'd' is 0 times in file, not once"),
        (["a"], "no a: 'a' is 2 times in file, not once"),
        (["ab", "bc"], "no ab: what it replaces in file is part of what another fault replaces"),
        (["bc", "c"], "no bc: what it replaces in file is part of what another fault replaces"),
    ],
    ids=["gone", "twice", "overlapping", "within"],
)
def test_a_fault_without_a_place_of_its_own_is_an_error(texts: list[str], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        planted("abca", [fault_replacing(text) for text in texts], lambda it: it.after)


def test_faults_are_planted_side_by_side() -> None:
    assert planted("abca", [fault_replacing("c"), fault_replacing("ab")], lambda it: f"<{it.before}>") == "<ab><c>a"


def failed_test_of(content: str, folder: Path) -> str | None:
    file = folder / "test_it.py"
    file.write_text(content)
    return failed_test(str(file), timeout=60, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")


def test_a_failed_test_catches_a_fault(tmp_path: Path) -> None:
    assert failed_test_of("def test_a(): pass\ndef test_b(): assert False\n", tmp_path).endswith("test_it.py::test_b")
    assert failed_test_of("def test_a(): pass\n", tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        "import nothing_of_this_name\ndef test_a(): pass\n",
        "import os\ndef test_a(): os.abort()\n",
        "import pytest\n@pytest.fixture\ndef broken(): raise ValueError\ndef test_a(broken): pass\n",
        "",
    ],
    ids=["import error", "crash", "broken fixture", "no test"],
)
def test_a_run_that_ends_otherwise_gives_no_verdict(content: str, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"test_it\.py ended with status"):
        failed_test_of(content, tmp_path)
