"""The CUDA kernels on every way through them, against the reference.

In emulation every access is checked (tests/simt); where there is a GPU the same plans run on it too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import reference
import tolerances
import torch
from cases import DTYPES, Case, make_grad, make_input, make_parameters, make_residual, name, parameter_dtype, same_bits
from checks import check_backward, check_forward
from marks import GPUS, SIMT
from simt.device import GROUPS, TILES, Limits, emulated, last_plan, load
from tolerances import assert_within
from ways import FEW_WAYS, KB, LAYOUTS, PATHS, SEEDS, WAYS, Path

import bnext
from bnext.functional import batch_norm_act


@contextlib.contextmanager
def planned_for(limits: Limits, kernel_device: str, seed: int = 0) -> Iterator[str]:
    """Where tensors have to be for the kernels to run, with plans for a device of these limits."""
    if kernel_device == "simt":
        with emulated(limits, seed):
            yield "cpu"
        return
    bnext._C.cap_cuda_device(limits.sms, limits.shared_per_block, limits.max_cluster)
    try:
        yield kernel_device
    finally:
        bnext._C.cap_cuda_device()


@pytest.fixture(params=[SIMT, *GPUS])
def kernel_device(request: pytest.FixtureRequest) -> str:
    return request.param


def every_way() -> list[object]:
    """Each way with bfloat16, with one seed in either mode and with the other in training, and with one of the other
    dtypes in turn: those differ in the width of a vector alone, and each of them goes along every path."""
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
    path: Path, case: Case, dtype: torch.dtype, seed: int, modes: tuple[bool, ...], kernel_device: str
) -> None:
    with planned_for(path.limits, kernel_device, seed) as device:
        x, g = make_input(*case, dtype, device), make_grad(*case, dtype, device)
        params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
        for training in modes:
            check_backward(x, g, params, training=training, output_too=True)


# An activation, whether there is a residual, and the dtype it is tried with: with and without a mask, three inputs
# backward, and each dtype.
EPILOGUES = (
    ("relu", True, torch.bfloat16),
    ("relu", False, torch.float32),
    ("gelu", True, torch.float64),
    ("silu", True, torch.float16),
    ("leaky_relu", True, torch.float32),
)


def ways_with_an_epilogue() -> list[object]:
    """Each way with the first epilogue, and with one of the others in turn; eval on a few of the ways."""
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
    kernel_device: str,
) -> None:
    with planned_for(path.limits, kernel_device) as device:
        x, g = make_input(*case, dtype, device), make_grad(*case, dtype, device)
        residual = make_residual(*case, dtype, device) if has_residual else None
        params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
        for training in modes:
            check_backward(x, g, params, training=training, residual=residual, act=act, output_too=True)


@pytest.mark.parametrize(
    ("path", "case", "act", "has_residual", "dtype"),
    [pytest.param(*way.values, *EPILOGUES[i % 5], id=way.id) for i, way in enumerate(FEW_WAYS)],
)
def test_an_output_again(
    path: Path, case: Case, act: str, has_residual: bool, dtype: torch.dtype, kernel_device: str
) -> None:
    """By a kernel without a reduction, the bits of the one with it."""
    with planned_for(path.limits, kernel_device) as device:
        x, residual = make_input(*case, dtype, device), make_residual(*case, dtype, device) if has_residual else None
        params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
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
def test_a_mask_in_place_of_the_input(path: Path, case: Case, dtype: torch.dtype, kernel_device: str) -> None:
    # Frozen parameters: backward has the gradient and the mask, and nothing else.
    with planned_for(path.limits, kernel_device) as device:
        x, g = make_input(*case, dtype, device).requires_grad_(), make_grad(*case, dtype, device)
        residual = make_residual(*case, dtype, device).requires_grad_()
        params = make_parameters(case.shape[1], parameter_dtype(dtype), device)
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
def test_an_epilogue_on_coefficients_float32_cannot_hold(path: Path, case: Case, kernel_device: str) -> None:
    # A channel of magnitude 1e37 has a scale of 1e-37: the sums begin in float64, and so does the map.
    with planned_for(path.limits, kernel_device) as device:
        x, g = make_input(*case, torch.float32, device), make_grad(*case, torch.float32, device)
        x[:, 1] *= 1e37
        params = make_parameters(case.shape[1], device=device)
        residual = make_residual(*case, torch.float32, device)
        check_backward(x, g, params, training=True, residual=residual, act="silu")


@pytest.mark.parametrize(("path", "case"), FEW_WAYS)
def test_an_infinite_gradient_where_the_sums_begin_in_float64(path: Path, case: Case, kernel_device: str) -> None:
    # float64 sums are final, whatever they are, and no other channel's concern.
    with planned_for(path.limits, kernel_device) as device:
        x, g = make_input(*case, torch.float32, device), make_grad(*case, torch.float32, device)
        x[:, 1] *= 1e37
        params = make_parameters(case.shape[1], device=device)

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


@pytest.mark.parametrize(("act", "has_residual"), [("identity", False), ("relu", True)])
def test_blocks_that_share_the_additions_of_an_all_reduce(act: str, has_residual: bool, kernel_device: str) -> None:
    # Two hundred values over a dozen blocks: each adds up some of them, the last one fewer.
    limits = Limits(sms=16, max_cluster=1, shared_per_block=60 * KB)
    case = Case((20, 100, 7, 7), "channels_last")
    with planned_for(limits, kernel_device, seed=1) as device:
        x, g = make_input(*case, torch.bfloat16, device), make_grad(*case, torch.bfloat16, device)
        residual = make_residual(*case, torch.bfloat16, device) if has_residual else None
        params = make_parameters(case.shape[1], parameter_dtype(torch.bfloat16), device)
        check_backward(x, g, params, training=True, residual=residual, act=act, output_too=True)
        # A channel whose squares overflow is added up again: there is a second all-reduce in the places of the first.
        large = x.clone(memory_format=torch.preserve_format)
        large[:, 1] *= 1e19
        check_forward(large, params, training=True)
        if kernel_device == "simt":
            plan = last_plan()
            assert 1 < plan["share"] < 2 * case.shape[1]
            assert 2 * case.shape[1] % plan["share"] != 0


@pytest.mark.parametrize("act", ["relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_a_masks_bits_at_the_edges_of_a_rectifier(dtype: torch.dtype, act: str, kernel_device: str) -> None:
    # Where the input is zero, the pre-activation is the residual.
    tiny, inf, nan = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, float("inf"), float("nan")
    edges = [tiny, nan, 0.0, -tiny, 6.0, -0.0, inf, -inf, 1.0, 5.5, -1.0, 7.0, -3e-3, 3e-3, -nan]
    with planned_for(Limits(), kernel_device) as device:
        # Whole vectors, with each of the fifteen values at each place of a byte.
        residual = torch.tensor(edges, dtype=dtype, device=device).repeat(8 * 16).view(3, 5, 8, 16)
        zero, one = torch.zeros(5, dtype=dtype, device=device), torch.ones(5, dtype=dtype, device=device)
        call = (torch.zeros_like(residual), None, None, zero, one, 1e-5, residual, act, 0.25, True)
        _, _, mask = torch.ops.bnext.batch_norm_eval(*call)
        places = torch.arange(16 // dtype.itemsize, device=device)
        bits = (mask.view(3, 5, -1, 1) >> places & 1).flatten(2)[..., : 8 * 16]
        is_open = ~(residual <= 0) & ~((residual >= 6) & (act == "relu6"))
        assert torch.equal(bits.view(residual.shape) == 1, is_open)


def test_a_mask_that_begins_at_an_odd_address(kernel_device: str) -> None:
    with planned_for(Limits(), kernel_device) as device:
        case = Case((4, 8, 8, 8), "contiguous")
        x, g = make_input(*case, torch.float32, device), make_grad(*case, torch.float32, device)
        residual = make_residual(*case, torch.float32, device)
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


def test_the_ways_lead_everywhere() -> None:
    load()
    seen = set()
    for way in WAYS:
        path, (shape, layout) = way.values
        for dtype in DTYPES:
            for inputs in (1, 2, 3):
                batch, channels, height, width = shape
                last = layout != "contiguous"
                call = (inputs, False, True, inputs == 3)
                plan = torch.ops.bnext_simt.plan(
                    batch, channels, height * width, last, dtype, *call, *path.limits[:3], 50 << 20, True
                )
                kind = "folded" if last and plan["row_width"] > channels else layout
                large_cluster = GROUPS[plan["group"]] == "cluster" and plan["group_blocks"] > 8
                way_taken = (GROUPS[plan["group"]], large_cluster, plan["ring"] > 0)
                seen.add((*way_taken, TILES[plan["tile"]], kind, dtype, inputs))
    tiles = (("channel", "contiguous"), ("columns", "contiguous"), ("columns", "channels_last"), ("columns", "folded"))
    wanted = {
        (path.group, path.large_cluster, path.two_reads, *tile, dtype, inputs)
        for path in PATHS
        for tile in (tiles if path.layouts == LAYOUTS else (tiles[0], tiles[3]))
        for dtype in DTYPES
        for inputs in (1, 2, 3)
        if (dtype, inputs) != (torch.float64, 3)  # too much for some of these devices to read once
    }
    assert wanted - seen == set()


@pytest.mark.parametrize(("path", "case"), WAYS)
def test_a_channel_float32_cannot_hold(path: Path, case: Case, kernel_device: str) -> None:
    # Its squares overflow: the group adds it up again in float64, and its neighbours keep the sums they have.
    with planned_for(path.limits, kernel_device) as device:
        values, g = make_input(*case, torch.float32, device), make_grad(*case, torch.float32, device)
        values[:, 0] += 1e3
        params = make_parameters(case.shape[1], device=device)
        large = values.clone(memory_format=torch.preserve_format)
        large[:, 1] *= 1e19  # a variance that running_var still holds
        check_forward(large, params, training=True)
        # Backward it is the products with the gradient that overflow.
        values[:, 1] *= 1e30
        g[:, 1] *= 1e9
        check_backward(values, g, params, training=True)


@pytest.mark.parametrize(("path", "case"), WAYS)
def test_bias_gradient_without_the_input(path: Path, case: Case, kernel_device: str) -> None:
    with planned_for(path.limits, kernel_device) as device:
        g = make_grad(*case, torch.float32, device)
        stats = torch.stack([torch.zeros(case.shape[1]), torch.full((case.shape[1],), 2.0)]).double().to(device)
        backward = torch.ops.bnext.batch_norm_backward
        grad_input, grad_weight, grad_bias, _ = backward(g, None, None, stats, False, 1e-5, [True, False, True, False])
        assert same_bits(grad_input, g * 2)
        assert grad_weight.numel() == 0
        expected = reference.widen(g).sum(reference.reduced_dims(g.ndim))
        assert_within(grad_bias, expected, tolerances.grad_bias(g, g.dtype, grad_bias.dtype), "grad_bias")
        # And in training, where nothing is mapped.
        _, _, alone, _ = backward(g, None, None, stats, True, 1e-5, [False, False, True, False])
        assert same_bits(alone, grad_bias)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("momentum", [0.25, None], ids="momentum={}".format)
def test_counter_in_the_same_launch(path: Path, momentum: float | None, kernel_device: str) -> None:
    train = torch.ops.bnext.batch_norm_train
    with planned_for(path.limits, kernel_device) as device:
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
