"""What is looked at before ranks are forked: problems with remedies, and variables that the network needs."""

from __future__ import annotations

import dataclasses
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from trainer.agent import preflight
from trainer.agent.preflight import check_node, network_settings
from trainer.config.job import Data, Job, Train
from trainer.wiring.network import PORTS, candidate_ports
from trainer.wiring.node import Wiring

NODE = Wiring(
    platform="slurm", job_id="7", launch=0, nodes=2, node_rank=1, hostnames=("a", "b"), master_addr="a", ports=(20000,),
    devices_per_node=2, visible_devices=None, cpus=8, deadline=None, interface="ib0",
)  # fmt: skip


def problems(job: Job | None = None, **wiring: Any) -> list[tuple[str, bool]]:
    found = check_node(job or Job(task="a:B", parallel="ddp", devices_per_node=2), dataclasses.replace(NODE, **wiring))
    return [(problem.text, problem.fatal) for problem in found]


def test_a_sound_node_has_no_problem() -> None:
    assert problems() == []


def test_more_ranks_than_processors() -> None:
    ((text, fatal),) = problems(cpus=1)
    assert text.startswith("2 ranks share 1 CPUs") and "--cpus-per-task" in text and not fatal
    ((text, _),) = problems(cpus=1, platform="kubernetes")
    assert text.endswith("Raise cpu in the site file")


def test_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "gpu_files", lambda: ["nvidia0"])
    ((text, fatal),) = problems(Job(task="a:B", parallel="ddp", devices_per_node=2, device="cuda"))
    assert "this node has 1 GPUs" in text and fatal


def test_shared_memory_that_the_loader_workers_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SHM", Path("/sys"))  # a file system without a free block
    ((text, fatal),) = problems(Job(task="a:B", parallel="ddp", devices_per_node=2, data=Data(workers=2)))
    assert "4 loader workers may need 256" in text and fatal


def test_copies_of_the_state_that_do_not_fit() -> None:
    job = Job(task="a:B", parallel="ddp", devices_per_node=2)
    [problem] = check_node(job, NODE, 2**60)
    assert "2 copies of the state" in problem.text and "in_memory=false" in problem.text and not problem.fatal
    shards = Job(task="a:B", parallel="fsdp", devices_per_node=2, nodes=4)
    [problem] = check_node(shards, NODE, 2**60)
    assert f"3 copies of the state in memory take {3 * 2**60 // 4 >> 20} MiB" in problem.text
    job.checkpoint.in_memory = False
    assert check_node(job, NODE, 2**60) == []


def test_a_compiler_where_the_job_wants_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(task="a:B", parallel="ddp", devices_per_node=2, device="cpu", train=Train(compile=True))
    monkeypatch.setenv("CXX", "no-such-compiler")
    ((text, fatal),) = problems(job)
    assert "this node has no no-such-compiler" in text and "train.compile=false" in text and fatal
    monkeypatch.setenv("CXX", "true")
    assert problems(job) == []


@pytest.mark.parametrize(("limit", "told"), [(2**16, True), (2**30, False), (resource.RLIM_INFINITY, False)])
def test_locked_memory_counts_where_infiniband_is(
    limit: int, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert problems() == []
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr("trainer.wiring.devices.INFINIBAND", tmp_path)
    assert [("memlock is limited to 64 KiB" in text, fatal) for text, fatal in problems()] == [(True, False)] * told


@pytest.mark.parametrize(("limit", "told"), [(32, True), (1024, False), (resource.RLIM_INFINITY, False)])
def test_open_files_of_ranks_and_their_workers(limit: int, told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    found = problems(Job(task="a:B", parallel="ddp", devices_per_node=2, data=Data(workers=1)))
    assert [("may open 32 files" in text and "ulimit -Hn" in text, fatal) for text, fatal in found] == [
        (True, True)
    ] * told


def test_open_files_of_node_0_grow_with_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, 4096))
    job = Job(task="a:B", parallel="ddp", devices_per_node=8, nodes=1024)
    assert problems(job, nodes=1024, node_rank=1) == []
    assert problems(job, nodes=128, node_rank=0) == []
    ((text, fatal),) = problems(job, nodes=1024, node_rank=0)
    assert "16424 may be needed for the connections of 8192 ranks" in text and fatal


@pytest.mark.parametrize(
    ("wiring", "own_address", "expected"),
    [
        ({"nodes": 1}, "10.0.0.2", {"GLOO_SOCKET_IFNAME": "lo"}),
        ({"platform": "local"}, "10.0.0.2", {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo"}),
        ({}, "10.0.0.2", {}),
        ({}, "127.0.1.1", {"GLOO_SOCKET_IFNAME": "ib0"}),  # Debian's line for the host's own name
        ({}, None, {"GLOO_SOCKET_IFNAME": "ib0"}),
        ({"interface": ""}, None, {}),
        ({"interface": "lo"}, "127.0.0.1", {}),
    ],
)
def test_variables_of_the_network(
    wiring: dict[str, Any], own_address: str | None, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(name: str) -> str:
        if own_address is None:
            raise socket.gaierror("no such name")
        return own_address

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    found = network_settings(dataclasses.replace(NODE, **wiring))
    assert {name: value for name, (value, _) in found.items()} == expected
    assert all(reason for _, reason in found.values())


def test_nodes_with_other_ephemeral_ranges_try_the_same_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    before = candidate_ports("digits-1/0")
    assert len(set(before)) == 16 and set(before) <= set(PORTS)
    assert before != candidate_ports("digits-1/1")
    monkeypatch.setattr(Path, "read_text", lambda path: "1024 65535")  # /proc/sys/net/ipv4/ip_local_port_range
    assert candidate_ports("digits-1/0") == before
