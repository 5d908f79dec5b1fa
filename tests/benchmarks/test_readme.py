"""The README's measured tables are those that their JSON files give."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("name", ["epyc-zen4.json", "epyc-zen4-fused.json", "epyc-zen4-touched.json"])
def test_readme_shows_the_committed_results(name: str, tmp_path: Path) -> None:
    results = shutil.copy(RESULTS / name, tmp_path)  # the command draws the plot beside the file
    command = [sys.executable, "-m", "benchmarks", "report", results, "--readme", "README.md", "--check"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
