"""What a step of DDP and a long run take, from what their parts take: pure arithmetic, `bench/scale.py` measures.

Seconds and bytes throughout. A ring all-reduce of S bytes among n ranks passes 2 (n - 1) messages of S / n bytes:
2 (n - 1) latency + 2 (n - 1) / n * S / bandwidth (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69(2), 2009;
nccl-tests, doc/PERFORMANCE.md). DDP reduces buckets of gradients in the order in which backward fills them, each as
soon as it is full and the one before is reduced (Li et al., arXiv 2006.15704).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DAY_S = 86400.0


@dataclass(frozen=True)
class Link:
    """What a message costs: seconds each, and bytes per second."""

    latency_s: float
    bandwidth: float


@dataclass(frozen=True)
class Compute:
    """A step of one rank without communication; `ready_s`: from the start of backward until each gradient is there."""

    forward_s: float
    backward_s: float
    update_s: float
    ready_s: Sequence[float]
    sizes: Sequence[int]
    cpu_s: float = 0.0

    @property
    def whole_s(self) -> float:
        """The whole step."""
        return self.forward_s + self.backward_s + self.update_s


def ring_s(ranks: int, size: float, link: Link) -> float:
    """Seconds of one all-reduce."""
    return 2 * (ranks - 1) * link.latency_s + 2 * (ranks - 1) / ranks * size / link.bandwidth


def fit_link(ranks: int, seconds: Mapping[int, float]) -> Link:
    """The link whose all-reduces take these seconds by size, with the least sum of squared relative errors."""
    per_message, per_byte = 2 * (ranks - 1), 2 * (ranks - 1) / ranks
    rows = np.array([(per_message / taken, per_byte * size / taken) for size, taken in seconds.items()])
    latency, inverse = np.linalg.lstsq(rows, np.ones(len(rows)), rcond=None)[0]
    if latency < 0:
        latency, inverse = 0.0, rows[:, 1].sum() / (rows[:, 1] ** 2).sum()
    return Link(float(latency), float(1 / inverse))


def make_buckets(compute: Compute, cap: int, first_cap: int | None = None) -> list[tuple[float, int]]:
    """When each bucket is full, and its bytes; a bucket is closed by the gradient that brings it to its cap."""
    buckets, size, first_cap = [], 0, cap if first_cap is None else first_cap
    for position, (ready, more) in enumerate(zip(compute.ready_s, compute.sizes, strict=True), 1):
        size += more
        if size >= (cap if buckets else first_cap) or position == len(compute.sizes):
            buckets.append((ready, size))
            size = 0
    return buckets


def reduce_s(buckets: Sequence[tuple[float, int]], ranks: int, link: Link) -> float:
    """All buckets one after the other."""
    return sum(ring_s(ranks, size, link) for _, size in buckets)


def step_s(compute: Compute, buckets: Sequence[tuple[float, int]], ranks: int, link: Link, busy: float) -> float:
    """A step of DDP: compute, and the communication that backward does not hide.

    `busy`: the share of the communication's time in which it needs the processor that computes. That share hides
    behind nothing; the rest does as far as the buckets are full early enough. 0: a network card or a GPU does it.
    """
    end = 0.0
    for ready, size in buckets:
        end = max(end, ready) + ring_s(ranks, size, link)
    exposed = max(0.0, end - compute.backward_s)
    return compute.whole_s + busy * reduce_s(buckets, ranks, link) + (1 - busy) * exposed


@dataclass(frozen=True)
class Prediction:
    """Of a step of DDP; `hidden_s`, `exposed_s`: with as much overlap as the buckets allow, and without."""

    link: Link
    busy: float
    reduce_s: float
    step_s: float
    hidden_s: float
    exposed_s: float
    cpu_s: float


def predict(
    ranks: int, cores: int, compute: Compute, cap: int, reduces: Sequence[tuple[int, float, float]]
) -> Prediction:
    """From all-reduces of some sizes: bytes, seconds, CPU seconds of a rank, which shares `cores` with the others."""
    buckets, link, cost_s, busy = make_buckets(compute, cap), Link(0.0, math.inf), 0.0, 0.0
    if ranks > 1:
        link = fit_link(ranks, {size: wall for size, wall, _ in reduces})
        cost_s = reduce_s(buckets, ranks, fit_link(ranks, {size: cpu for size, _, cpu in reduces}))
        busy = min(1.0, cost_s * max(1.0, ranks / cores) / reduce_s(buckets, ranks, link))
    step, hidden, exposed = (step_s(compute, buckets, ranks, link, share) for share in (busy, 0.0, 1.0))
    return Prediction(link, busy, reduce_s(buckets, ranks, link), step, hidden, exposed, compute.cpu_s + cost_s)


@dataclass(frozen=True)
class Faults:
    """What interrupts training; `interval_s`: None for the best."""

    failures_per_node_day: float
    save_s: float
    restart_s: float
    interval_s: float | None = None


def best_interval_s(nodes: int, faults: Faults) -> float:
    """Seconds of work between two checkpoints that lose least: sqrt(2 * save * mean time between failures).

    Young, Communications of the ACM 17(9), 1974; Daly, Future Generation Computer Systems 22(3), 2006, adds terms
    that matter only where a save takes a good part of the time between failures.
    """
    failures_per_s = nodes * faults.failures_per_node_day / DAY_S
    return math.sqrt(2 * faults.save_s / failures_per_s) if failures_per_s else math.inf


def useful_share(nodes: int, faults: Faults, interval_s: float) -> float:
    """The expected share of the time that is work which is kept: E[ETTR] of Kokolis et al., arXiv 2410.21680.

    A failure costs the restart and on average half an interval, a save its stall. First order: where failures cost
    more time than there is, the answer is 0.
    """
    failures_per_s = nodes * faults.failures_per_node_day / DAY_S
    lost = failures_per_s * (faults.restart_s + interval_s / 2) if failures_per_s else 0.0
    return max(0.0, 1 - lost) / (1 + faults.save_s / interval_s)


def prospect(
    nodes: int, compute: Compute, buckets: Sequence[tuple[float, int]], link: Link, faults: Faults
) -> dict[str, Any]:
    """A row for nodes of one rank; `hidden` and `exposed`: with as much overlap as the buckets allow, and without.

    Efficiency is relative to a node that communicates with none, and goodput to one that is never interrupted either.
    """
    steps = {name: step_s(compute, buckets, nodes, link, busy) for name, busy in (("hidden", 0), ("exposed", 1))}
    interval_s = faults.interval_s or best_interval_s(nodes, faults)
    useful = useful_share(nodes, faults, interval_s)
    efficiency = {name: compute.whole_s / taken for name, taken in steps.items()}
    return {
        "nodes": nodes, "step_s": steps, "efficiency": efficiency, "interval_s": interval_s, "useful": useful,
        "goodput": {name: useful * share for name, share in efficiency.items()},
    }  # fmt: skip
