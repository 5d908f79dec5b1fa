"""What only the emulation of the CUDA kernels can test: orders of execution, counts of memory accesses, launches that
are refused, groups that take several tiles."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_input, make_parameters, name, same_bits
from checks import check_backward, check_forward, make_inputs
from simt.device import GROUPS, TILES, Limits, emulated, last_plan
from steps import step
from ways import FEW_WAYS, KB, PATHS, SEEDS, WAYS, Path

from bnext.functional import batch_norm

pytestmark = pytest.mark.simt


@pytest.mark.parametrize(("path", "case"), FEW_WAYS)
def test_the_order_of_execution_changes_no_bit(path: Path, case: Case) -> None:
    x, g, params, _ = make_inputs(*case, torch.bfloat16, grad_layout=case.layout)
    results = []
    for seed in (0, 1, 2):
        stats = (*(t.clone() for t in (params.running_mean, params.running_var)), torch.zeros((), dtype=torch.int64))
        with emulated(path.limits, seed, check=False):
            results.append((*step(x, g, params.weight, params.bias, stats), *stats))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("path", "case"), WAYS)
def test_how_often_memory_is_read(path: Path, case: Case) -> None:
    # Forward reads the input once, and again what of it is not kept. Beside it, it reads a few samples and values a
    # channel.
    x = make_input(*case, torch.float32)
    with emulated(path.limits):
        counters = torch.ops.bnext_simt.counters
        counters()
        batch_norm(x, None, None, training=True)
        plan, counted = last_plan(), counters()
    bytes_of_x = x.numel() * x.element_size()
    per_block = 2 * plan["group_blocks"] * 8 * 2 * plan["tile_channels"] + 20 * 16 * plan["tile_channels"]
    beside = plan["tiles"] * plan["group_blocks"] * per_block
    least = 2 if path.two_reads and plan["kept"] == 0 else 1
    most = 1 if plan["ring"] == 0 else 2
    assert least * bytes_of_x <= counted["global_load_bytes"] <= most * bytes_of_x + beside
    assert bytes_of_x <= counted["global_store_bytes"] <= bytes_of_x + beside


@pytest.mark.parametrize(("path", "case"), WAYS)
def test_requests_fill_sectors_and_banks(path: Path, case: Case) -> None:
    # Sectors of global memory are used in full, except at the ends of rows that are no multiple of a sector. The slots
    # of a warp lie side by side, so that the banks serve the vectors of eight lanes at once. Coefficients by column
    # begin anew with each row of threads, and the eight lanes may belong to two rows.
    x, g, params, residual = make_inputs(*case, torch.bfloat16, "cpu", True, case.layout)
    with emulated(path.limits, count_requests=True):
        counters = torch.ops.bnext_simt.counters
        counters()
        check_backward(x, g, params, training=True, residual=residual, act="relu", output_too=True)
        counted, plan = counters(), last_plan()
    assert counted["global_vectors"] > x.numel() // 8
    assert counted["shared_vectors"] > x.numel() // 8
    assert counted["global_sectors"] <= 1.25 * counted["global_vectors"] / 2
    passes = 1.25 if TILES[plan["tile"]] == "channel" else 1.8
    assert counted["shared_wavefronts"] <= passes * counted["shared_vectors"] / 8


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_plan_is_described(path: Path) -> None:
    x = make_input(path.shapes[0], dtype=torch.float32)
    with emulated(path.limits, check=False):
        describe = torch.ops.bnext_simt.last_description
        y, mean, var = batch_norm(x, None, None, training=True), torch.zeros(x.shape[1]), torch.ones(x.shape[1])
        plan = last_plan()
        assert (plan["group_blocks"] == 16) == path.large_cluster or path.group == "grid"
        group = "block" if path.group == "block" else f"{path.group} of {plan['group_blocks']}"
        steps = -(-plan["rows"] * plan["parts"] // (plan["threads_y"] * plan["group_blocks"]))
        reads = f"{plan['kept']} of {steps} kept" if path.two_reads else "read once"
        assert describe() == f"{group}, {reads}"
        batch_norm(y, mean, var)
        assert describe() == "no sums"


# Groups that work on several tiles in turn, and during the map of one request the vectors of the next: blocks, clusters
# that keep what they read and clusters that do not, and the grid. The names are those of the groups for bfloat16. All
# cases but the first have whole vectors.
SEVERAL_TILES = (
    ("block", Limits(sms=1, max_grid=1), Case((5, 24, 7, 7), "contiguous")),
    ("block", Limits(sms=1, max_grid=1), Case((7, 96, 2, 3), "channels_last")),
    ("block", Limits(sms=1, max_grid=1), Case((9, 5, 16, 16), "contiguous")),
    ("cluster", Limits(sms=4, max_cluster=4, shared_per_block=60 * KB), Case((31, 9, 32, 32), "contiguous")),
    ("cluster", Limits(sms=2, max_cluster=2, cooperative_sms=0), Case((90, 3, 40, 40), "contiguous")),
    ("grid", Limits(sms=3, max_cluster=1, shared_per_block=60 * KB), Case((20, 5, 32, 32), "contiguous")),
)


@pytest.mark.parametrize(
    ("dtype", "act", "has_residual"),
    [
        (torch.bfloat16, "identity", False),
        (torch.bfloat16, "relu", True),
        (torch.bfloat16, "silu", True),
        (torch.float32, "relu", True),
        (torch.float64, "identity", False),
    ],
    ids=name,
)
@pytest.mark.parametrize(("group", "limits", "case"), SEVERAL_TILES, ids=str)
def test_groups_that_take_several_tiles(
    group: str, limits: Limits, case: Case, dtype: torch.dtype, act: str, has_residual: bool
) -> None:
    x, g, params, residual = make_inputs(*case, dtype, "cpu", has_residual, case.layout)
    if dtype == torch.float32:
        # In both channels the squares overflow, in the second the coefficients, too: its map is in float64, and
        # requests no vectors of the next tile.
        x[:, 1] *= 1e19
        x[:, 2] *= 1e37
        g[:, 2] *= 1e-3
    for seed in SEEDS:
        with emulated(limits, seed):
            check_backward(x, g, params, training=True, residual=residual, act=act, output_too=True)
            assert last_plan()["tiles"] > last_plan()["groups"]
            assert dtype != torch.bfloat16 or GROUPS[last_plan()["group"]] == group


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
@pytest.mark.parametrize(("limits", "case"), [row[1:] for row in SEVERAL_TILES if row[0] == "block"], ids=str)
def test_a_block_that_maps_several_tiles(limits: Limits, case: Case, dtype: torch.dtype) -> None:
    # Without sums, only the loop's own barrier keeps a tile's coefficients until all of the block's threads read them.
    for seed in SEEDS:
        with emulated(limits, seed):
            check_forward(make_input(*case, dtype), make_parameters(case.shape[1]), training=False)
            assert last_plan()["tiles"] > last_plan()["groups"]


@pytest.mark.parametrize("cluster", [1, 2])
def test_a_grid_that_cannot_run_at_once_is_planned_again(cluster: int) -> None:
    # A cooperative launch may be refused, for instance under MPS. The new plan has groups that need no such launch.
    x, g, params, _ = make_inputs((160, 8, 7, 7))
    limits = Limits(sms=16, max_cluster=cluster, shared_per_block=60 * KB)
    with emulated(limits):
        check_backward(x, g, params, training=True, output_too=True)
        assert GROUPS[last_plan()["group"]] == "grid"
    with emulated(limits._replace(cooperative_sms=3)):
        check_backward(x, g, params, training=True, output_too=True)
        assert GROUPS[last_plan()["group"]] == ("cluster" if cluster > 1 else "block")
