"""Convolutional models of torchvision and timm, as people train them, with inputs that are small enough for a test."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

CLASSES = 5
_kept: list[torch.library.Library] = []  # what a Library declares is gone with it


@functools.cache
def why_not(library: str) -> str | None:
    """Why torchvision or timm cannot be imported; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not hasattr(torch.ops.torchvision, "nms"):
                _declare_operators()
            importlib.import_module(library)
    except (ImportError, RuntimeError) as error:
        return f"{library} cannot be imported here: {error}"
    return None


def _declare_operators() -> None:
    """What torchvision registers kernels for, where its own library does not load: PyPI's torchvision is built for
    CUDA, and beside a torch for the CPU its import would fail. No convolutional model calls any of them."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(spec.submodule_search_locations[0])
    for library in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:
            continue
    sources = "\n".join(path.read_text() for path in sorted(folder.glob("_*registrations.py")))
    _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in sorted(set(re.findall(r'\(\s*"torchvision::(\w+)"', sources))):
        _kept[-1].define(f"{name}(Tensor input) -> Tensor")


class RealModel(NamedTuple):
    library: str
    name: str
    size: int = 64  # height and width of the image: the deepest layers keep a few values a channel
    options: Mapping[str, object] = MappingProxyType({})
    long: bool = False  # only tested with --long

    def __str__(self) -> str:
        return f"{self.library} {self.name}"

    def make(self) -> nn.Module:
        """In float64, with the same random weights each time. Batch norms are as after some training: those that are
        zero at first hide what is before them."""
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(11)
            model = _create(self.library, self.name, self.options).double()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.5, 0.5)
        return model

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(13)
        return torch.randn(2, 3, self.size, self.size, dtype=torch.float64, generator=generator)


def _create(library: str, name: str, options: Mapping[str, object]) -> nn.Module:
    module = importlib.import_module("timm" if library == "timm" else "torchvision.models")
    create = module.create_model if library == "timm" else module.get_model
    model: nn.Module = create(name, num_classes=CLASSES, **options)
    return model


def tensors(output: object) -> list[Tensor]:
    """What a model gives: a tensor, or a dict or tuple of them."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


_BACKBONE = {"weights_backbone": None}

MODELS = [
    RealModel("torchvision", "resnet18"),
    RealModel("torchvision", "resnet50", long=True),
    RealModel("torchvision", "resnext50_32x4d", long=True),
    RealModel("torchvision", "wide_resnet50_2", long=True),
    RealModel("torchvision", "densenet121", long=True),
    RealModel("torchvision", "regnet_x_400mf", long=True),
    RealModel("torchvision", "regnet_y_400mf", long=True),
    RealModel("torchvision", "mobilenet_v2"),
    RealModel("torchvision", "mobilenet_v3_small"),
    RealModel("torchvision", "mobilenet_v3_large", long=True),
    RealModel("torchvision", "efficientnet_b0", long=True),
    RealModel("torchvision", "efficientnet_v2_s", long=True),
    RealModel("torchvision", "shufflenet_v2_x0_5"),
    RealModel("torchvision", "mnasnet0_5", long=True),
    RealModel("torchvision", "googlenet", options={"init_weights": False}, long=True),
    RealModel("torchvision", "inception_v3", 96, {"aux_logits": False, "init_weights": False}, long=True),
    RealModel("torchvision", "vgg11_bn", long=True),
    RealModel("torchvision", "fcn_resnet50", options=_BACKBONE, long=True),
    RealModel("torchvision", "deeplabv3_mobilenet_v3_large", options=_BACKBONE, long=True),
    RealModel("torchvision", "lraspp_mobilenet_v3_large", options=_BACKBONE),
    RealModel("timm", "resnet50", long=True),
    RealModel("timm", "resnet18d"),
    RealModel("timm", "efficientnet_b0", long=True),
    RealModel("timm", "densenet121", long=True),
    RealModel("timm", "dla34", long=True),
    RealModel("timm", "dla46_c"),
    RealModel("timm", "hrnet_w18_small", long=True),
    RealModel("timm", "xception41", long=True),
    RealModel("timm", "repvgg_a0", long=True),
    RealModel("timm", "vovnet39a", long=True),
    RealModel("timm", "ese_vovnet19b_slim_dw"),
    RealModel("timm", "cspdarknet53", long=True),
    RealModel("timm", "cspresnet50", long=True),
    RealModel("timm", "cs3darknet_s"),
    RealModel("timm", "darknet17"),
    RealModel("timm", "darknet53", long=True),
    RealModel("timm", "inception_v4", 96, long=True),
    RealModel("timm", "mobilenetv1_100"),
    RealModel("timm", "mobilenetv2_035"),
    RealModel("timm", "mobilenetv3_small_050"),
    RealModel("timm", "mobilenetv4_conv_small_035", long=True),
    RealModel("timm", "regnety_002"),
    RealModel("timm", "regnety_004", long=True),
    RealModel("timm", "mobileone_s0", long=True),
    RealModel("timm", "gernet_s"),
    RealModel("timm", "lcnet_050"),
    RealModel("timm", "resnetv2_18d"),
    RealModel("timm", "resnetv2_50d", long=True),
    RealModel("timm", "res2net50_26w_4s", long=True),
    RealModel("timm", "selecsls42b", long=True),
    RealModel("timm", "dpn48b"),
    RealModel("timm", "dpn68", long=True),
    RealModel("timm", "ghostnet_050", long=True),
    RealModel("timm", "tinynet_e"),
    RealModel("timm", "rexnet_100", long=True),
    RealModel("timm", "hardcorenas_a", long=True),
    RealModel("timm", "skresnet18"),
    RealModel("timm", "resnest14d"),
    RealModel("timm", "seresnet18"),
    RealModel("timm", "legacy_seresnet18", long=True),
    RealModel("timm", "ecaresnet26t", long=True),
    RealModel("timm", "tresnet_m", long=True),
    RealModel("timm", "mixnet_s", long=True),
    RealModel("timm", "fbnetc_100", long=True),
    RealModel("timm", "hgnetv2_b0", long=True),
    RealModel("timm", "repvit_m0_9", long=True),
    RealModel("timm", "fastvit_t8", long=True),
    RealModel("timm", "mobilevit_xxs", long=True),
    RealModel("timm", "test_resnet", 32),
    RealModel("timm", "test_efficientnet", 32),
    RealModel("timm", "test_byobnet", 32),
]
