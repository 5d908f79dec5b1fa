"""How evenly the CPU kernels divide a call among threads, for any number of them: shares.cpp counts."""

from __future__ import annotations

import subprocess
from itertools import product
from pathlib import Path

import pytest
from instructions.check import build

SHAPES = [
    (n, c, hw)
    for n, c, hw in product((1, 2, 8, 32), (16, 64, 160, 256, 576, 1000, 1024, 4096), (1, 16, 49, 196, 784, 3136))
    if 100_000 <= n * c * hw <= 1_000_000
] + [(2, 1000, 63), (127, 1000, 1), (100, 700, 1), (1, 2048, 196)]
FEW_ROWS = 128  # of channels_last memory, whose columns are divided in blocks of up to 512


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return build(Path(__file__).with_name("shares.cpp"), tmp_path_factory.mktemp("shares"))
    except FileNotFoundError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("threads", [2, 4, 8])
@pytest.mark.parametrize("direction", ["forward", "eval", "backward"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_thread_writes_a_fifth_more_than_an_even_share(
    program: Path, layout: str, direction: str, threads: int
) -> None:
    shapes = [s for s in SHAPES if layout == "contiguous" or s[0] * s[2] >= FEW_ROWS or threads == 2]
    cases = "".join(f"{layout} {direction} {threads} {n} {c} {hw}\n" for n, c, hw in shapes)
    run = subprocess.run([program], input=cases, capture_output=True, text=True, check=True)
    shares = dict(zip(shapes, map(float, run.stdout.split()), strict=True))
    assert {shape: share for shape, share in shares.items() if share > 1.2} == {}
