"""The CUDA kernels for padding and for batches of several parts, compared with the definition in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import reference
import torch
from cases import Case, make_input, name, parameter_dtype, same_bits
from checks import make_inputs
from simt.device import Limits, emulated
from torch import Tensor
from ways import PlannedFor

EPS = 1e-5
SLOPE = 0.1  # of a leaky_relu


class Batch(NamedTuple):
    """A batch, and what is padding in it: "none", "lengths" of sequences, "random" positions, or the "second" part."""

    case: Case
    padding: str
    virtual_batch_size: int
    dtype: torch.dtype
    act: str = "identity"
    has_residual: bool = False

    def __str__(self) -> str:
        shape = "x".join(map(str, self.case.shape))
        parts = f"parts-of-{self.virtual_batch_size}" if self.virtual_batch_size else "whole"
        return f"{shape}-{self.case.layout}-{self.padding}-{parts}-{name(self.dtype)}-{self.act}"

    def part_of_image(self) -> Tensor:
        """For each image, the number of its part."""
        return torch.arange(self.case.shape[0]) // (self.virtual_batch_size or self.case.shape[0])

    def valid(self) -> Tensor | None:
        """Which positions are no padding; None if there is no padding."""
        images, _, *spatial = self.case.shape
        if self.padding == "none":
            return None
        if self.padding == "lengths":
            return torch.arange(spatial[0]) < torch.randint(spatial[0] // 4, spatial[0] + 1, (images, 1))
        if self.padding == "random":
            return torch.rand(images, *spatial) < 0.6
        return (self.part_of_image() != 1).reshape(images, *[1] * len(spatial)).expand(images, *spatial)


class Inputs(NamedTuple):
    """The tensors of a call. x, g and residual are NaN in the padding."""

    x: Tensor
    g: Tensor
    residual: Tensor | None
    valid: Tensor | None
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def inputs_of(batch: Batch, device: str) -> Inputs:
    valid = batch.valid()
    x, g, params, residual = make_inputs(*batch.case, batch.dtype, "cpu", batch.has_residual, batch.case.layout)
    data = [x, g, residual]
    if valid is not None:
        for tensor in data:
            if tensor is not None:
                tensor.masked_fill_(~valid.unsqueeze(1), float("nan"))
    tensors = [*data, valid, *params]
    return Inputs(*(None if tensor is None else tensor.to(device) for tensor in tensors))


class Expected(NamedTuple):
    """The results in float64. Statistics have a row for each part."""

    output: Tensor
    mean: Tensor
    var: Tensor
    count: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor
    grad_residual: Tensor


def by_definition(batch: Batch, inputs: Inputs, running: bool = False) -> Expected:
    """Each part is normalised by its own statistics, or by the running ones; the gradients are autograd's."""
    shape = batch.case.shape
    wide = [None if tensor is None else reference.widen(tensor).cpu() for tensor in inputs]
    valid = torch.ones(shape[0], *shape[2:], dtype=torch.bool) if inputs.valid is None else inputs.valid.cpu()
    along = valid.unsqueeze(1).expand(shape)
    x, g, residual = (torch.zeros(shape).double() if t is None else torch.where(along, t, 0) for t in wide[:3])
    leaves = [t.requires_grad_() for t in (x, wide[4], wide[5], residual)]
    z, rows = residual, []
    for part in batch.part_of_image().unique():
        chosen = along & (batch.part_of_image() == part).reshape(-1, *[1] * (len(shape) - 1))
        values = x.movedim(1, 0)[chosen.movedim(1, 0)].reshape(shape[1], -1)
        if values.shape[1] == 0:
            rows.append((torch.zeros(shape[1]).double(), torch.full((shape[1],), float("inf")).double(), 0))
            continue
        mean = wide[6] if running else values.mean(1)
        var = wide[7] if running else (values - mean[:, None]).square().mean(1)
        mean_of_x, scale, bias = (
            reference.along_channels(vector, len(shape)) for vector in (mean, wide[4] * (var + EPS).rsqrt(), wide[5])
        )
        z = torch.where(chosen, (x - mean_of_x) * scale + bias + residual, z)
        rows.append((mean.detach(), var.detach(), values.shape[1]))
    y = torch.where(along, reference.activate(z, (batch.act, SLOPE)), 0)
    means, variances, counts = zip(*rows, strict=True)
    gradients = torch.autograd.grad(y, leaves, torch.where(along, g, 0))
    return Expected(y.detach(), torch.stack(means), torch.stack(variances), torch.tensor(counts), *gradients)


def assert_near(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, scale: float = 1.0) -> None:
    """Within a rounding or two to `dtype`; `scale` is the size of what was added up."""
    unit = {torch.float64: 2e-13, torch.float32: 4e-7, torch.bfloat16: 2**-8}[dtype]
    torch.testing.assert_close(
        actual.double().cpu(), expected, rtol=4 * unit, atol=4 * unit * scale, msg=lambda text: f"{what}: {text}"
    )


def running_after(inputs: Inputs, expected: Expected, momentum: float | None) -> tuple[Tensor, Tensor]:
    """The running statistics after a loop over the parts, which skips a part without values. 7 batches came before."""
    mean, var = reference.widen(inputs.running_mean).cpu(), reference.widen(inputs.running_var).cpu()
    for part, count in enumerate(expected.count.tolist()):
        share = 1 / (8 + part) if momentum is None else momentum
        if count == 0:
            continue
        assert count > 1
        # Rounded to the dtype that they are kept in, after each part.
        mean = ((1 - share) * mean + share * expected.mean[part]).to(inputs.running_mean.dtype).double()
        unbiased = expected.var[part] * count / (count - 1)
        var = ((1 - share) * var + share * unbiased).to(inputs.running_var.dtype).double()
    return mean, var


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16

# Planes that are no multiple of a vector and planes that are; more and fewer channels than a warp has threads; a last
# part of fewer images; parts that several blocks share, the last one by more blocks than merge their sums at once.
BATCHES = (
    Batch(Case((4, 3, 50), "contiguous"), "lengths", 0, F32),
    Batch(Case((4, 3, 50), "channels_last"), "lengths", 0, BF16, "silu", True),
    Batch(Case((5, 6, 7, 7), "contiguous"), "random", 2, BF16, "relu", True),
    Batch(Case((5, 19, 3, 5), "channels_last"), "random", 2, F32, "relu", True),
    Batch(Case((5, 2, 3, 4), "channels_last"), "random", 2, BF16, "leaky_relu", True),
    Batch(Case((6, 40, 4, 4), "channels_last"), "none", 4, F64, "silu", True),
    Batch(Case((6, 3, 4, 4), "contiguous"), "none", 4, F32),
    Batch(Case((11, 9), "contiguous"), "random", 4, F64),
    Batch(Case((5, 4, 3, 3), "contiguous"), "second", 2, F32, "relu", True),
    Batch(Case((5, 4, 3, 3), "channels_last"), "second", 2, F64),
    Batch(Case((2, 2, 53, 80), "contiguous"), "random", 0, F32),
    Batch(Case((9, 1, 64, 64), "channels_last"), "random", 0, F32, "relu"),
)


def check_gradients(
    batch: Batch, inputs: Inputs, expected: Expected, stats: Tensor, mask: Tensor | None, training: bool
) -> None:
    """Compares the gradients by the mask, where there is one, and those by the pre-activation."""
    activated = batch.act != "identity"
    wanted = [True, True, True, activated]
    masks = [None] if mask is None else [mask, None]
    for given in masks:
        residual = None if given is not None else inputs.residual
        gradients = torch.ops.bnext.batch_norm_backward(
            inputs.g, inputs.x, inputs.weight, stats, training, EPS, wanted, inputs.bias, residual, given,
            batch.act, SLOPE, None, inputs.valid, batch.virtual_batch_size,
        )  # fmt: skip
        terms = max(1.0, inputs.x.numel() / inputs.x.shape[1]) ** 0.5
        # The derivative of an activation is as accurate as the data's dtype, and so are the sums of what it multiplies.
        sums = batch.dtype if activated else parameter_dtype(batch.dtype)
        names = ("grad_input", "grad_weight", "grad_bias", "grad_residual")
        dtypes, scales = (batch.dtype, sums, sums, batch.dtype), (2, terms, terms, 1)
        for what, actual, dtype, scale in zip(names, gradients, dtypes, scales, strict=True):
            if what != "grad_residual" or activated:
                assert_near(actual, getattr(expected, what), dtype, what, scale)
        assert_padding_is_zero(inputs, gradients[0], gradients[3] if activated else None)


def assert_padding_is_zero(inputs: Inputs, *results: Tensor | None) -> None:
    for result in results:
        if inputs.valid is not None and result is not None:
            assert not result.movedim(1, -1)[~inputs.valid].any()


@pytest.mark.parametrize(
    ("batch", "momentum"), [pytest.param(batch, (0.1, None)[i % 2], id=str(batch)) for i, batch in enumerate(BATCHES)]
)
def test_training(batch: Batch, momentum: float | None, planned_for: PlannedFor) -> None:
    with planned_for(Limits(), seed=0 if momentum is None else 1) as device:
        inputs = inputs_of(batch, device)
        expected = by_definition(batch, inputs)
        mean, var, counter = inputs.running_mean.clone(), inputs.running_var.clone(), torch.tensor(7, device=device)
        rectifies = batch.act in ("relu", "leaky_relu")
        vectors, epilogue = (inputs.weight, inputs.bias), (inputs.residual, batch.act, SLOPE)
        parts = (inputs.valid, batch.virtual_batch_size)
        y, stats, mask = torch.ops.bnext.batch_norm_train(
            inputs.x, *vectors, mean, var, counter, momentum, EPS, *epilogue, rectifies, *parts
        )
        assert_near(y, expected.output, batch.dtype, "output", scale=2)
        assert_padding_is_zero(inputs, y)
        by_part = stats.reshape(-1, 2, batch.case.shape[1])
        assert_near(by_part[:, 0], expected.mean, torch.float64, "mean")
        assert_near(by_part[:, 1], (expected.var + EPS).rsqrt(), torch.float64, "invstd")
        for actual, after in zip((mean, var), running_after(inputs, expected, momentum), strict=True):
            assert_near(actual, after, parameter_dtype(batch.dtype), "running statistics")
        assert counter == 7 + len(expected.count)
        assert same_bits(torch.ops.bnext.batch_norm_recompute(inputs.x, stats, *vectors, *epilogue, *parts), y)
        check_gradients(batch, inputs, expected, stats, mask if rectifies else None, training=True)


@pytest.mark.parametrize("batch", [batch for batch in BATCHES if batch.padding in ("lengths", "random")][:4], ids=str)
def test_evaluation(batch: Batch, planned_for: PlannedFor) -> None:
    batch = batch._replace(virtual_batch_size=0)
    with planned_for(Limits()) as device:
        inputs = inputs_of(batch, device)
        expected = by_definition(batch, inputs, running=True)
        rectifies = batch.act in ("relu", "leaky_relu")
        y, stats, mask = torch.ops.bnext.batch_norm_eval(
            inputs.x, inputs.weight, inputs.bias, inputs.running_mean, inputs.running_var, EPS,
            inputs.residual, batch.act, SLOPE, rectifies, inputs.valid,
        )  # fmt: skip
        assert_near(y, expected.output, batch.dtype, "output", scale=4)
        assert_padding_is_zero(inputs, y)
        check_gradients(batch, inputs, expected, stats, mask if rectifies else None, training=False)
        # Except with silu, these gradients do not depend on the input.
        if batch.act == "silu":
            return
        activated = batch.act != "identity"
        dx, _, grad_bias, dz = torch.ops.bnext.batch_norm_backward(
            inputs.g, None, inputs.weight, stats, False, EPS, [True, False, True, activated], inputs.bias, None,
            mask if rectifies else None, batch.act, SLOPE, None, inputs.valid,
        )  # fmt: skip
        assert_near(dx, expected.grad_input, batch.dtype, "grad_input", scale=2)
        assert_near(grad_bias, expected.grad_bias, parameter_dtype(batch.dtype), "grad_bias", scale=20)
        assert_padding_is_zero(inputs, dx, dz if activated else None)


def test_a_batch_on_several_processes(planned_for: PlannedFor) -> None:
    """The operators that each process calls: its local stats, the output by gathered stats, and the gradient by means
    over all processes. One of the two processes holds nothing but padding."""
    batch = Batch(Case((4, 5, 6, 3), "contiguous"), "random", 0, torch.float32)
    with planned_for(Limits()) as device:
        inputs = inputs_of(batch, device)
        expected = by_definition(batch, inputs)
        local = torch.ops.bnext.batch_norm_stats(inputs.x, EPS, inputs.valid)
        count = float(expected.count[0])
        assert_near(local, torch.cat((expected.mean[0], expected.var[0] * count, torch.tensor([count]))), F64, "stats")
        nothing = torch.ops.bnext.batch_norm_stats(inputs.x, EPS, torch.zeros_like(inputs.valid))
        assert not nothing.any()
        gathered = torch.stack((nothing, local))
        y, stats, _ = torch.ops.bnext.batch_norm_gathered(
            inputs.x, gathered, inputs.weight, inputs.bias, None, None, None, 0.1, EPS, valid=inputs.valid
        )
        assert_near(y, expected.output, batch.dtype, "output", scale=2)
        means = torch.stack((expected.grad_weight, expected.grad_bias)).float().to(device) / count
        dx, *_ = torch.ops.bnext.batch_norm_backward(
            inputs.g, inputs.x, inputs.weight, stats, True, EPS, [True, False, False, False],
            mean_grads=means, valid=inputs.valid,
        )  # fmt: skip
        assert_near(dx, expected.grad_input, batch.dtype, "grad_input", scale=2)
        doubled, *_ = torch.ops.bnext.batch_norm_backward(
            inputs.g, inputs.x, inputs.weight, stats, True, EPS, [True, False, False, False],
            mean_grads=2 * means, valid=inputs.valid,
        )  # fmt: skip
        assert not torch.allclose(doubled, dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
def test_hard_channels(dtype: torch.dtype, planned_for: PlannedFor) -> None:
    """An infinite value spoils its part of its channel alone; values that are the same, far from zero, have a variance
    of zero; and squares may be more than float32 holds."""
    batch = Batch(Case((6, 4, 20, 21), "contiguous"), "random", 2, dtype)
    with planned_for(Limits()) as device:
        inputs = inputs_of(batch, device)
        x, valid = inputs.x, inputs.valid
        valid[2, 0, 0] = True
        x[2, :, 0, 0] = 0.5
        x[2, 0, 0, 0] = float("inf")
        x[:, 1] = 1e6 + 0.1
        x[:, 2] *= 1e30
        y, stats, _ = torch.ops.bnext.batch_norm_train(
            x, None, inputs.bias, None, None, None, 0.1, EPS, valid=valid, virtual_batch_size=2
        )
        assert stats[1, 0, 0] == float("inf")
        assert y.movedim(1, -1)[2:4][valid[2:4]][:, 0].isnan().all()
        # Other parts of the channel, and other channels of the part, have the results that they have without it.
        x[2, 0, 0, 0] = 0.5
        expected = by_definition(batch, inputs._replace(weight=torch.ones(4, dtype=dtype, device=device)))
        others = torch.ones_like(stats[:, 0], dtype=torch.bool).cpu()
        others[1, 0] = False
        assert_near(stats[:, 0].cpu()[others], expected.mean[others], torch.float64, "mean")
        assert same_bits(stats[:, 0, 1].cpu(), torch.full((3,), x[0, 1, 0, 0].item(), dtype=torch.float64))
        assert same_bits(stats[:, 1, 1].cpu(), torch.full((3,), EPS, dtype=torch.float64).rsqrt())
        constant = y[:, 1][valid]
        assert same_bits(constant, inputs.bias[1].expand_as(constant).contiguous())
        others[:, 1] = False  # its values are equal, and the definition's mean of them is rounded
        compared = others.repeat_interleave(2, 0).reshape(6, 4, 1, 1).expand(y.shape)
        assert_near(y.cpu()[compared], expected.output[compared], batch.dtype, "output", scale=2)


@pytest.mark.simt
def test_any_number_of_parts_takes_four_launches() -> None:
    """The launches read the valid elements alone."""
    x = make_input((24, 4, 6, 8), dtype=torch.float32)
    valid = torch.arange(24).reshape(-1, 1, 1).expand(24, 6, 8) % 2 == 0
    mean, var = torch.zeros(4), torch.ones(4)
    counters = torch.ops.bnext_simt.counters
    with emulated(Limits()):
        for size in (12, 2):
            counters()
            _, stats, _ = torch.ops.bnext.batch_norm_train(
                x, None, None, mean, var, None, 0.1, EPS, valid=valid, virtual_batch_size=size
            )
            counted = counters()
            plan = torch.ops.bnext_simt.last_part_plan()
            assert plan["parts"] == 24 // size
            assert counted["launches"] == 4  # sums, their end, the running statistics, the map
            read = 2 * x.nbytes // 2 + 2 * valid.numel() * x.shape[1]  # twice: half of x, and valid for each channel
            channels = plan["parts"] * x.shape[1]
            beside = channels * (3 * 8 * plan["threads_y"] + 200)  # coefficients for each thread of the map
            assert read <= counted["global_load_bytes"] <= read + beside
            counters()
            grads = [True, True, False, False]
            torch.ops.bnext.batch_norm_backward(
                x, x, None, stats, True, EPS, grads, valid=valid, virtual_batch_size=size
            )
            assert counters()["launches"] == 4


@pytest.mark.simt
@pytest.mark.parametrize(("batch", "splits", "rows"), [(BATCHES[-2], 4, 256), (BATCHES[-1], 18, 256)], ids=str)
def test_blocks_share_a_part(batch: Batch, splits: int, rows: int) -> None:
    """The last two batches above are shared by several blocks, one of them by more than merge their sums at once."""
    with emulated(Limits(), check=False):
        x = make_input(*batch.case)
        torch.ops.bnext.batch_norm_stats(x, EPS, batch.valid())
        plan = torch.ops.bnext_simt.last_part_plan()
        assert (plan["splits"], plan["threads_y"]) == (splits, rows)
