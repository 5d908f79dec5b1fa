"""The operations, what may follow them in the same call, and the bytes that they have to move."""

from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
LAYOUTS = ("contiguous", "channels_last")

# On a CPU the C library maps every output above 32 MB afresh; below 1 MB a core's own cache holds the tensor.
MB = 1_000_000
LARGE_CLASS = "> 32 MB"
SIZE_CLASSES = ((LARGE_CLASS, 32 * MB), ("1-32 MB", MB), ("< 1 MB", 0))

# The passes of an operation over tensors of the input's size, when each is read or written once.
TENSOR_PASSES = {
    "forward": 2,  # input -> output, batch statistics, running statistics updated
    "backward": 3,  # input, grad_output -> grad_input, with grad_weight and grad_bias
    "eval": 2,  # input -> output, running statistics
    "forward_backward": 5,
}
BOTH_TOO = tuple(TENSOR_PASSES)
STEP = "step"  # of a model: forward, loss, backward and the optimiser's update

# All batch norms of a model, one after the other, by operation: walk.py.
HOT_FORWARD = "walk_hot_forward"
WALKS = {"walk_forward": "forward", "walk_backward": "backward", HOT_FORWARD: "forward"}

# What a residual adds: it is read, or its gradient is written.
RESIDUAL_PASSES = {"forward": 1, "backward": 1, "eval": 1, "forward_backward": 2}

# How often a mask of one bit an element is written or read. Without a residual, backward recomputes the signs from the
# input, which it reads anyway. With one, it would also have to read the residual, so forward stores the bits instead.
MASK_PASSES = {"forward": 1, "backward": 1, "eval": 0, "forward_backward": 2}


class Epilogue(NamedTuple):
    """What follows the batch norm in the same call: the addition of a residual, an activation."""

    act: str = ""  # the name in batch_norm_act; empty: a plain batch norm
    residual: bool = False

    def __str__(self) -> str:
        return f"add+{self.act}" if self.residual else self.act


PLAIN = Epilogue()
BN_RELU = Epilogue("relu")
BN_ADD_RELU = Epilogue("relu", residual=True)


def shape_label(shape: Shape) -> str:
    return "x".join(map(str, shape))


def tensor_label(shape: Shape, epilogue: Epilogue) -> str:
    """The shape, and what follows the batch norm, if anything does."""
    return f"{shape_label(shape)} {epilogue}".rstrip()


def tensor_bytes(shape: Shape, dtype: str) -> int:
    return prod(shape) * ITEM_BYTES[dtype]


def size_class(size: int) -> str:
    return next(name for name, above in SIZE_CLASSES if size > above)


def model_bytes(operation: str, shape: Shape, dtype: str, epilogue: Epilogue = PLAIN) -> int:
    """Bytes of the single-pass model: each tensor of the input's size, and the mask, is read or written once.

    The C-sized parameters and statistics are left out; they are at most a few per cent of any shape that is
    bound by memory.
    """
    passes = TENSOR_PASSES[operation] + epilogue.residual * RESIDUAL_PASSES[operation]
    mask = epilogue.residual * MASK_PASSES[operation] * -(-prod(shape) // 8)
    return passes * tensor_bytes(shape, dtype) + mask
