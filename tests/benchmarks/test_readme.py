"""The README's measured tables are those that their JSON files give, and all of them are."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.numerics_results import is_numerics, load_results
from benchmarks.numerics_table import page
from benchmarks.readme import MARKERS, NUMERICS, Kind, kind
from benchmarks.rows import load_rows

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.name)
def test_readme_shows_the_committed_results(file: Path, tmp_path: Path) -> None:
    results = shutil.copy(file, tmp_path)  # the command draws the plot beside the file
    command = [sys.executable, "-m", "benchmarks", "report", results, "--readme", "README.md", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


def kinds(file: Path) -> set[Kind]:
    return {NUMERICS} if is_numerics(file) else set(map(kind, load_rows(file)))


def test_every_table_of_the_readme_has_its_file() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {of for of, (begin, _) in MARKERS.items() if begin in text}
    found = [of for file in RESULTS for of in kinds(file)]
    assert shown == set(found)
    assert len(found) == len(shown), "two files for one table"
    assert {("cpu", "", False), NUMERICS} <= shown


def test_every_row_of_the_accuracy_is_on_its_page() -> None:
    file = ROOT / "benchmarks" / "results" / "numerics.json"
    assert file.with_suffix(".md").read_text(encoding="utf-8") == page(load_results(file))
