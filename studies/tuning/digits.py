"""scikit-learn's digits, 1,797 images of 8 × 8 pixels that come with the library, split by the seed."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor

TRAINING = 1437  # four fifths; 360 are left for the test
CLASSES = 10
LARGEST_PIXEL = 16


@dataclass(frozen=True)
class Split:
    images: Tensor  # (1437, 1, 8, 8), from 0 to 1
    targets: Tensor
    test_images: Tensor  # (360, 1, 8, 8)
    test_targets: Tensor


@lru_cache
def split(seed: int) -> Split:
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(LARGEST_PIXEL).unsqueeze(1)
    targets = torch.from_numpy(data.target).long()
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    training, test = order[:TRAINING], order[TRAINING:]
    return Split(images[training], targets[training], images[test], targets[test])
