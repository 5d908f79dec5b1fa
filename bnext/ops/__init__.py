"""The operators ``torch.ops.bnext.*``: what torch must know of them besides their C++ kernels.

Importing this package loads the extension, which registers the operators and their derivatives, and then their fake
kernels (shapes and strides without data, for torch.compile and torch.export) and their batching rules for
``torch.func.vmap``.
"""

from bnext.ops import fake, vmap  # noqa: F401  (which register what is in them)
from bnext.ops.operators import *  # noqa: F403
