"""Exact means over held-out samples for scripts: each sample once, sums in a fixed order at any number of ranks."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.config.job import Data
from trainer.data.batches import collating
from trainer.data.datasets import count_samples
from trainer.data.device_mover import DeviceMover
from trainer.data.loader import Loader
from trainer.data.rng import EVALUATION, derive_seed, seed_generators
from trainer.data.sampler import evaluation_batches
from trainer.errors import JobError
from trainer.parallel.base import Parallel
from trainer.parallel.returned import read_metrics, read_summary
from trainer.training.evaluation import UNCOUNTED

KEY = "session.evaluate"
Function = Callable[[Any], Mapping[str, Any]]


def evaluate_samples(
    parallel: Parallel, dataset: Any, function: Function, batch_size: int,
    collate: Callable[[list[Any]], Any] | None, options: Data, seed: int, step: int,
    beat: Callable[[], None],
) -> dict[str, float]:  # fmt: skip
    """The mean of each name over the dataset; `beat` is called before each batch.

    Raises JobError: not a number for each sample.
    """
    count = count_samples(KEY, dataset)
    plan = list(evaluation_batches(count, batch_size, parallel.rank, parallel.world_size))
    rounds = math.ceil(math.ceil(count / batch_size) / parallel.world_size)
    if parallel.lockstep and len(plan) < rounds:  # what a rank without a batch computes then does not count
        plan.append((UNCOUNTED, next(iter(evaluation_batches(count, batch_size, 0, parallel.world_size)))[1]))
    loader = Loader(dataset, collating(collate), options, seed, parallel.cuda, KEY)
    batches = DeviceMover(parallel.device, None, False, options.prefetch).move(
        loader.read([(0, indices) for _, indices in plan])
    )
    sums: list[tuple[int, dict[str, Tensor]]] = []
    try:
        for (number, indices), batch in zip(plan, batches, strict=True):
            beat()
            seed_generators(derive_seed(seed, step, number, EVALUATION), parallel.devices)
            values = read_metrics(function(batch), len(indices), parallel.device, KEY)
            if number != UNCOUNTED:
                sums.append((number, {name: value.double().sum(0).cpu() for name, value in values.items()}))
    finally:
        loader.close()
    every = sorted(itertools.chain(*parallel.gather(sums)), key=lambda item: item[0])
    names = {name for _, values in every for name in values}
    missing = sorted(name for name in names if not all(name in values for _, values in every))
    if missing:
        remedy = "Return the same names for each batch, with zeros where there is nothing to count"
        raise JobError(KEY, ", ".join(missing), "is missing in some batches", remedy)
    total = {name: functools.reduce(torch.add, (values[name] for _, values in every)) for name in every[0][1]}
    return read_summary({name: value / count for name, value in total.items()}, KEY)
