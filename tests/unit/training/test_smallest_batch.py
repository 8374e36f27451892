"""The smallest batch of an epoch, and batch norms that refuse it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.job import Job, Train
from trainer.data.sampler import Position, Sampler
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.step import Step
from trainer.tasks.digits import Digits
from trainer.training.smallest_batch import check_smallest_batch, smallest_share
from trainer.wiring.rank import RankWiring

MODES = [("single", 1), ("ddp", 2), ("ddp", 3), ("dp", 2), ("dp", 3)]


def make_job(mode: str, devices: int, batch_size: int, accumulate: int = 1) -> Job:
    return Job(
        task="a:B", parallel=mode, devices_per_node=devices, device="cpu",
        train=Train(batch_size=batch_size, accumulate=accumulate),
    )  # fmt: skip


@pytest.mark.parametrize("mode, devices", MODES)
def test_it_is_what_the_sampler_deals_out(mode: str, devices: int) -> None:
    for count, accumulate, size in itertools.product(range(1, 40), (1, 2), (1, 2, 3)):
        job = make_job(mode, devices, size * devices * accumulate, accumulate)
        ranks, replicas = job.world_size, devices if mode == "dp" else 1
        shares = [
            len(chunk)
            for rank in range(ranks)
            for micro in Sampler(count, job.train.batch_size, accumulate, rank, ranks, 0).epoch(Position())
            for chunk in torch.from_numpy(micro.indices).chunk(replicas)
        ]
        assert smallest_share(count, job.train.batch_size, ranks * accumulate, replicas) == min(shares), (
            count,
            job.train,
        )


class Normed(Digits):
    """Digits, with a norm."""

    def inputs(self, batch: Any) -> Tensor:
        """The pixels."""
        pixels: Tensor = batch[0]
        return pixels


def check(
    norm: nn.Module, count: int, shape: tuple[int, ...] = (4,), batch_size: int = 16, held_out: int = 9
) -> nn.Module:
    job = make_job("single", 1, batch_size)
    job.evaluation.batch_size = 8
    parallel = Parallel(job, RankWiring())
    parallel.wrap(Step(nn.Sequential(norm), Normed(), None))
    check_smallest_batch(job, parallel, count, held_out, lambda indices: (torch.ones(len(indices), *shape),))
    return norm


def test_a_batch_norm_that_gets_one_sample_is_refused() -> None:
    with pytest.raises(JobError, match=r"train\.batch_size=16: with 97 samples .*\(0\).* Use 17") as caught:
        check(nn.BatchNorm1d(4), 97)
    assert "leave a sample out" in str(caught.value)
    with pytest.raises(JobError, match=r"Use 2,"):
        check(nn.BatchNorm1d(4), 96, batch_size=1)
    with pytest.raises(JobError, match=r"Use another size"):
        check(nn.BatchNorm1d(4), 1)
    with pytest.raises(JobError, match=r"evaluation\.batch_size=8: with 9 samples .* Use 9,"):
        check(nn.BatchNorm1d(4, track_running_stats=False), 96)


class Broken(nn.BatchNorm1d):
    """Fails for another reason."""

    def forward(self, input: Tensor) -> Tensor:
        raise ValueError("it is Monday")


def test_another_error_is_not_taken_for_it() -> None:
    with pytest.raises(ValueError, match="it is Monday"):
        check(Broken(4), 97)


def test_all_others_are_not() -> None:
    check(nn.BatchNorm1d(4), 96)
    check(nn.BatchNorm1d(4).eval(), 97)
    check(nn.BatchNorm1d(4, track_running_stats=False), 96, held_out=10)
    check(nn.LayerNorm(4), 97)
    norm: Any = check(nn.BatchNorm2d(4), 97, (4, 3, 3))
    assert int(norm.num_batches_tracked) == 0
