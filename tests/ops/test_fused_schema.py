"""The raw ops behind the fused op, as torch sees them: schemas, masks, fake kernels, opcheck, wrong arguments."""

from __future__ import annotations

import itertools
import math

import pytest
import reference
import tolerances
import torch
from cases import (
    ACTS,
    DTYPES,
    FEW_ACTS,
    FEW_CASES,
    LARGE_CASES,
    MEDIUM_CASES,
    RECTIFIERS,
    STRIDED_CASES,
    Case,
    make_grad,
    make_input,
    make_parameters,
    make_residual,
    name,
    parameter_dtype,
    same_bits,
)
from checks import significant_strides
from reference import Act
from test_errors import RAISES, WORDS, Wrong, assert_raises_and_leaves_alone
from test_ops import EMPTY_CASES
from tolerances import assert_within
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

train = torch.ops.bnext.batch_norm_train
evaluate = torch.ops.bnext.batch_norm_eval
backward = torch.ops.bnext.batch_norm_backward

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
EVERY_ACT = pytest.mark.parametrize("act", ACTS, ids=name)
FEW = pytest.mark.parametrize("act", FEW_ACTS, ids=name)
ONE_SIDED = pytest.mark.parametrize("act", ["relu", "relu6", ("leaky_relu", -0.5)], ids=name)


def act_args(act: Act) -> dict[str, object]:
    """The activation as the ops take it."""
    known, slope = reference.named(act)
    return {"act": known, "slope": slope}


class Call:
    """One problem and the ops on it."""

    def __init__(
        self, case: Case, dtype: torch.dtype, training: bool, act: Act, has_residual: bool = True, grad: bool = False
    ) -> None:
        p = make_parameters(case.shape[1], parameter_dtype(dtype))
        values = (make_input(*case, dtype), p.weight, p.bias, make_residual(*case, dtype))
        self.x, self.weight, self.bias, residual = (v.detach().requires_grad_(grad) for v in values)
        self.residual = residual if has_residual else None
        self.mean, self.var, self.counter = p.running_mean, p.running_var, torch.tensor(3)
        self.training, self.act, self.shape = training, act, case.shape
        # In the layout of the input: without the input, grad_output's decides the order of the sums.
        self.g = torch.empty_like(self.x).copy_(make_grad(case.shape, "contiguous", dtype)).requires_grad_(grad)

    def forward_args(self) -> tuple[object, ...]:
        stem = (self.x, self.weight, self.bias, self.mean, self.var)
        return (*stem, self.counter, 0.1, 1e-5) if self.training else (*stem, 1e-5)

    def forward(self, with_mask: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        op = train if self.training else evaluate
        return op(*self.forward_args(), self.residual, **act_args(self.act), with_mask=with_mask)

    def backward(
        self, stats: Tensor, wanted: tuple[bool, ...], mask: Tensor | None = None, **changes: object
    ) -> tuple[Tensor, ...]:
        args = {
            "grad_output": self.g,
            "input": self.x,
            "weight": self.weight,
            "save_stats": stats,
            "training": self.training,
            "eps": 1e-5,
            "output_mask": list(wanted),
            "bias": self.bias,
            "residual": self.residual if mask is None else None,
            "mask": mask,
            **act_args(self.act),
            **changes,
        }
        return backward(**args)

    def wanted(self) -> tuple[bool, ...]:
        return (True, True, True, self.act != "identity" and self.residual is not None)


def test_schemas_keep_names_and_marks() -> None:
    stem = ["input", "weight", "bias", "running_mean", "running_var"]
    fused = ["residual", "act", "slope", "with_mask"]
    backwards = ["grad_output", "input", "weight", "save_stats", "training", "eps", "output_mask", "bias", "residual"]
    expected = {
        train: ([*stem, "num_batches_tracked", "momentum", "eps", *fused], {*stem[3:], "num_batches_tracked"}),
        evaluate: ([*stem, "eps", *fused], set()),
        backward: ([*backwards, "mask", "act", "slope", "mean_grads"], set()),
    }
    for op, (names, written) in expected.items():
        schema = op.default._schema
        assert [a.name for a in schema.arguments] == names
        assert {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write} == written
        assert not any(r.alias_info for r in schema.returns), schema.name
    assert [len(op.default._schema.returns) for op in expected] == [3, 3, 4]


@MODES
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_the_identity_is_the_default(case: Case, training: bool) -> None:
    call = Call(case, torch.float32, training, "identity", has_residual=False)
    args = [t.clone() if isinstance(t, Tensor) else t for t in call.forward_args()]
    for a, b in zip((train if training else evaluate)(*args), call.forward(), strict=True):
        assert same_bits(a, b)
    _, stats, mask = call.forward()
    assert (mask.dtype, tuple(mask.shape)) == (torch.uint8, (0,))
    short = backward(call.g, call.x, call.weight, stats, training, 1e-5, [True, True, True, False])
    assert all(map(same_bits, short, call.backward(stats, (True, True, True, False))))
    assert short[3].shape == (0,)


def test_the_counter_is_counted_and_statistics_know_no_activation() -> None:
    plain = Call(FEW_CASES[3], torch.float32, True, "identity", has_residual=False)
    results = []
    for act in ACTS:
        call = Call(FEW_CASES[3], torch.float32, True, act)
        call.x, call.mean, call.var = plain.x, plain.mean.clone(), plain.var.clone()
        results.append((call.forward()[1], call.mean, call.var))
        assert call.counter.item() == 4
    stats = plain.forward()[1]
    for result in results:
        assert all(map(same_bits, result, (stats, plain.mean, plain.var)))


def mask_rows(shape: tuple[int, ...], layout: str) -> tuple[int, ...]:
    """The mask's leading sizes: planes, (N, C), or pixels, (N*spatial,)."""
    n, c, *spatial = shape
    return (n * math.prod(spatial),) if layout.startswith("channels_last") or not spatial else (n, c)


@MODES
@ONE_SIDED
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_mask_is_a_bit_an_element_and_says_all_that_backward_asks(
    case: Case, dtype: torch.dtype, act: Act, training: bool
) -> None:
    call = Call(case, dtype, training, act)
    plain, stats, none = call.forward(with_mask=False)
    call.counter.fill_(3)
    y, same_stats, mask = call.forward(with_mask=True)
    assert same_bits(y, plain)
    assert same_bits(same_stats, stats)
    assert (none.dtype, tuple(none.shape), mask.dtype) == (torch.uint8, (0,), torch.uint8)
    assert tuple(mask.shape[:-1]) == mask_rows(case.shape, case.layout)
    row = case.shape[1] if mask.ndim == 2 else call.x.numel() // (case.shape[0] * case.shape[1])
    assert 8 * mask.shape[-1] >= row
    assert mask.shape[-1] <= -(-row // 8) + 8

    from_mask = call.backward(stats, call.wanted(), mask)
    from_residual = call.backward(stats, call.wanted())
    assert all(map(same_bits, from_mask, from_residual))
    if act == "relu":
        assert torch.equal(from_mask[3], torch.where(y > 0, call.g, 0))


@MODES
@pytest.mark.parametrize("case", [*FEW_CASES, *MEDIUM_CASES, *LARGE_CASES[2:4]], ids=name)
def test_mask_has_the_same_bits_for_any_number_of_threads(case: Case, training: bool) -> None:
    before = torch.get_num_threads()
    call = Call(case, torch.float32, training, "relu")
    try:
        results = []
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            y, stats, mask = call.forward(with_mask=True)
            results.append([y, stats, mask, *call.backward(stats, call.wanted(), mask)])
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


@MODES
@FEW
@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "residual"])
def test_output_mask_computes_what_is_asked_and_nothing_else(with_mask: bool, act: Act, training: bool) -> None:
    for case in FEW_CASES:
        call = Call(case, torch.float32, training, act)
        kept = with_mask and reference.named(act)[0] in RECTIFIERS
        _, stats, bits = call.forward(with_mask=kept)
        mask = bits if kept else None
        everything = call.backward(stats, call.wanted(), mask)
        for asked in itertools.product((True, False), repeat=4):
            if asked[3] and not call.wanted()[3]:
                continue
            for want, got, full in zip(asked, call.backward(stats, asked, mask), everything, strict=True):
                if want:
                    assert same_bits(got, full), (case, asked)
                else:
                    assert got.shape == (0,), (case, asked)


@ONE_SIDED
@pytest.mark.parametrize("case", FEW_CASES, ids=name)
def test_with_a_mask_eval_needs_neither_input_nor_residual(case: Case, act: Act) -> None:
    call = Call(case, torch.float32, False, act)
    _, stats, mask = call.forward(with_mask=True)
    for asked in ((True, False, False, True), (True, False, True, False), (False, False, False, True)):
        expected = call.backward(stats, asked, mask)
        without = call.backward(stats, asked, mask, input=None, bias=None)
        assert all(map(same_bits, without, expected)), asked


@MODES
@EVERY_ACT
def test_opcheck_forward(act: Act, training: bool) -> None:
    op = (train if training else evaluate).default
    bits = reference.named(act)[0] in RECTIFIERS
    for case, grad, with_mask in ((FEW_CASES[0], True, False), (FEW_CASES[3], True, bits), (FEW_CASES[5], False, bits)):
        call = Call(case, torch.float32, training, act, grad=grad)
        options = {**act_args(act), "residual": call.residual, "with_mask": with_mask}
        torch.library.opcheck(op, call.forward_args(), options)


@MODES
@FEW
def test_opcheck_backward(act: Act, training: bool) -> None:
    for case, with_mask in ((FEW_CASES[3], False), (FEW_CASES[2], True)):
        call = Call(case, torch.float32, training, act)
        kept = with_mask and reference.named(act)[0] in RECTIFIERS
        _, stats, mask = call.forward(with_mask=kept)
        args = (call.g, call.x, call.weight, stats, training, 1e-5, list(call.wanted()), call.bias)
        torch.library.opcheck(
            backward.default, (*args, None if kept else call.residual, mask if kept else None), act_args(act)
        )


@MODES
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
@pytest.mark.parametrize("case", [*FEW_CASES, *STRIDED_CASES, *EMPTY_CASES], ids=name)
def test_fake_kernels_predict_shape_dtype_and_strides(case: Case, dtype: torch.dtype, act: Act, training: bool) -> None:
    call = Call(case, dtype, training, act)
    with_mask = act == "relu"
    op = train if training else evaluate
    options = {**act_args(act), "residual": call.residual, "with_mask": with_mask}
    real = op(*call.forward_args(), **options)
    again = (call.g, call.x, call.weight, real[1], training, 1e-5, list(call.wanted()), call.bias)
    more = {"residual": None if with_mask else call.residual, "mask": real[2] if with_mask else None, **act_args(act)}
    for run, args, keywords in ((op, call.forward_args(), options), (backward, again, more)):
        with FakeTensorMode() as mode:
            fake = lambda v: mode.from_tensor(v) if isinstance(v, Tensor) else v  # noqa: E731
            predicted = run(*map(fake, args), **{key: fake(value) for key, value in keywords.items()})
        for a, b in zip(predicted, run(*args, **keywords), strict=True):
            assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            assert significant_strides(a) == significant_strides(b)


@MODES
@FEW
@pytest.mark.parametrize("case", EMPTY_CASES, ids=name)
def test_empty_batch_counts_and_has_zero_parameter_gradients(case: Case, act: Act, training: bool) -> None:
    call = Call(case, torch.float32, training, act)
    kept = call.mean.clone(), call.var.clone()
    y, stats, _ = call.forward()
    assert y.shape == case.shape
    assert call.counter.item() == 3 + training
    assert all(map(same_bits, (call.mean, call.var), kept))
    grads = call.backward(stats, call.wanted())
    assert grads[0].shape == case.shape
    assert torch.equal(grads[1], torch.zeros(3))
    assert torch.equal(grads[2], torch.zeros(3))


WRONG_IN_FORWARD = [
    Wrong("shape", "residual", lambda: torch.ones(3, 5, 5, 1), (r"3, 5, 5, 3", r"3, 5, 5, 1")),
    Wrong("dtype", "residual", lambda: torch.ones(3, 5, 5, 3).double(), (WORDS[torch.float32], WORDS[torch.float64])),
    Wrong("meta", "residual", lambda: torch.ones(3, 5, 5, 3, device="meta"), ("cpu", "meta")),
    Wrong("unknown", "act", lambda: "swish", ("swish", "relu", "hardswish")),
    Wrong("empty", "act", lambda: "", ("relu", "hardswish")),
]
WRONG_IN_BACKWARD = [
    *WRONG_IN_FORWARD,
    Wrong("dtype", "mask", lambda: torch.zeros(3, 5, 8, dtype=torch.bool), (r"uint8|byte", WORDS[torch.bool])),
    Wrong("rows", "mask", lambda: torch.zeros(3, 4, 8, dtype=torch.uint8), (r"3, 4, 8",)),
    Wrong("short", "mask", lambda: torch.zeros(3, 5, 1, dtype=torch.uint8), (r"3, 5, 1",)),
    Wrong("flat", "mask", lambda: torch.zeros(30, dtype=torch.uint8), (r"\b30\b|\b1\b",)),
    Wrong("meta", "mask", lambda: torch.zeros(3, 5, 8, dtype=torch.uint8, device="meta"), ("cpu", "meta")),
    Wrong("short", "bias", lambda: torch.ones(4), (r"\b5\b", r"\b4\b")),
]


@MODES
@pytest.mark.parametrize("row", WRONG_IN_FORWARD, ids=str)
def test_wrong_argument_in_forward(row: Wrong, training: bool) -> None:
    call = Call(Case((3, 5, 5, 3), "contiguous"), torch.float32, training, "relu")
    names = [a.name for a in (train if training else evaluate).default._schema.arguments]
    args = dict(zip(names, call.forward_args(), strict=False))
    args |= {"residual": call.residual, "act": "relu", row.argument: row.value()}
    assert_raises_and_leaves_alone(
        lambda a: (train if training else evaluate)(**a), args, rf"\b{row.argument}\b", *row.message
    )


@MODES
@pytest.mark.parametrize("row", WRONG_IN_BACKWARD, ids=str)
def test_wrong_argument_in_backward(row: Wrong, training: bool) -> None:
    call = Call(Case((3, 5, 5, 3), "contiguous"), torch.float32, training, "silu" if row.argument != "mask" else "relu")
    _, stats, _ = call.forward()
    args = {"stats": stats, "wanted": call.wanted(), row.argument: row.value()}
    assert_raises_and_leaves_alone(lambda a: call.backward(**a), args, rf"\b{row.argument}\b", *row.message)


@MODES
def test_identity_has_no_business_with_the_residuals_gradient(training: bool) -> None:
    call = Call(FEW_CASES[2], torch.float32, training, "identity")
    _, stats, _ = call.forward()
    with pytest.raises(RAISES, match="output_mask"):
        call.backward(stats, (True, True, True, True))


@MODES
@EVERY_ACT
def test_raw_values_equal_the_reference(act: Act, training: bool) -> None:
    call = Call(FEW_CASES[3], torch.float32, training, act)
    frozen = {} if training else {"running_mean": call.mean, "running_var": call.var}
    fwd = reference.forward(call.x, call.weight, call.bias, **frozen, residual=call.residual, act=act)
    y, stats, _ = call.forward()
    options = {"training": training, "has_residual": True, "act": act}
    assert_within(y, fwd.output, tolerances.output(fwd, call.weight, call.bias, y.dtype, **options), "output")
    expected = reference.backward(call.g, fwd, call.weight, training=training, act=act)
    slack = tolerances.slack(call.g, fwd, call.weight, call.bias, y.dtype, **options)
    limit = tolerances.grad_input(expected.residual, fwd, call.weight, y.dtype, training=training, slack=slack)
    assert_within(call.backward(stats, call.wanted())[0], expected.input, limit, "grad_input")
