"""Exported, traced and scripted models hold torch's own batch norm, and do what the unconverted model's do."""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bnext

Converted = Callable[[nn.Module], nn.Module]

# Warnings of the exporters themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch", "ignore::UserWarning:onnxscript"
)


def others(image: Tensor) -> Tensor:
    """The first image of a batch among other images."""
    return torch.cat([image[:1], 3 * image[1:] + 1])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_exported_model_has_torchs_operators(
    training: bool, strict: bool, network: nn.Module, converted: Converted, image: Tensor
) -> None:
    if strict and torch.__version__ < "2.13":
        pytest.skip("dynamo does not tell an export from a compilation before torch 2.13")
    network.train(training)
    programs = [torch.export.export(m, (image,), strict=strict) for m in (copy.deepcopy(network), converted(network))]
    calls = [[str(n.target) for n in p.graph.nodes if n.op == "call_function"] for p in programs]
    assert calls[0] == calls[1]
    assert "aten.batch_norm.default" in calls[1]
    graphs = [p.module() for p in programs]
    for _ in range(2):
        assert torch.equal(*(graph(image) for graph in graphs))
    torch.testing.assert_close(*(dict(graph.named_buffers()) for graph in graphs), rtol=0, atol=0)


@pytest.mark.parametrize("act", [None, "relu", "silu", ("leaky_relu", 0.2)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_layer_is_exported_in_training(momentum: float | None, act: bnext.modules.Act) -> None:
    """The batch may have any size. torch's layer with momentum=None cannot be exported; bnext's is, as its operator."""
    kind, options = (bnext.BatchNorm2d, {}) if act is None else (bnext.BatchNormAct2d, {"act": act})
    layer = kind(3, momentum=momentum, **options)
    images = [torch.randn(n, 3, 4, 4) for n in (4, 7)]
    inputs = [(x,) if act is None else (x, x.sin()) for x in images]
    batch = ({0: torch.export.Dim("batch", min=2, max=64)},) * len(inputs[0])
    program = torch.export.export(copy.deepcopy(layer), inputs[0], dynamic_shapes=batch)
    assert ("bnext" in program.graph_module.code) == (momentum is None)
    exported = program.module()
    for each in inputs:
        torch.testing.assert_close(exported(*each), layer(*each))
    torch.testing.assert_close(dict(exported.named_buffers()), dict(layer.named_buffers()))


def test_train_and_eval_of_an_exported_model(network: nn.Module, converted: Converted, image: Tensor) -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    exported = torch.export.export(converted(network), (image,)).module()
    pt2e.allow_exported_model_train_eval(exported)
    exported.eval()
    before = {name: b.clone() for name, b in exported.named_buffers() if "running" in name}
    torch.testing.assert_close(exported(others(image))[0], exported(image)[0])
    assert all(torch.equal(b, exported.get_buffer(name)) for name, b in before.items())
    exported.train()
    assert (exported(others(image))[0] - exported(image)[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    "training", [False, pytest.param(True, marks=pytest.mark.long)], ids=["after training", "quantisation-aware"]
)
def test_quantisation_folds_the_batch_norms(training: bool, network: nn.Module, image: Tensor) -> None:
    pt2e = pytest.importorskip("torchao.quantization.pt2e")
    steps = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=training))
    exported = torch.export.export(bnext.convert(network.train(training)), (image,)).module()
    prepared = (steps.prepare_qat_pt2e if training else steps.prepare_pt2e)(exported, quantizer)
    prepared(image)
    if training:
        pt2e.move_exported_model_to_eval(prepared)
    quantized = steps.convert_pt2e(prepared)
    assert not [n for n in quantized.graph.nodes if "batch_norm" in str(n.target)]
    torch.testing.assert_close(quantized(others(image))[0], quantized(image)[0])


@pytest.mark.parametrize("dynamo", [False, True], ids=["by tracing", "by export"])
def test_onnx(dynamo: bool, network: nn.Module, converted: Converted, image: Tensor, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    model = converted(network.eval())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        torch.onnx.export(model, (image,), tmp_path / "model.onnx", dynamo=dynamo)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (output,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), network(image), rtol=1e-6, atol=1e-6)


LOAD = """
import sys, torch
x, want = torch.load(sys.argv[3])
for load in (torch.jit.load(sys.argv[1]), torch.export.load(sys.argv[2]).module()):
    torch.testing.assert_close(load(x), want)
assert "bnext" not in sys.modules
"""


def test_artefacts_are_loaded_without_bnext(
    network: nn.Module,
    converted: Converted,
    image: Tensor,
    tmp_path: Path,
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    model = converted(network.eval())
    files = [str(tmp_path / name) for name in ("model.pt", "model.pt2", "data.pt")]
    torch.jit.trace(model, image).save(files[0])
    torch.export.save(torch.export.export(model, (image,)), files[1])
    torch.save((image, network(image)), files[2])
    done = run_python("-c", LOAD, *files)
    assert done.returncode == 0, done.stderr


def test_a_model_is_scripted(network: nn.Module, converted: Converted, image: Tensor) -> None:
    for training in (True, False):
        expected = copy.deepcopy(network).train(training)
        scripted = torch.jit.script(converted(network).train(training))
        assert "bnext" not in str(scripted.inlined_graph)
        assert torch.equal(scripted(image), expected(image))
        torch.testing.assert_close(dict(scripted.named_buffers()), dict(expected.named_buffers()))


def test_layers_of_bnexts_classes_are_scripted(image: Tensor) -> None:
    layer = bnext.BatchNorm2d(3).eval()
    torch.testing.assert_close(torch.jit.script(nn.Sequential(layer))(image), layer(image))


@pytest.mark.parametrize("cls", [bnext.BatchNormAct2d, bnext.SyncBatchNorm])
def test_other_layers_say_that_they_cannot_be_scripted(cls: type[nn.Module]) -> None:
    with pytest.raises(NotImplementedError, match=rf"bnext\.{cls.__name__} cannot be scripted"):
        torch.jit.script(nn.Sequential(cls(3)))
