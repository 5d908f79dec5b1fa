"""The models of the model suites, each with the layers of a provider, eager or compiled."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnext
from benchmarks import networks, packages
from benchmarks.model_suites import COMPILE, WITHOUT, ModelCase
from benchmarks.operations import MEMORY_FORMATS, SEED
from benchmarks.resnet import EXPANSION, Bottleneck, ResNet50, conv
from benchmarks.suites import Shape

# Of torch.compile, by the provider whose it is: bnext's fuses what it finds in torch's own layers.
BACKENDS = {"torch-compile": "inductor", "bnext-compile": "bnext"}

# In which the reference of a dtype is computed.
REFERENCE_DTYPES = {"float32": torch.float64, "bfloat16": torch.float32}


def conv_bn_relu(shape: Shape) -> nn.Module:
    channels = shape[1]
    layers = [(conv(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) for _ in range(3)]
    return nn.Sequential(*(layer for block in layers for layer in block))


# By name, told the shape of the input; "package/name" is what packages.py makes.
MODELS: dict[str, Callable[[Shape], nn.Module]] = {
    "resnet50": lambda _: ResNet50(),
    "bn": lambda shape: nn.BatchNorm2d(shape[1]),
    "conv-bn-relu": conv_bn_relu,
    "bottleneck": lambda shape: Bottleneck(shape[1], shape[1] // EXPANSION),
    "resnet20": lambda _: networks.ResNet20(),
    "unet": lambda _: networks.UNet(),
    "dcgan-discriminator": lambda _: networks.discriminator(),
    "pointnet": lambda _: networks.PointNet(),
}


@dataclass(frozen=True)
class Built:
    """A provider's model. ``call`` runs ``module``, whose parameters and buffers are its own, under autocast or not."""

    module: nn.Module
    call: Callable[[Tensor], Tensor]
    autocast: Callable[[], AbstractContextManager[object]]

    def __call__(self, input: Tensor) -> Tensor:
        with self.autocast():
            return self.call(input)


def make_model(case: ModelCase, device: str) -> nn.Module:
    """torch's layers, the same values at every call; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        package, _, name = case.model.rpartition("/")
        model = packages.make(package, name) if package else MODELS[name](case.shape)
    return model.to(device, memory_format=MEMORY_FORMATS[case.layout])


def make_data(case: ModelCase, device: str, shape: Shape, seed: int = SEED) -> Tensor:
    """Normal values in the layout, the same on every device. Another seed, other values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(shape).normal_(generator=generator)
    return values.to(device).contiguous(memory_format=MEMORY_FORMATS[case.layout])


def remove_batch_norms(model: nn.Module) -> None:
    """Each becomes nothing, or the activation that is in it, as in timm's BatchNormAct2d."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            model.set_submodule(name, getattr(module, "act", nn.Identity()))


def build(case: ModelCase, provider: str, model: nn.Module, device: str) -> Built:
    """A copy of the model with a provider's layers, or for its back end."""
    module = copy.deepcopy(model)
    if provider == WITHOUT:
        remove_batch_norms(module)
    elif provider in ("bnext", "bnext-fused"):
        bnext.convert(module, fuse=provider == "bnext-fused")
    call: Callable[[Tensor], Tensor] = module
    if provider.endswith(COMPILE):
        call = torch.compile(module, backend=BACKENDS[provider], dynamic=False, fullgraph=True)
    enabled = case.dtype == "bfloat16"
    return Built(module, call, lambda: torch.autocast(device, torch.bfloat16, enabled=enabled))


def build_reference(case: ModelCase, model: nn.Module, device: str) -> Built:
    """torch's layers, eager, in a dtype in which rounding is nothing beside the case's."""
    module = copy.deepcopy(model).to(REFERENCE_DTYPES[case.dtype])
    return Built(module, module, lambda: torch.autocast(device, torch.bfloat16, enabled=False))
