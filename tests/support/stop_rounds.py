"""Rounds of stop requests in one process group: a rank trains nothing, and passes ticks until all have agreed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from trainer.parallel import stops as module
from trainer.parallel.stops import Stops
from trainer.signals import FLAG

DELAY_S = 0.01
"""Requests come within so many seconds, and a rank can be later than the others by as much."""


def run_rounds(rank: int, world_size: int, port: int, rounds: int) -> None:
    """Be a rank. Raises AssertionError: ranks stopped at different ticks."""
    store = dist.TCPStore("127.0.0.1", port, world_size, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
    FLAG.install()
    module.LOOK_S = 0.01
    chance = random.Random(rounds)  # the same on all ranks
    beside = store.clone()  # once: whenever it connects, torch asks a name server, which may lose the question
    for number in range(rounds):
        asked = dict.fromkeys(chance.sample(range(world_size), chance.randint(1, world_size)), 0.0)
        together = chance.random() < 0.7
        asked = {each: chance.uniform(0, DELAY_S) * (1 - number % 2) for each in asked}  # or all at once, at once
        late, when = chance.randrange(world_size), chance.uniform(0, DELAY_S)
        ticks = run_round((rank, world_size, beside), asked.get(rank), when if rank == late else None, together)
        every: list[int] = [0] * world_size
        dist.all_gather_object(every, ticks)
        assert len(set(every)) == 1, f"round {number}: {every}"
    dist.barrier()
    os._exit(0)


def run_round(
    rank: tuple[int, int, dist.Store], asked: float | None, late: float | None, together: bool
) -> int:  # fmt: skip
    """The number of the tick that this `rank`, of so many that have a store, stopped at.

    `asked`: it gets a signal after so many seconds; `late`: after as many it computes a longer step, and with
    `together` the others wait for it inside a collective.
    """
    FLAG.requested = None
    stops, began, ticks = Stops(*rank[:2], store=rank[2]), time.monotonic(), 0
    dist.barrier()
    request = threading.Timer(asked or 0, os.kill, (os.getpid(), signal.SIGTERM))
    if asked is not None:
        request.start()
    while True:
        if late is not None and time.monotonic() - began > late:
            time.sleep(DELAY_S)
            late = None
        if together:
            dist.all_reduce(torch.ones(1))
        ticks += 1
        if stops.tick():
            break
    if asked is not None:
        request.join()
        while FLAG.requested is None:
            time.sleep(0.001)
    dist.barrier()
    stops.close()
    return ticks
