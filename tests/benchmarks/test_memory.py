"""The memory that a step holds, and torch's checkpoints that hold less."""

import torch
from torch import Tensor, nn

import bnext
from benchmarks.memory import Allocated, allocated, blocks_of, checkpointed, checkpointed_to, held_by
from benchmarks.networks import Bottleneck, ResNet20

MB = 1_000_000


def test_held_is_what_the_result_keeps_alive_and_peak_the_most_at_any_time() -> None:
    def call() -> Tensor:
        first = torch.zeros(2 * MB, dtype=torch.uint8)
        second = torch.zeros(6 * MB, dtype=torch.uint8)
        del first
        return second[: 1 * MB].clone()

    assert allocated(call) == Allocated(held=MB, peak=8 * MB)


def test_outputs_of_bnexts_own_allocators_count() -> None:
    for pixels in (64, 256, 2048):  # from malloc, a part of a huge page, whole huge pages
        x = torch.randn(1, 4, pixels, pixels)
        found = allocated(lambda x=x: bnext.functional.batch_norm(x, None, None, training=True))
        assert x.nbytes <= found.held < x.nbytes + 1000


def test_blocks_are_the_largest_parts_of_which_there_are_several() -> None:
    blocks = blocks_of(ResNet20())
    assert len(blocks) == 9
    assert len({type(ResNet20().get_submodule(name)) for name in blocks}) == 1
    nested = nn.Sequential(nn.Sequential(Bottleneck(4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), Bottleneck(4, 1))
    assert blocks_of(nested) == ["0.0", "1"]


def test_a_checkpointed_copy_holds_less_and_has_the_same_gradients() -> None:
    model, x = ResNet20(), torch.randn(4, 3, 16, 16)
    copy = checkpointed(model, blocks_of(model)[:5])
    assert held_by(copy, x) < held_by(model, x)
    for each in (model, copy):
        each(x).sum().backward()
    for mine, its in zip(model.parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(its.grad, mine.grad)


def test_as_few_blocks_as_possible_are_checkpointed() -> None:
    model, x = ResNet20(), torch.randn(4, 3, 16, 16)
    blocks = blocks_of(model)
    held = {count: held_by(checkpointed(model, blocks[:count]), x) for count in (1, 3, 4, len(blocks))}
    assert list(held.values()) == sorted(held.values(), reverse=True)
    for limit, count in ((held[1], 1), (held[3], 3), (held[3] - 1, 4), (0, len(blocks))):
        found = checkpointed_to(model, x, limit)
        assert torch.equal(found.bn1.running_mean, torch.zeros(16)), "the search ran on other copies"
        assert held_by(found, x) == held[count]
