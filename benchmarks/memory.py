"""What an autograd graph holds after a forward, in bytes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from weakref import WeakSet

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmarks.operations import BatchNorm, Tensors, forward
from benchmarks.providers import Provider
from benchmarks.suites import Case


@dataclass(frozen=True)
class Held:
    """Bytes of whole storages, each counted once: the caller's, the result's, and what is there for backward alone."""

    held_arguments_bytes: int
    held_result_bytes: int
    held_bytes: int


class Saved:
    """What the graph keeps in place of a tensor: alive as long as its node is.

    Of the tensor it has the memory alone: a node that saves its own result would, with the tensor, keep itself alive.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.storage = tensor.untyped_storage()


def unpack(saved: Saved) -> Tensor:
    """The hooks come in pairs; without its tensor the graph cannot run backward."""
    raise RuntimeError("a graph made to be measured has no backward")


def held(function: BatchNorm, tensors: Tensors) -> Held:
    """What the graph of a training call holds as saved tensors; a node could keep others, which would not be seen."""
    running_mean, running_var = tensors.running_mean.clone(), tensors.running_var.clone()
    alive: WeakSet[Saved] = WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with saved_tensors_hooks(pack, unpack):
        output = forward(function, tensors, running_mean, running_var)
    storages = {saved.storage.data_ptr(): saved.storage.nbytes() for saved in alive}
    arguments = {tensor.untyped_storage().data_ptr() for tensor in (*tensors.leaves, running_mean, running_var)}
    result = output.untyped_storage().data_ptr()
    of_arguments = sum(size for address, size in storages.items() if address in arguments)
    of_result = storages.get(result, 0)
    return Held(of_arguments, of_result, sum(storages.values()) - of_arguments - of_result)


def held_by_provider(
    operation: str, case: Case, tensors: Tensors, providers: Sequence[Provider]
) -> dict[str, dict[str, int]]:
    """Fields of the providers' rows: of a forward with an activation, where there is something to hold."""
    fields = {}
    if operation == "forward" and case.epilogue.act:
        for provider in providers:
            with provider.context():
                fields[provider.name] = asdict(held(provider.function, tensors))
    return fields
