"""Agents on several nodes: in their places whatever the order of arrival, replaced when killed, missed when gone."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from muster_runs import FULL, Run, alive, descendants, end_all, kill, result, start_agent, submitted, wait_for
from stopwatch import Stopwatch

from trainer.agent.kv_server import KeyValueServer
from trainer.agent.proof import Membership
from trainer.records import read_lines
from trainer.wiring.network import candidate_ports
from trainer.wiring.secret import make_secret, read_secret

TWO_NODES = ["nodes=2", "devices_per_node=1"]
SCRIPT = """
import json, os, pathlib
import torch.distributed as dist
dist.init_process_group("gloo")
names = ("RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "MUSTER_NODE_RANK")
facts = {name: int(os.environ[name]) for name in names}
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, facts)
pathlib.Path(os.environ["MUSTER_RUN"], f"place-{facts['RANK']}.json").write_text(json.dumps(everyone))
dist.destroy_process_group()
"""


@contextmanager
def agents(run: Run, *overrides: str, nodes: int = 2, **variables: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """One agent per node, all started at once."""
    try:
        yield [start_agent(run, node, nodes, *overrides, **variables) for node in range(nodes)]
    finally:
        end_all(run)


def codes(processes: list[subprocess.Popen[bytes]], timeout_s: float = 60) -> list[int]:
    """Exit codes."""
    return [process.wait(timeout_s) for process in processes]


@pytest.mark.parametrize("number", range(20 if FULL else 2))
def test_ranks_are_placed_by_node_whoever_comes_first(tmp_path: Path, number: int) -> None:
    chance = random.Random(number)
    (tmp_path / "place.py").write_text(SCRIPT)
    run = Run(tmp_path / "run")
    keys = ["task=null", f"script={tmp_path / 'place.py'}", "devices_per_node=2"]
    order = [0, 1] if number % 2 else [1, 0]
    started = {}
    try:
        for node in order:
            started[node] = start_agent(run, node, 2, *keys)
            time.sleep(chance.uniform(0, 1.5))
        assert codes(list(started.values())) == [0, 0], (run.folder / "agent-0.txt").read_text()
    finally:
        end_all(run)
    expected = [
        {"RANK": rank, "LOCAL_RANK": rank % 2, "GROUP_RANK": rank // 2, "WORLD_SIZE": 4, "MUSTER_NODE_RANK": rank // 2}
        for rank in range(4)
    ]
    for rank in range(4):
        assert json.loads((run.folder / f"place-{rank}.json").read_text()) == expected


@pytest.mark.parametrize("node, buffers", [(0, False), (1, False), (0, True)])
def test_a_killed_agent_is_replaced(tmp_path: Path, node: int, buffers: bool) -> None:
    """Its ranks and template go with it, at once; the other node waits; the run goes on from that one's memory.

    Batch statistics that count are those of rank 0 alone: without its node a checkpoint has them.
    """
    size = 4 if buffers else 2  # few samples in a batch: an epoch, which ends with a checkpoint, takes long
    keys = [f"task_args.buffers={buffers}", "task_args.step_s=0.01", "train.steps=250", f"train.batch_size={size}"]
    keys.append("agent.restarts=1")
    with submitted(tmp_path, *TWO_NODES, *keys, "checkpoint.every_steps=130") as run:
        metrics = run.folder / "metrics.jsonl"  # the copies in memory are newer than the checkpoint then, for long
        wait_for("step 170", lambda: any(line["step"] >= 170 for line in read_lines(metrics)))
        agent = run.agents()[node]
        gone = descendants(agent)
        assert run.ranks()[node] in gone and len(gone) >= 2
        kill(agent)
        wait_for("the end of what it started", lambda: not any(map(alive, gone)), 2)
        lost = run.wait("agent_lost")
        assert (lost["node"], lost["code"]) == (node, -signal.SIGKILL)
        assert result(run) == 0, run.log("node-0.log")
        resume = run.events("resume")[0]
        assert resume["step"] == run.events("training")[1]["step"] >= 130
        assert (resume["folder"] == "memory") == (not buffers), resume
        assert [event["attempt"] for event in run.events("done")] == [run.events("restart", "attempt")[-1]["attempt"]]


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_never_returns_is_missed_within_its_bound(tmp_path: Path, node: int, stopwatch: Stopwatch) -> None:
    run = Run(tmp_path / "run")
    with agents(run, "train.steps=1000000", "task_args.step_s=0.05", "agent.rejoin_timeout_s=4") as both:
        run.wait("first_step")
        gone = [both[node].pid, *descendants(both[node].pid)]
        other = both[1 - node]
        with stopwatch.at_most(4 + 10):
            for pid in gone:  # the whole node
                kill(pid)
            assert other.wait(45) == 1
        text = (run.folder / f"agent-{1 - node}.txt").read_text()
        assert f"node {node}" in text and "peer lost" in text, text
        assert f"127.0.0.{1 + node}" in text if node else "no master at 127.0.0.1" in text
        run.wait_gone()


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_stops_answering_is_missed_too(tmp_path: Path, node: int, stopwatch: Stopwatch) -> None:
    """As behind a cut cable: its connections stay open and nobody answers."""
    run = Run(tmp_path / "run")
    with agents(run, "train.steps=1000000", "task_args.step_s=0.05", "agent.rejoin_timeout_s=2") as both:
        run.wait("first_step")
        with stopwatch.at_most(15 + 2 + 15):  # an answer or a beat, a return, and some patience
            for pid in (both[node].pid, *descendants(both[node].pid)):
                kill(pid, signal.SIGSTOP)
            assert both[1 - node].wait(80) == 1
        text = (run.folder / f"agent-{1 - node}.txt").read_text()
        assert (f"node {node}" in text and "no beat of its agent" in text) if node else "node 0" in text, text


def test_a_node_that_never_comes_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with ExitStack() as stack:
        stack.callback(end_all, run)
        agent = start_agent(run, 0, 2, "agent.start_timeout_s=3", "train.steps=5")
        assert agent.wait(60) == 1
        assert "node 1 (127.0.0.2) did not come within 3 s" in (run.folder / "agent-0.txt").read_text()


@contextmanager
def listener(port: int, answer: bytes | None) -> Iterator[None]:
    """A program of somebody else: closes each connection (None), or accepts it and says `answer`, maybe nothing."""
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            if answer is None:
                connection.close()
                continue
            held.append(connection)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", port)) as server:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        server.shutdown(socket.SHUT_RDWR)
    for connection in held:
        connection.close()


def test_foreign_listeners_on_the_candidate_ports(tmp_path: Path) -> None:
    """One closes, one is silent, one talks; then come the stores of another job and of our own last launch."""
    run = Run(tmp_path / "run")
    run.folder.mkdir()
    ports = candidate_ports(f"{run.job_id}/1")
    make_secret(run.folder / "secret")
    known = read_secret(run.folder / "secret", {}) or b""
    other, old = (KeyValueServer(Membership(launch, known), 2) for launch in ("another/0", f"{run.job_id}/0"))
    with ExitStack() as stack:
        for port, answer in zip(ports, (None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"), strict=False):
            stack.enter_context(listener(port, answer))
        assert (other.listen(["127.0.0.1"], ports), old.listen(["127.0.0.1"], ports)) == (ports[3], ports[4])
        with agents(run, "train.steps=5", MUSTER_LAUNCH="1") as both:
            assert codes(both) == [0, 0], (run.folder / "agent-1.txt").read_text()
    assert not other.clients and not old.clients


def test_two_jobs_with_the_same_ports_at_once(tmp_path: Path) -> None:
    """The number of a job decides its ports: two clusters may give the same, or a variable was copied."""
    runs = [Run(tmp_path / name) for name in ("one", "two")]
    shared = str(candidate_ports(runs[0].job_id)[0])
    started = []
    try:
        for run in runs:
            started += [start_agent(run, node, 2, "train.steps=30", MASTER_PORT=shared) for node in (1, 0)]
        assert codes(started) == [0, 0, 0, 0]
    finally:
        for run in runs:
            end_all(run)
    for run in runs:
        assert run.wait("done")["step"] == 30


@pytest.mark.parametrize("nodes", [1, 2])
def test_nothing_of_one_machine_listens_for_strangers(tmp_path: Path, nodes: int) -> None:
    """torch's store serves anybody, so it is on the loopback where that is enough."""
    keys = [f"nodes={nodes}", f"devices_per_node={2 // nodes}", "train.steps=1000000", "task_args.step_s=0.01"]
    with submitted(tmp_path, *keys) as run:
        run.wait("first_step")
        inodes = set()
        agents = run.agents()
        assert len(agents) == nodes
        for pid in (pid for agent in agents.values() for pid in (agent, *descendants(agent))):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                try:
                    inodes.add(os.readlink(handle).removeprefix("socket:[").removesuffix("]"))
                except OSError:
                    continue
        tables = [Path(f"/proc/net/{name}").read_text().splitlines() for name in ("tcp", "tcp6")]
        lines = [line.split() for table in tables for line in table]
        listening = [fields[1] for fields in lines if fields[3] == "0A" and fields[9] in inodes]
        assert listening and all(address.startswith("0100007F:") for address in listening), listening
