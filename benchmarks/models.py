"""The models of the model suites, each with the layers of a provider, eager or compiled."""

import copy
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnext
from benchmarks import networks
from benchmarks.memory import checkpointed_to, held_by
from benchmarks.operators import MEMORY_FORMATS, SEED
from benchmarks.suites import CHECKPOINT, COMPILE, RECOMPUTE, WITHOUT, Case
from benchmarks.traffic import Shape

# Of torch.compile, by the provider whose it is: bnext's fuses what it finds in torch's own layers.
BACKENDS = {"torch-compile": "inductor", "bnext-compile": "bnext"}

# In which the reference of a dtype is computed.
REFERENCE_DTYPES = {"float32": torch.float64, "bfloat16": torch.float32}


def conv_bn_relu(shape: Shape) -> nn.Module:
    channels = shape[1]
    layers = [(networks.conv(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)) for _ in range(3)]
    return nn.Sequential(*(layer for block in layers for layer in block))


# By name, told the shape of the input; "package/name" is torchvision's or timm's.
MODELS: dict[str, Callable[[Shape], nn.Module]] = {
    "resnet50": lambda _: networks.ResNet50(),
    "bn": lambda shape: nn.BatchNorm2d(shape[1]),
    "conv-bn-relu": conv_bn_relu,
    "bottleneck": lambda shape: networks.Bottleneck(shape[1], shape[1] // networks.EXPANSION),
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


def make_model(case: Case, device: str) -> nn.Module:
    """torch's layers, the same values at every call; the caller's random numbers are left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        package, _, name = case.model.rpartition("/")
        model = make_packaged(package, name) if package else MODELS[name](case.shape)
    return model.to(device, memory_format=MEMORY_FORMATS[case.layout])


def make_data(case: Case, device: str, shape: Shape, seed: int = SEED) -> Tensor:
    """Normal values in the layout, the same on every device. Another seed, other values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(shape).normal_(generator=generator)
    return values.to(device).contiguous(memory_format=MEMORY_FORMATS[case.layout])


def remove_batch_norms(model: nn.Module) -> None:
    """Each becomes nothing, or the activation that is in it, as in timm's BatchNormAct2d."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _BatchNorm):
            model.set_submodule(name, getattr(module, "act", nn.Identity()))


def build(case: Case, provider: str, model: nn.Module, device: str) -> Built:
    """A copy of the model with a provider's layers, or for its back end."""
    module = copy.deepcopy(model)
    if provider == WITHOUT:
        remove_batch_norms(module)
    elif provider == CHECKPOINT:
        input = make_data(case, device, case.shape)
        recomputing = bnext.convert(copy.deepcopy(model), fuse=True, recompute=True)
        held_by(recomputing, input)  # what the first call makes stays
        module = checkpointed_to(model, input, held_by(recomputing, input))
    elif provider in ("bnext", "bnext-fused", RECOMPUTE):
        bnext.convert(module, fuse=provider != "bnext", recompute=provider == RECOMPUTE)
    call: Callable[[Tensor], Tensor] = module
    if provider.endswith(COMPILE):
        call = torch.compile(module, backend=BACKENDS[provider], dynamic=False, fullgraph=True)
    enabled = case.dtype == "bfloat16"
    return Built(module, call, lambda: torch.autocast(device, torch.bfloat16, enabled=enabled))


def build_reference(case: Case, model: nn.Module, device: str) -> Built:
    """torch's layers, eager, in a dtype in which rounding is nothing beside the case's."""
    module = copy.deepcopy(model).to(REFERENCE_DTYPES[case.dtype])
    return Built(module, module, lambda: torch.autocast(device, torch.bfloat16, enabled=False))


# Models of packages.

_declared: list[torch.library.Library] = []  # what is declared is so for as long as its library lives


def make_packaged(package: str, name: str, **options: object) -> nn.Module:
    """A model by its package's name of it, untrained; raises ModuleNotFoundError where the package is missing."""
    torchvision = import_torchvision()  # which timm imports too
    if package == "torchvision":
        return torchvision.models.get_model(name, weights=None, **options)
    import timm

    return timm.create_model(name, **options)


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled part does not load, as the CUDA build's beside a CPU build of torch.

    Models need none of it, but without the operators whose fake kernels it registers, importing fails.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what was imported of it before it failed
        _declare_operators()
        import torchvision
    return torchvision


def _declare_operators() -> None:
    folder = Path(find_spec("torchvision").origin).parent
    source = (folder / "_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in set(re.findall(r'register_fake\("torchvision::(\w+)"', source)):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor input) -> Tensor")
    _declared.append(library)
