"""How often an output is recomputed, how long the recomputed one lives, and how long its sources live."""

from __future__ import annotations

import gc

import torch.nn.functional as F  # noqa: N812
from cases import make_input, same_bits
from recomputing import SHAPE, Net, Recomputed, Scope, assert_same, gradients, leaves, storage_of
from torch import Tensor

import bnext


def test_an_output_that_several_nodes_use_is_recomputed_once() -> None:
    def scenario(net: Net, x: Tensor, scope: Scope) -> list[Tensor]:
        with scope():
            h = net.features(x)
            y = net.last(h) + net.last(h.mT) + F.max_pool2d(h * h, 3, 1)
        return gradients(y, leaves(net, x))

    assert_same(scenario, count=2)


def test_an_output_is_recomputed_for_each_backward_and_for_each_part_of_one() -> None:
    net, x = Net(), make_input(SHAPE)
    with bnext.recompute():
        h = net.features(x)
        first, second = net.last(h), h.square()
        y = first[..., :4, :4] + second[..., :4, :4]
    del h, second
    with Recomputed() as recomputed:
        whole = gradients(y, net.parameters(), retain_graph=True)
        assert (len(recomputed.storages), recomputed.alive()) == (2, 0)
        part = gradients(y, net.last.parameters(), retain_graph=True)
        assert len(recomputed.storages) == 3
        again = gradients(y, net.parameters(), retain_graph=True)
        assert recomputed.alive() == 0
        # The output stays for its other user.
        gradients(first, net.last.parameters(), retain_graph=True)
        assert recomputed.alive() == 1
        del first, y
    assert recomputed.alive() == 0
    assert all(map(same_bits, again, whole))
    assert all(map(same_bits, part, whole[-2:]))


def test_what_was_made_goes_when_its_last_user_has_asked() -> None:
    """A recomputed output is freed then, although the backward of the batch norm itself does not run."""
    net = Net()
    with bnext.recompute():
        y = net.last(net.features(make_input(SHAPE)))
    with Recomputed() as recomputed:
        gradients(y, net.last.parameters(), retain_graph=True)
        assert (len(recomputed.storages), recomputed.alive()) == (1, 0)


def test_a_recomputed_output_goes_with_the_last_node_that_could_use_it() -> None:
    net, x = Net(), make_input(SHAPE)
    with bnext.recompute():
        h = net.features(x)
        first, second = net.last(h), h.square()
    with Recomputed() as recomputed:
        gradients(first, net.last.parameters(), retain_graph=True)
        assert recomputed.alive() == 1
        del second
        assert recomputed.alive() == 0
        gradients(first, net.parameters())
    assert h.grad_fn is not None


def test_what_an_output_is_recomputed_from_goes_with_the_graph() -> None:
    net, storages = Net(), []
    for layer in (net.features[0], net.features[2]):
        layer.register_forward_hook(lambda layer, args, output: storages.append(storage_of(output)))
    with bnext.recompute():
        h = net.features(make_input(SHAPE))
        y = net.last(h)
    gradients(y, net.parameters())
    assert [storage.expired() for storage in storages] == [True, True]
    assert h.grad_fn is not None


def test_results_that_are_saved_by_their_own_node_go_without_the_collector() -> None:
    net, x = Net(), make_input(SHAPE)
    gc.collect()
    gc.disable()
    try:
        with bnext.recompute():
            h = net.features(x)
            results = [h.sigmoid(), h.exp(), h.softmax(1), h.square(), net.last(h)]
        storages = [storage_of(t) for t in (h, *results)]
        del h, results
        assert all(storage.expired() for storage in storages)
        y = bnext.recompute()(net)(x)
        y.sum().backward()
        storages = [storage_of(y)]
        del y
        assert storages[0].expired()
    finally:
        gc.enable()
