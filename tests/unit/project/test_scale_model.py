"""The arithmetic that predicts steps and long runs: against hand-made cases, and DDP's own assignment of buckets."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist
from paths import ROOT
from torch import empty

sys.path.insert(0, str(ROOT / "bench"))

from scale_model import (
    Compute,
    Faults,
    Link,
    best_interval_s,
    fit_link,
    make_buckets,
    predict,
    prospect,
    reduce_s,
    ring_s,
    step_s,
    useful_share,
)

LINK = Link(latency_s=0.001, bandwidth=1e9)
COMPUTE = Compute(0.010, 0.020, 0.005, ready_s=(0.005, 0.010, 0.015, 0.020), sizes=(1000, 3000, 2000, 500))


def test_a_ring_passes_every_byte_twice_but_for_a_ranks_own_share() -> None:
    assert ring_s(1, 10**9, LINK) == 0
    assert ring_s(2, 10**9, LINK) == pytest.approx(0.002 + 1)
    assert ring_s(4, 10**9, LINK) == pytest.approx(0.006 + 1.5)


@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_a_fit_finds_the_link_that_the_times_come_from(ranks: int) -> None:
    found = fit_link(ranks, {size: ring_s(ranks, size, LINK) for size in (10**4, 10**6, 10**8)})
    assert (found.latency_s, found.bandwidth) == pytest.approx((LINK.latency_s, LINK.bandwidth))


def test_a_latency_is_never_negative() -> None:
    found = fit_link(2, {10**6: 0.001, 10**7: 0.02, 10**8: 0.2})
    assert found.latency_s == 0
    assert found.bandwidth > 0


@pytest.mark.parametrize(("cap", "first"), [(4000, 1000), (2000, 2000), (10**6, 1), (10**6, 10**6), (1, 1)])
def test_buckets_are_those_of_ddp(cap: int, first: int) -> None:
    tensors = [empty(size // 4) for size in COMPUTE.sizes]
    assigned, _ = dist._compute_bucket_assignment_by_size(tensors, [first, cap])
    expected = [(COMPUTE.ready_s[indices[-1]], sum(COMPUTE.sizes[index] for index in indices)) for indices in assigned]
    assert make_buckets(COMPUTE, cap, first) == expected


def test_what_is_ready_in_time_hides_behind_backward() -> None:
    buckets = [(0.010, 4 * 10**6), (0.020, 10**6)]  # 2 ranks: 2 + 4 ms, 2 + 1 ms
    assert step_s(COMPUTE, buckets, 2, LINK, busy=0) == pytest.approx(0.035 + 0.003)
    assert step_s(COMPUTE, buckets, 2, LINK, busy=1) == pytest.approx(0.035 + 0.009)
    assert step_s(COMPUTE, buckets, 2, LINK, busy=0.5) == pytest.approx(0.035 + 0.006)
    assert reduce_s(buckets, 2, LINK) == pytest.approx(0.009)


def test_a_slow_link_makes_buckets_wait_for_each_other() -> None:
    buckets = [(0.010, 40 * 10**6), (0.020, 10**6)]  # 42 ms from 10 on, then 3 ms
    assert step_s(COMPUTE, buckets, 2, LINK, busy=0) == pytest.approx(0.035 + 0.055 - 0.020)


def test_one_rank_only_computes() -> None:
    assert step_s(COMPUTE, make_buckets(COMPUTE, 1000, 1000), 1, LINK, busy=1) == COMPUTE.whole_s


@pytest.mark.parametrize(("ranks", "busy"), [(2, 0.4), (4, 0.8), (8, 1.0)])
def test_ranks_without_a_core_of_their_own_have_less_to_hide_behind(ranks: int, busy: float) -> None:
    times = [(size, ring_s(ranks, size, LINK), 0.4 * ring_s(ranks, size, LINK)) for size in (10**4, 10**6, 10**7)]
    found = predict(ranks, 2, COMPUTE, 4000, times)
    assert found.busy == pytest.approx(busy)
    assert found.hidden_s < found.step_s <= found.exposed_s == pytest.approx(COMPUTE.whole_s + found.reduce_s)


def test_the_best_interval_loses_least() -> None:
    faults = Faults(0.0065, save_s=5, restart_s=60)
    best = best_interval_s(64, faults)
    shares = [useful_share(64, faults, best * factor) for factor in (0.8, 1.0, 1.25)]
    assert max(shares) == shares[1]
    assert best_interval_s(4 * 64, faults) == pytest.approx(best / 2)


def test_a_run_that_fails_faster_than_it_restarts_keeps_nothing() -> None:
    assert useful_share(10**6, Faults(0.0065, 1, 600), 60) == 0


def test_without_failures_and_communication_nothing_is_lost() -> None:
    found = prospect(1, COMPUTE, make_buckets(COMPUTE, 1000, 1000), LINK, Faults(0, 1, 600))
    assert found["goodput"] == {"hidden": 1, "exposed": 1}
    assert found["step_s"]["hidden"] == COMPUTE.whole_s


def test_more_nodes_lose_more_and_overlap_loses_less() -> None:
    found = [
        prospect(nodes, COMPUTE, make_buckets(COMPUTE, 1, 1), LINK, Faults(6.5, 1, 60, 600)) for nodes in (2, 4, 8)
    ]
    shares = [row["goodput"]["hidden"] for row in found]
    assert shares == sorted(shares, reverse=True)
    assert all(row["goodput"]["exposed"] < row["goodput"]["hidden"] for row in found)
    assert all(row["interval_s"] == 600 for row in found)
