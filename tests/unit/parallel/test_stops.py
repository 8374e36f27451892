"""Stops: whoever is asked, and whenever, all ranks stop at the same tick. Ranks are threads here."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch.distributed import HashStore

from trainer.parallel import stops as module
from trainer.parallel.stops import Stops
from trainer.signals import StopFlag


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.002)


def make(world_size: int, store: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Stops], list[StopFlag]]:
    """Ranks that share a store, each with a flag of its own."""
    monkeypatch.setattr(module, "_numbers", iter([0] * world_size))
    flags = [StopFlag() for _ in range(world_size)]
    return [Stops(rank, world_size, flag=flag, store=store) for rank, flag in enumerate(flags)], flags


def test_one_rank_alone_stops_at_its_next_tick() -> None:
    flag = StopFlag()
    stops = Stops(0, 1, flag=flag)
    assert not any(stops.tick() for _ in range(3))
    flag.requested = "SIGTERM"
    assert stops.tick()
    stops.close()


@pytest.mark.parametrize("world_size", [2, 3, 5])
@pytest.mark.parametrize("together", [True, False], ids=["each step waits for all", "ranks run apart"])
def test_all_stop_at_one_tick(world_size: int, together: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when each step is a collective, in which a main thread waits for a rank that is frozen already."""
    chance = random.Random(world_size)

    def train(stops: Stops, barrier: threading.Barrier, seed: int) -> int:
        chance = random.Random(seed)
        for step in range(1, 100_000):
            if together:
                barrier.wait(10)
            if chance.random() < 0.1:
                time.sleep(chance.uniform(0, 0.001))
            if stops.tick():
                return step
        raise AssertionError("it never stopped")

    with ThreadPoolExecutor(world_size) as threads:
        for _ in range(20):
            ranks, flags = make(world_size, HashStore(), monkeypatch)
            barrier = threading.Barrier(world_size)
            ends = [threads.submit(train, stops, barrier, chance.randrange(10**9)) for stops in ranks]
            time.sleep(chance.uniform(0, 0.02))
            for flag in chance.sample(flags, chance.randint(1, world_size)):
                flag.requested = "SIGTERM"
                time.sleep(chance.choice([0, 0.001]))
            assert len({end.result(20) for end in ends}) == 1
            for stops in ranks:
                stops.close()
                assert stops.thread is not None and not stops.thread.is_alive()


def test_a_request_before_the_first_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, flags = make(2, HashStore(), monkeypatch)
    flags[1].requested = "SIGTERM"
    assert ranks[1].known.wait(10)  # although no main thread has come to a tick
    assert [stops.tick() for stops in ranks] == [True, True]


def test_a_request_after_the_last_tick_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training is done then, for all alike."""
    ranks, flags = make(2, HashStore(), monkeypatch)
    assert [ranks[0].tick() for _ in range(5)] + [ranks[1].tick() for _ in range(4)] == [False] * 9
    flags[1].requested = "SIGTERM"
    assert not ranks[1].tick()


def test_it_gives_signs_of_life_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, flags = make(2, HashStore(), monkeypatch)
    ranks[1].close()  # it will not answer
    beats = threading.Event()
    ranks[0].beat = beats.set
    flags[0].requested = "SIGTERM"
    waits = threading.Thread(target=ranks[0].tick, daemon=True)
    waits.start()
    assert beats.wait(10)
    ranks[0].known.set()
    waits.join(10)
    ranks[0].close()


def test_the_others_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            raise ConnectionError("connection reset by peer")

    monkeypatch.setattr("torch.distributed.PrefixStore", lambda prefix, store: store)
    flag = StopFlag()
    stops = Stops(0, 2, flag=flag, store=Gone())
    assert stops.known.wait(10)
    assert not stops.tick()  # nobody has asked
    flag.requested = "SIGTERM"
    with pytest.raises(RuntimeError, match="could not agree on where to stop: connection reset by peer"):
        stops.tick()
