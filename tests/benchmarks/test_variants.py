"""The variants: their arguments, the ways that are compared, and a run, whose picture is drawn.

test_document.py compares their tables with measured ones.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_suites import Run

from benchmarks import variants
from benchmarks.operators import make_tensors, results
from benchmarks.suites import GHOST, LENGTHS, RANDOM, RECTANGLES, SUITES, VARIANTS, Input, select_cases
from bnext import functional

TINY = (
    Input((4, 3, 8), variant=LENGTHS),
    Input((4, 3, 6, 6), variant=RECTANGLES),
    Input((4, 3, 6, 6), variant=RANDOM),
    Input((64, 3, 2, 2), variant=GHOST),
    Input((64, 3), variant=GHOST),
)


@pytest.fixture
def small(tiny: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SUITES["cpu"], VARIANTS, replace(SUITES["cpu"][VARIANTS], inputs=TINY))


def test_batches_are_padded_from_half_to_full() -> None:
    for case in select_cases([VARIANTS], dtypes=["float32"], layouts=["contiguous"]):
        ((name, value),) = variants.options(case).items()
        assert name == {LENGTHS: "lengths", GHOST: "virtual_batch_size"}.get(case.variant, "mask")
        n, _, *sizes = case.shape
        if case.variant == GHOST:
            assert value * 32 == n
        elif case.variant == RANDOM:
            assert float(value.float().mean()) == pytest.approx(0.8, abs=0.01)
        else:
            sides = [value] if case.variant == LENGTHS else [value.sum(1).amax(1), value.sum(2).amax(1)]
            for ends, size in zip(sides, sizes, strict=True):
                assert size // 2 <= ends.min() < ends.max() <= size
            if case.variant == RECTANGLES:
                assert torch.equal(value.sum((1, 2)), sides[0] * sides[1])
                assert value[:, 0, 0].all()


def test_by_hand_each_part_is_normalised_and_padding_left_out(small: None) -> None:
    # The mean of a normalised channel is its bias, and its variance that of the weight.
    for case in select_cases([VARIANTS], dtypes=["float64"]):
        tensors = make_tensors(case)
        assert (tensors.input.stride(1) == 1) == (case.layout == "channels_last" or len(case.shape) == 2)
        given = variants.options(case)
        output = results(variants.functions(case)["torch-by-hand"], tensors)["output"].movedim(1, -1)
        if case.variant == GHOST:
            parts = list(output.split(given["virtual_batch_size"]))
        else:
            valid = given["mask"] if "mask" in given else torch.arange(8) < given["lengths"][:, None]
            parts = [output[valid]]
            assert not output[~valid].any()
        for part in parts:
            torch.testing.assert_close(part.flatten(0, -2).mean(0), tensors.bias.detach())
            assert (part.flatten(0, -2).var(0) > 0.2).all()


def test_a_run_has_every_provider_of_every_variant(small: None, run: Run) -> None:
    status, rows, errors = run(VARIANTS)
    assert (status, errors) == (0, [])
    keys = {(row.variant, row.shape, row.dtype, row.layout, row.op, row.provider) for row in rows}
    # Four tensors in two layouts and a matrix; dtypes, operations, providers.
    assert len(keys) == len(rows) == (4 * 2 + 1) * 2 * 2 * 4


def test_a_result_that_ignores_the_variant_is_an_error(small: None, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ignoring = SimpleNamespace(batch_norm=lambda *arguments, **options: functional.batch_norm(*arguments))
    monkeypatch.setattr(variants, "functional", ignoring)
    status, rows, errors = run(VARIANTS, "--dtype", "float32", "--layout", "contiguous")
    assert (status, rows, len(errors)) == (1, [], len(TINY))
    assert all(" contiguous: output of bnext: " in line for line in errors)
