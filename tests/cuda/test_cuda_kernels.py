"""The CUDA kernels on every way through them, against the reference."""

from __future__ import annotations

import pytest
import reference
import tolerances
import torch
from cases import DTYPES, Case, make_grad, make_input, name, same_bits
from checks import check_backward, check_forward, make_inputs
from simt.device import Limits, last_plan
from tolerances import assert_within
from ways import FEW_WAYS, KB, PATHS, SEEDS, WAYS, Path, PlannedFor

from bnext.functional import batch_norm_act


def every_way() -> list[object]:
    """Each way with bfloat16 (the first seed in training and evaluation, the second in training) and with one of the
    other dtypes in turn. Those differ only in the width of a vector, and each of them takes every path."""
    others = [dtype for dtype in DTYPES if dtype != torch.bfloat16]
    combinations = []
    for i, way in enumerate(WAYS):
        for dtype, seed, modes in (
            (torch.bfloat16, SEEDS[0], (True, False)),
            (torch.bfloat16, SEEDS[1], (True,)),
            (others[i % 3], SEEDS[i % 2], (True,)),
        ):
            combinations.append(pytest.param(*way.values, dtype, seed, modes, id=f"{way.id}-{name(dtype)}-seed{seed}"))
    return combinations


@pytest.mark.parametrize(("path", "case", "dtype", "seed", "modes"), every_way())
def test_every_way(
    path: Path, case: Case, dtype: torch.dtype, seed: int, modes: tuple[bool, ...], planned_for: PlannedFor
) -> None:
    with planned_for(path.limits, seed) as device:
        x, g, params, _ = make_inputs(*case, dtype, device, grad_layout=case.layout)
        for training in modes:
            check_backward(x, g, params, training=training, output_too=True)


# An activation, whether there is a residual, and the dtype it is tried with. Among them are activations with a mask and
# without, backward passes with three inputs (gelu and silu), and each dtype.
EPILOGUES = (
    ("relu", True, torch.bfloat16),
    ("relu", False, torch.float32),
    ("gelu", True, torch.float64),
    ("silu", True, torch.float16),
    ("leaky_relu", True, torch.float32),
)


def ways_with_an_epilogue() -> list[object]:
    """Each way with the first epilogue (on a few ways in evaluation, too) and with one of the others in turn."""
    combinations = []
    for i, way in enumerate(WAYS):
        for act, has_residual, dtype in (EPILOGUES[0], EPILOGUES[1 + i % 4]):
            modes = (True, False) if dtype == torch.bfloat16 and way in FEW_WAYS else (True,)
            label = f"{way.id}-{name(dtype)}-{act}{'-residual' if has_residual else ''}"
            combinations.append(pytest.param(*way.values, act, has_residual, dtype, modes, id=label))
    return combinations


@pytest.mark.parametrize(("path", "case", "act", "has_residual", "dtype", "modes"), ways_with_an_epilogue())
def test_every_way_with_an_epilogue(
    path: Path,
    case: Case,
    act: str,
    has_residual: bool,
    dtype: torch.dtype,
    modes: tuple[bool, ...],
    planned_for: PlannedFor,
) -> None:
    with planned_for(path.limits) as device:
        x, g, params, residual = make_inputs(*case, dtype, device, has_residual, case.layout)
        for training in modes:
            check_backward(x, g, params, training=training, residual=residual, act=act, output_too=True)


@pytest.mark.parametrize(
    ("path", "case", "act", "has_residual", "dtype"),
    [pytest.param(*way.values, *EPILOGUES[i % 5], id=way.id) for i, way in enumerate(FEW_WAYS)],
)
def test_a_recomputed_output_has_the_same_bits(
    path: Path, case: Case, act: str, has_residual: bool, dtype: torch.dtype, planned_for: PlannedFor
) -> None:
    """The first output comes from a kernel that reduces, the second from one that does not."""
    with planned_for(path.limits) as device:
        x, _, params, residual = make_inputs(*case, dtype, device, has_residual)
        vectors, epilogue = (params.weight, params.bias), (residual, act, 0.1)
        output, stats, _ = torch.ops.bnext.batch_norm_train(x, *vectors, None, None, None, 0.1, 1e-5, *epilogue)
        assert same_bits(torch.ops.bnext.batch_norm_recompute(x, stats, *vectors, *epilogue), output)


@pytest.mark.parametrize(
    ("path", "case", "dtype"),
    [
        pytest.param(*way.values, dtype, id=f"{way.id}-{name(dtype)}")
        for i, way in enumerate(WAYS)
        for dtype in (torch.bfloat16, (torch.float32, torch.float64)[i % 2])
    ],
)
def test_a_mask_in_place_of_the_input(path: Path, case: Case, dtype: torch.dtype, planned_for: PlannedFor) -> None:
    # In evaluation, with frozen parameters, backward reads the gradient and the mask, and not the input.
    with planned_for(path.limits) as device:
        x, g, params, residual = make_inputs(*case, dtype, device, True, case.layout)
        x.requires_grad_()
        residual.requires_grad_()
        y = batch_norm_act(x, params.running_mean, params.running_var, params.weight, params.bias, residual)
        grad_input, grad_residual = torch.autograd.grad(y, (x, residual), g)
        dz = torch.where(y > 0, g, 0)
        assert torch.equal(grad_residual, dz)
        scale = reference.widen(params.weight) * (reference.widen(params.running_var) + 1e-5).rsqrt()
        expected = reference.widen(dz) * reference.along_channels(scale, x.ndim)
        # The scale and the product are rounded once each, and the result to its dtype.
        limit = expected.abs() * 2 * tolerances.unit(dtype)
        assert_within(grad_input, expected, limit + tolerances.half_ulp(expected, dtype), "grad_input")


@pytest.mark.parametrize(("path", "case"), FEW_WAYS)
def test_an_epilogue_on_coefficients_float32_cannot_hold(path: Path, case: Case, planned_for: PlannedFor) -> None:
    # A channel of magnitude 1e37 has a scale of 1e-37: the sums begin in float64, and so does the map.
    with planned_for(path.limits) as device:
        x, g, params, residual = make_inputs(*case, torch.float32, device, True, case.layout)
        x[:, 1] *= 1e37
        check_backward(x, g, params, training=True, residual=residual, act="silu")


@pytest.mark.parametrize(("path", "case"), FEW_WAYS)
def test_an_infinite_gradient_where_the_sums_begin_in_float64(path: Path, case: Case, planned_for: PlannedFor) -> None:
    # Sums that begin in float64 are not added up again, even if they are infinite, and no other channel is affected.
    with planned_for(path.limits) as device:
        x, g, params, _ = make_inputs(*case, torch.float32, device, grad_layout=case.layout)
        x[:, 1] *= 1e37

        def gradients(g: torch.Tensor) -> tuple[torch.Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in (x, params.weight, params.bias)]
            y = batch_norm_act(leaves[0], None, None, *leaves[1:], training=True, act="silu")
            return torch.autograd.grad(y, leaves, g)

        finite = gradients(g)
        g[0, 1] = float("inf")
        infinite = gradients(g)
        assert not infinite[2][1].isfinite()
        assert infinite[0][:, 1].isnan().all()
        others = [c for c in range(case.shape[1]) if c != 1]
        assert same_bits(infinite[0][:, others], finite[0][:, others])
        assert same_bits(infinite[1][others], finite[1][others])
        assert same_bits(infinite[2][others], finite[2][others])


def test_blocks_that_share_the_additions_of_an_all_reduce(planned_for: PlannedFor) -> None:
    # Two hundred values over a dozen blocks: each adds up some of them, the last one fewer.
    limits = Limits(sms=16, max_cluster=1, shared_per_block=60 * KB)
    case = Case((20, 100, 7, 7), "channels_last")
    with planned_for(limits, seed=1) as device:
        x, g, params, residual = make_inputs(*case, torch.bfloat16, device, True, case.layout)
        check_backward(x, g, params, training=True, residual=residual, act="relu", output_too=True)
        # A channel whose squares overflow is added up again: a second all-reduce writes its totals over the first's.
        large = x.clone(memory_format=torch.preserve_format)
        large[:, 1] *= 1e19
        check_forward(large, params, training=True)
        if device == "cpu":
            plan = last_plan()
            assert 1 < plan["share"] < 2 * case.shape[1]
            assert 2 * case.shape[1] % plan["share"] != 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("channels", [8, 16, 32, 64, 256])
@pytest.mark.parametrize("pixels", [2, 5, 12, 45, 67, 300])
def test_rows_of_threads_that_are_parts_of_a_warp(
    pixels: int, channels: int, dtype: torch.dtype, planned_for: PlannedFor
) -> None:
    """Rows of up to 32 threads are merged within a warp, unless some threads of the last warp have no row."""
    with planned_for(Limits(sms=4)) as device:
        x, g, params, _ = make_inputs((pixels, channels, 1, 1), "channels_last", dtype, device, False, "channels_last")
        check_backward(x, g, params, training=True, output_too=True)
        if device == "cpu" and pixels == 300:
            plan = last_plan()
            assert 32 % plan["threads_x"] == 0
            assert plan["threads_x"] * plan["threads_y"] == plan["threads"]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("channels", [1001, 1002])
def test_rows_that_begin_inside_a_vector(channels: int, act: str, dtype: torch.dtype, planned_for: PlannedFor) -> None:
    """Pixels of so many channels are not folded. Their vectors begin inside a word, or at a word that begins no vector:
    kept and not, at the ends of a row and between."""
    # On the larger device two blocks keep a tile, on the smaller one they read most of it twice. Tiles of float64 have
    # fewer channels, so that some are kept there, too.
    for limits, batch in ((Limits(sms=16), 2), (Limits(sms=1, max_cluster=1, shared_per_block=30 * KB), 24)):
        with planned_for(limits) as device:
            case = Case((batch, channels, 5, 5), "channels_last")
            x, g, params, residual = make_inputs(*case, dtype, device, act != "identity", case.layout)
            check_backward(x, g, params, training=True, residual=residual, act=act, output_too=True)
            if device == "cpu":
                assert last_plan()["row_width"] == channels
                assert dtype == torch.float64 or (last_plan()["ring"] > 0) == (batch > 2)


@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_masks_bits_at_the_edges_of_a_rectifier(dtype: torch.dtype, act: str, planned_for: PlannedFor) -> None:
    # Where the input is zero, the pre-activation is the residual.
    tiny, inf, nan = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, float("inf"), float("nan")
    edges = [tiny, nan, 0.0, -tiny, 6.0, -0.0, inf, -inf, 1.0, 5.5, -1.0, 7.0, -3e-3, 3e-3, -nan]
    with planned_for(Limits()) as device:
        # Whole vectors, with each of the fifteen values at each place of a byte.
        residual = torch.tensor(edges, dtype=dtype, device=device).repeat(8 * 16).view(3, 5, 8, 16)
        zero, one = torch.zeros(5, dtype=dtype, device=device), torch.ones(5, dtype=dtype, device=device)
        call = (torch.zeros_like(residual), None, None, zero, one, 1e-5, residual, act, 0.25, True)
        _, _, mask = torch.ops.bnext.batch_norm_eval(*call)
        places = torch.arange(16 // dtype.itemsize, device=device)
        bits = (mask.view(3, 5, -1, 1) >> places & 1).flatten(2)[..., : 8 * 16]
        is_open = ~(residual <= 0) & ~((residual >= 6) & (act == "relu6"))
        assert torch.equal(bits.view(residual.shape) == 1, is_open)


def test_a_mask_that_begins_at_an_odd_address(planned_for: PlannedFor) -> None:
    with planned_for(Limits()) as device:
        x, g, _, residual = make_inputs((4, 8, 8, 8), device=device, has_residual=True)
        weight = torch.ones(8, device=device)
        forward, backward = torch.ops.bnext.batch_norm_train, torch.ops.bnext.batch_norm_backward
        _, stats, mask = forward(x, weight, weight, None, None, None, 0.1, 1e-5, residual, "relu", 0.0, True)
        shifted = torch.empty(mask.numel() + 1, dtype=torch.uint8, device=device)[1:].view(mask.shape).copy_(mask)
        expected, actual = (
            backward(g, x, weight, stats, True, 1e-5, [True] * 4, weight, residual, m, "relu", 0.0)
            for m in (mask, shifted)
        )
        for a, b in zip(expected, actual, strict=True):
            assert same_bits(a, b)


@pytest.mark.parametrize(("path", "case"), WAYS)
def test_a_channel_float32_cannot_hold(path: Path, case: Case, planned_for: PlannedFor) -> None:
    # Its squares overflow: the group adds it up again in float64, and its neighbours keep the sums they have.
    with planned_for(path.limits) as device:
        values, g, params, _ = make_inputs(*case, torch.float32, device, grad_layout=case.layout)
        values[:, 0] += 1e3
        large = values.clone(memory_format=torch.preserve_format)
        large[:, 1] *= 1e19  # a variance that running_var still holds
        check_forward(large, params, training=True)
        # Backward it is the products with the gradient that overflow.
        values[:, 1] *= 1e30
        g[:, 1] *= 1e9
        check_backward(values, g, params, training=True)


@pytest.mark.parametrize(("path", "case"), WAYS)
def test_bias_gradient_without_the_input(path: Path, case: Case, planned_for: PlannedFor) -> None:
    with planned_for(path.limits) as device:
        g = make_grad(*case, torch.float32, device)
        stats = torch.stack([torch.zeros(case.shape[1]), torch.full((case.shape[1],), 2.0)]).double().to(device)
        backward = torch.ops.bnext.batch_norm_backward
        grad_input, grad_weight, grad_bias, _ = backward(g, None, None, stats, False, 1e-5, [True, False, True, False])
        assert same_bits(grad_input, g * 2)
        assert grad_weight.numel() == 0
        expected = reference.widen(g).sum(reference.reduced_dims(g.ndim))
        assert_within(grad_bias, expected, tolerances.grad_bias(g, g.dtype, grad_bias.dtype), "grad_bias")
        # The same in training, where without grad_input nothing is mapped.
        _, _, alone, _ = backward(g, None, None, stats, True, 1e-5, [False, False, True, False])
        assert same_bits(alone, grad_bias)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("momentum", [0.25, None], ids="momentum={}".format)
def test_counter_and_running_stats_are_updated(path: Path, momentum: float | None, planned_for: PlannedFor) -> None:
    train = torch.ops.bnext.batch_norm_train
    with planned_for(path.limits) as device:
        x = make_input(path.shapes[0], device=device)
        channels = x.shape[1]
        mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        counter = torch.tensor(3, device=device)
        train(x, None, None, mean, var, counter, momentum, 1e-5)
        assert counter.item() == 4
        fwd = reference.forward(x)
        # With momentum=None the fourth batch weighs a quarter too.
        before = torch.zeros(channels), torch.ones(channels)
        expected = reference.updated_running_stats(*before, fwd, 0.25)
        limits = tolerances.running_stats(expected, fwd, 0.25, x.dtype, mean.dtype, var.dtype)
        assert_within(mean, expected[0], limits[0], "running_mean")
        assert_within(var, expected[1], limits[1], "running_var")
