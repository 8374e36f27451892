"""The order of samples: a function of seed and epoch, dealt out to any number of ranks, from any position."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.data.sampler import Position, Sampler, epoch_order, evaluation_batches

COUNT, BATCH = 101, 24


def step_samples(world_size: int, accumulate: int, position: Position) -> list[list[int]]:
    """The samples that count, of each step of the rest of an epoch, over all ranks in the order of their shares."""
    orders = [Sampler(COUNT, BATCH, accumulate, rank, world_size, seed=3) for rank in range(world_size)]
    steps: list[list[int]] = []
    for turn, micros in enumerate(zip(*(order.epoch(position) for order in orders), strict=True)):
        if turn % accumulate == 0:
            steps.append([])
        assert all(len(micro.indices) > 0 for micro in micros), "a rank has nothing to compute"
        assert all(micro.last == (turn % accumulate == accumulate - 1) for micro in micros)
        assert max(micro.count for micro in micros) - min(micro.count for micro in micros) <= 1
        steps[-1] += [int(index) for micro in micros for index in micro.indices[: micro.count]]
        total = {micro.step_count for micro in micros}
        if turn % accumulate == accumulate - 1:
            assert total == {len(steps[-1])}
    return steps


@pytest.mark.parametrize("world_size, accumulate", list(itertools.product([1, 2, 3, 4, 8, 24], [1, 2, 3, 4])))
def test_each_step_holds_the_same_samples_at_any_world_size(world_size: int, accumulate: int) -> None:
    order = epoch_order(3, 0, COUNT).tolist()
    expected = [order[start : start + BATCH] for start in range(0, COUNT, BATCH)]
    assert step_samples(world_size, accumulate, Position()) == expected
    assert step_samples(world_size, accumulate, Position(samples=2 * BATCH)) == expected[2:]


def test_epochs_and_seeds_are_orders_of_their_own() -> None:
    orders = {(seed, epoch): tuple(epoch_order(seed, epoch, COUNT)) for seed in range(4) for epoch in range(4)}
    assert len(set(orders.values())) == 16
    assert all(sorted(order) == list(range(COUNT)) for order in orders.values())


def test_the_order_never_changes() -> None:
    """A run that began under another version of NumPy or of this package must resume exactly."""
    assert epoch_order(0, 0, 10).tolist() == [3, 7, 6, 4, 1, 0, 2, 8, 5, 9]
    assert epoch_order(2**32 - 1, 7, 6).tolist() == [1, 0, 2, 4, 3, 5]


@pytest.mark.parametrize("count, batch_size", [(1, 1), (7, 3), (359, 256), (97, 8)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_evaluation_deals_out_the_same_batches(count: int, batch_size: int, world_size: int) -> None:
    dealt = [item for rank in range(world_size) for item in evaluation_batches(count, batch_size, rank, world_size)]
    dealt.sort(key=lambda item: item[0])
    assert [number for number, _ in dealt] == list(range(-(-count // batch_size)))
    assert np.concatenate([indices for _, indices in dealt]).tolist() == list(range(count))
    assert all(len(indices) == batch_size for _, indices in dealt[:-1])
