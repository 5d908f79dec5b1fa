"""Tools that look for torch's batch norms, by class or by function, find those of a converted model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import bnext

Converted = Callable[[nn.Module], nn.Module]


def test_fx_folds_batch_norms_into_convolutions(network: nn.Module, converted: Converted, image: Tensor) -> None:
    from torch.fx.experimental import optimization

    folded = optimization.fuse(converted(network.eval()))
    assert not [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(folded(image), network(image))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
def test_eager_quantisation_fuses_by_class(
    training: bool, network: nn.Module, converted: Converted, image: Tensor
) -> None:
    from torch.ao.quantization import fuse_modules, fuse_modules_qat

    fuse = fuse_modules_qat if training else fuse_modules
    names = [["0", "1", "2"], ["3", "4", "5"]]
    models = [fuse(model, names) for model in (copy.deepcopy(network.train(training)), converted(network))]
    assert [type(m) for m in models[1].modules()] == [type(m) for m in models[0].modules()]
    torch.testing.assert_close(models[1](image), models[0](image), rtol=1e-5, atol=1e-5)


def test_opacus_refuses_a_converted_model(network: nn.Module, converted: Converted) -> None:
    validators = pytest.importorskip("opacus.validators")
    errors = [validators.ModuleValidator.validate(model) for model in (network, converted(network))]
    assert len(errors[0]) == 2
    assert [str(e) for e in errors[1]] == [str(e) for e in errors[0]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_operations_are_counted(network: nn.Module, converted: Converted, image: Tensor) -> None:
    fvcore = pytest.importorskip("fvcore.nn")
    counts = [
        fvcore.FlopCountAnalysis(model.eval(), image).unsupported_ops_warnings(False).by_operator()
        for model in (network, converted(network))
    ]
    assert counts[0]["batch_norm"] > 0
    assert counts[1] == counts[0]


class Recorder(TorchFunctionMode):
    """Records the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def test_a_function_mode_sees_torchs_functions(network: nn.Module, converted: Converted, image: Tensor) -> None:
    seen = []
    for model in (network, converted(network)):
        with Recorder() as recorder:
            model(image)
        seen.append([f for f in recorder.seen if "batch_norm" in str(f)])
    assert nn.functional.batch_norm in seen[0]
    assert seen[1] == seen[0]


def test_a_default_device_leaves_bnexts_functions_in_use(network: nn.Module, image: Tensor) -> None:
    model = bnext.convert(network)
    with torch.device("cpu"):
        assert "BNext" in model[:2](image).grad_fn.name()


class Noted(Tensor):
    """A tensor that passes a note on to the results of functions."""

    note = ""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, cls):
            result.note = next(a.note for a in args if isinstance(a, cls)) + function.__name__ + " "
        return result


def test_a_subclass_passes_on_what_it_carries(network: nn.Module, converted: Converted, image: Tensor) -> None:
    notes = []
    for model in (network, converted(network)):
        x = image.as_subclass(Noted)
        x.note = "mine: "
        y = model(x)
        assert type(y) is Noted
        notes.append(y.note)
    assert notes[0].count("batch_norm") == 2
    assert notes[1] == notes[0]


def test_the_graph_shows_what_is_saved(image: Tensor) -> None:
    layers = [make(3, eps=1e-3) for make in (nn.BatchNorm2d, bnext.BatchNorm2d)]
    theirs, ours = (layer(image.requires_grad_()).grad_fn for layer in layers)
    assert ours._saved_input is image
    assert ours._saved_weight is layers[1].weight
    for name in ("_saved_result1", "_saved_result2"):
        torch.testing.assert_close(getattr(ours, name).float(), getattr(theirs, name))
    assert (ours._saved_training, ours._saved_eps) == (theirs._saved_training, theirs._saved_eps) == (True, 1e-3)
    assert ours._saved_bias is ours._saved_residual is None
    ours(torch.ones_like(image))
    assert [f is None for f, _ in ours.next_functions] == [False, False, False, True]
    layer_output = layers[1](image)
    layer_output.sum().backward()
    with pytest.raises(RuntimeError, match="access saved tensors after they have already been freed"):
        _ = layer_output.grad_fn._saved_input
