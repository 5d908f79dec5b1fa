"""Ghost batches: one call normalises each part of a batch by itself, as a loop over the parts would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import check_batch, random_mask
from cases import DTYPES, Case, make_input, make_parameters
from checks import make_inputs
from marks import FLAGS, PLAIN_OR_ACT, pairs
from refusals import remember

import bnext
from bnext.functional import batch_norm

# In parts of the sizes below these are batches of 16 parts or more, which threads share; of a shorter last part; and of
# one part alone.
CASES = [
    Case((33, 17), "contiguous"),
    Case((37, 5, 6), "contiguous"),
    Case((37, 5, 6), "channels_last"),
    Case((7, 64, 7, 7), "contiguous"),
    Case((7, 64, 7, 7), "channels_last"),
    Case((5, 3, 40, 40), "contiguous"),
    Case((4, 3, 2, 3, 5), "channels_last_3d"),
    Case((6, 5, 7, 3), "sliced"),
]


@pairs(case=CASES, dtype=DTYPES, act=PLAIN_OR_ACT, has_residual=FLAGS, size=(2, 3, 64), has_padding=FLAGS)
def test_each_part_is_normalised_by_itself(
    case: Case, dtype: torch.dtype, act: Any, has_residual: bool, size: int, has_padding: bool
) -> None:
    if case.shape[0] % size == 1 and len(case.shape) == 2:
        size += 1  # a last part of one row would be refused
    inputs = make_inputs(*case, dtype, has_residual=has_residual, grad_layout=case.layout)
    check_batch(inputs, random_mask(case.shape) if has_padding else None, size, act=act)


@pytest.mark.parametrize("momentum", [0.3, None], ids="momentum={}".format)
def test_running_statistics_are_those_of_a_loop(momentum: float | None) -> None:
    x, p = make_input((37, 5, 6)), make_parameters(5)
    layers = [bnext.BatchNorm1d(5, momentum=momentum) for _ in range(2)]
    for layer in layers:
        layer.load_state_dict({**p._asdict(), "num_batches_tracked": torch.tensor(2)})
    layers[0].virtual_batch_size = 4
    y = layers[0](x)
    expected = torch.cat([layers[1](part) for part in x.split(4)])
    assert torch.allclose(y, expected, rtol=1e-6, atol=1e-6)
    for name, value in layers[1].state_dict().items():
        assert torch.allclose(layers[0].state_dict()[name], value, rtol=1e-6), name
    assert layers[0].num_batches_tracked == 12
    evaluations = [layer.eval()(x) for layer in layers]  # evaluation has no parts
    assert torch.allclose(*evaluations, rtol=1e-5, atol=1e-6)


def test_an_empty_batch_is_one_part() -> None:
    layer = bnext.BatchNorm1d(3)
    layer.virtual_batch_size = 2
    assert layer(torch.empty(0, 3, 4)).shape == (0, 3, 4)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["fused", "compiled"])
def test_a_converted_model_fuses_and_compiles_ghost_batches(compiled: bool) -> None:
    def model() -> torch.nn.Sequential:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())

    x = make_input((6, 3, 7, 7))
    theirs = model()
    expected = torch.cat([theirs(part) for part in x.split(4)])
    ours = bnext.convert(model(), fuse=not compiled)
    ours[1].virtual_batch_size = 4
    call = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    assert torch.allclose(call(x), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(ours[1].running_var, theirs[1].running_var, rtol=1e-5)
    ours[1].virtual_batch_size = None  # what was captured before takes the new value
    assert torch.allclose(call(x), theirs(x), rtol=1e-5, atol=1e-6)
    assert ours[1].num_batches_tracked == 3
    if not compiled:
        assert [name for name, _ in bnext.fusion_report(ours).fused] == ["1"]


@pytest.mark.parametrize("size", [1, 4])
def test_a_part_of_a_single_value_is_refused_before_anything_is_written(size: int) -> None:
    x, layer = make_input((9, 3)), bnext.BatchNorm1d(3)
    layer.virtual_batch_size = size
    unchanged = remember(layer.state_dict(keep_vars=True))
    message = f"more than 1 value per channel.*virtual_batch_size={size}"
    with pytest.raises(ValueError, match=message):
        layer(x)
    with pytest.raises(ValueError, match=message):
        batch_norm(x, layer.running_mean, layer.running_var, training=True, virtual_batch_size=size)
    unchanged()
