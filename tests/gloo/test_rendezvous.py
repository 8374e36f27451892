"""Two agents meet: what they agree on, whom they refuse, what they tell each other while ranks run."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from muster_runs import wait_for

from trainer.agent.failure import Failure
from trainer.agent.kv_server import KeyValueServer
from trainer.agent.rendezvous import NodeRendezvous
from trainer.agent.rounds import Ended, Round, Wishes
from trainer.errors import STOPPED, WRONG_JOB
from trainer.wiring.network import candidate_ports
from trainer.wiring.node import Wiring

SECRET = b"0123456789abcdef" * 4
told: list[list[Failure]] = []
"""The failures that node 0 was told of in each round of the present test."""

multiprocessing.set_forkserver_preload(["torch.distributed", "trainer.agent.rank_store"])


class Agent(NodeRendezvous):
    """One that may be asked to stop."""

    def __init__(self, wiring: Wiring, next_attempt: Callable[[int, list[Failure]], int]) -> None:
        self.asked = False
        super().__init__(wiring, SECRET, 60, 60, lambda: self.asked, next_attempt, lambda text: None)


Pair = tuple[Agent, Agent]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """The agents of two nodes on this machine; attempts are numbered from 7."""
    told.clear()

    def next_attempt(number: int, failures: list[Failure]) -> int:
        told.append(failures)
        return 6 + number

    ports = tuple(candidate_ports(str(tmp_path)))
    hosts = ("127.0.0.1", "127.0.0.2")
    both = [
        Agent(
            Wiring("local", tmp_path.name, 0, 2, node, hosts, hosts[0], ports, 1, None, 1, None, "lo", {}), next_attempt
        )
        for node in range(2)
    ]
    yield both[0], both[1]
    for node in reversed(both):
        node.shutdown()


def meet(pair: Pair) -> list[Round | Ended]:
    """What the next round brings each of them."""

    def next_round(node: NodeRendezvous) -> Round | Ended:
        try:
            return node.next_round()
        except Ended as end:
            return end

    with ThreadPoolExecutor() as pool:
        return list(pool.map(next_round, pair))


def failure(node: int, kind: str) -> Failure:
    return Failure(node, f"host{node}", node, 1.0, 1, kind, "so", "rank.log")


def test_both_get_the_same_plan_and_a_new_one_in_each_round(pair: Pair) -> None:
    first, second = meet(pair), meet(pair)
    assert first[0] == first[1] and second[0] == second[1]
    assert [plan.attempt for plan in (first[0], second[0]) if isinstance(plan, Round)] == [7, 8]
    assert [node.master_addr() for node in pair] == ["127.0.0.1"] * 2


def test_what_failed_arrives_as_it_was_and_once(pair: Pair) -> None:
    meet(pair)
    for node in pair:
        node.failure = failure(node.wiring.node_rank, "killed")
    meet(pair)
    meet(pair)
    assert told == [[], [failure(0, "killed"), failure(1, "killed")], []]


def test_a_node_with_another_torch_ends_the_job_on_both(pair: Pair) -> None:
    pair[1].versions = pair[1].versions | {"torch": "1.0"}
    for end in meet(pair):
        assert isinstance(end, Ended) and end.code == WRONG_JOB
        assert "node 1 has torch 1.0, and node 0 " in str(end)


def test_what_one_wants_the_other_sees(pair: Pair) -> None:
    meet(pair)
    assert pair[0].look() == pair[1].look() == Wishes()
    pair[1].alarm(failure(1, "peer lost"))
    assert pair[0].look() == pair[1].look() == Wishes(next_round=True)
    pair[0].alarm(failure(0, "killed"))
    wait_for("the alarm", lambda: pair[1].look() == Wishes(next_round=True, cause_known=True), 5)
    meet(pair)
    assert pair[0].look() == pair[1].look() == Wishes()
    pair[0].stop_all()
    wait_for("the request", lambda: pair[1].look() == Wishes(stop=True), 5)
    for end in meet(pair):
        assert isinstance(end, Ended) and end.code == STOPPED


def test_a_pod_that_leaves_again_is_waited_for(pair: Pair) -> None:
    """It has told all that the others need for a round, but it will start no ranks in it."""
    meet(pair)
    for agent in pair:
        agent.alone = True
    store = pair[0].store
    assert isinstance(store, KeyValueServer)
    with ThreadPoolExecutor() as pool:
        leaving = pool.submit(pair[1].next_round)
        wait_for("its report", lambda: 1 in store.told.get("2/report", {}))
        pair[1].asked = True
        with pytest.raises(Ended) as end:
            leaving.result(10)
        assert end.value.code == STOPPED
        pair[1].shutdown()
        first = pool.submit(pair[0].next_round)
        assert wait([first], 0.5).not_done
        pair[1].asked, pair[1].round, pair[1].done = False, 0, 0  # as another in its place would be
        second = pool.submit(pair[1].next_round)
        assert first.result(10) == second.result(10) and first.result().number == 2


def test_one_that_sees_a_hang_waits_for_the_other_to_look(pair: Pair) -> None:
    meet(pair)
    first = threading.Thread(target=pair[0].compare, args=(failure(0, "hung"), 10))
    first.start()
    wait_for("the alarm", lambda: pair[1].look().hung)
    assert first.is_alive()
    began = time.monotonic()
    pair[1].compare(failure(1, "hung"), 10)
    first.join(5)
    assert not first.is_alive() and time.monotonic() - began < 5


def test_both_are_done_when_each_has_said_so_and_not_before(pair: Pair) -> None:
    meet(pair)
    assert [pair[0].all_done(), pair[0].all_done()] == [False, False]
    assert [pair[1].all_done(), pair[0].all_done()] == [True, True]
