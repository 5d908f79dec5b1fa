"""Convolutional models of torchvision and timm, as people train them, with inputs that are small enough for a test."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models import import_torchvision, make_packaged

CLASSES = 5


@functools.cache
def why_not(library: str) -> str | None:
    """Why torchvision or timm cannot be imported; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import_torchvision()  # which timm imports too
            importlib.import_module(library)
    except (ImportError, RuntimeError) as error:
        return f"{library} cannot be imported here: {error}"
    return None


class RealModel(NamedTuple):
    library: str
    name: str
    size: int = 64  # height and width of the image: the deepest layers keep a few values a channel
    options: Mapping[str, object] = MappingProxyType({})
    long: bool = False  # tested only with --long, and then thoroughly
    thorough: bool = False  # an evaluation and AOTAutograd are tested, too, each of which takes as long as the rest

    def __str__(self) -> str:
        return f"{self.library} {self.name}"

    def make(self) -> nn.Module:
        """The model in float64, with the same random weights each time. Those of batch norms are made random as well:
        a weight that is initialised with 0 would hide the layers before it."""
        with torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(11)
            model = make_packaged(self.library, self.name, num_classes=CLASSES, **self.options).double()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                    nn.init.uniform_(module.weight, 0.5, 1.5)
                    nn.init.uniform_(module.bias, -0.5, 0.5)
        return model

    def input(self) -> Tensor:
        generator = torch.Generator().manual_seed(13)
        return torch.randn(2, 3, self.size, self.size, dtype=torch.float64, generator=generator)


def _models(library: str, names: str, **fields: Any) -> list[RealModel]:
    return [RealModel(library, name, **fields) for name in names.split()]


_BACKBONE = {"weights_backbone": None}
_SEGMENTATION = "lraspp_mobilenet_v3_large fcn_resnet50 deeplabv3_mobilenet_v3_large"
_MORE_OF_TORCHVISION = """
    resnet50 resnext50_32x4d wide_resnet50_2 densenet121 regnet_x_400mf regnet_y_400mf mobilenet_v3_large
    efficientnet_b0 efficientnet_v2_s mnasnet0_5 vgg11_bn
"""
# A row a stage: the expansion, channels, number of blocks, and stride.
_MOBILENET_V2 = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 1, 2], [6, 64, 1, 2], [6, 96, 2, 1]]
_TIMM = "ese_vovnet19b_slim_dw darknet17 regnety_002 resnetv2_18d resnest14d"
_MORE_OF_TIMM = """
    resnet18d cs3darknet_s mobilenetv1_100
    resnet50 efficientnet_b0 densenet121 dla34 hrnet_w18_small xception41 repvgg_a0 vovnet39a cspdarknet53 cspresnet50
    darknet53 mobilenetv4_conv_small_035 regnety_004 mobileone_s0 resnetv2_50d res2net50_26w_4s selecsls42b dpn68
    mobilenetv2_035 ghostnet_050 rexnet_100 hardcorenas_a legacy_seresnet18 ecaresnet26t tresnet_m mixnet_s fbnetc_100
    hgnetv2_b0 repvit_m0_9 fastvit_t8 mobilevit_xxs resnet10t seresnet18 skresnet18 gernet_s lcnet_050
    mobilenetv3_small_050 tinynet_e
"""

MODELS = [
    *_models("torchvision", "resnet18", thorough=True),
    *_models("torchvision", "mobilenet_v2", options={"inverted_residual_setting": _MOBILENET_V2}, thorough=True),
    *_models("torchvision", "mobilenet_v3_small shufflenet_v2_x0_5"),
    *_models("torchvision", _MORE_OF_TORCHVISION, long=True),
    *_models("torchvision", "googlenet", options={"init_weights": False}, long=True),
    *_models("torchvision", "inception_v3", size=96, options={"aux_logits": False, "init_weights": False}, long=True),
    *_models("torchvision", _SEGMENTATION, options=_BACKBONE, long=True),
    *_models("timm", _TIMM),
    *_models("timm", "dla46_c", options={"levels": [1, 1, 1, 1, 1, 1]}),
    *_models("timm", "dpn48b", options={"k_sec": (1, 2, 1, 1)}),
    *_models("timm", "test_resnet test_efficientnet test_byobnet", size=32),
    *_models("timm", _MORE_OF_TIMM, long=True),
    *_models("timm", "inception_v4", size=96, long=True),
]
