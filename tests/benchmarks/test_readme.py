"""The README's measured tables are those that their JSON files give, and all of them are."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.readme import MARKERS, kind
from benchmarks.rows import load_rows

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_readme_shows_the_committed_results(file: Path, tmp_path: Path) -> None:
    results = shutil.copy(file, tmp_path)  # the command draws the plot beside the file
    command = [sys.executable, "-m", "benchmarks", "report", results, "--readme", "README.md", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_table_of_the_readme_has_its_file() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {of for of, (begin, _) in MARKERS.items() if begin in text}
    assert shown == {kind(row) for file in RESULTS for row in load_rows(file)}
    assert ("cpu", "", False) in shown
