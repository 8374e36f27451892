"""What environments mean: who is an agent, who is a rank, and what is refused, by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.errors import JobError
from trainer.wiring.node import wire
from trainer.wiring.rank import RankWiring, is_rank, rank_wiring

SLURM = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "localhost,n[2]", "SLURM_NODEID": "1",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip
LOCAL = {
    "MUSTER_PLATFORM": "local", "MUSTER_JOB_ID": "digits-1", "MUSTER_NODES": "2", "MUSTER_NODE_RANK": "1",
    "MUSTER_HOSTNAMES": "127.0.0.1,127.0.0.2",
}  # fmt: skip
DOCKER = LOCAL | {"MUSTER_PLATFORM": "docker", "MUSTER_HOSTNAMES": "localhost,node1"}
KUBERNETES = {
    **LOCAL, "MUSTER_PLATFORM": "kubernetes", "MUSTER_NODE_RANK": "", "JOB_COMPLETION_INDEX": "1",
    "MUSTER_HOSTNAMES": "localhost,d-1.d",
}  # fmt: skip
ENROOT = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "12345"}
"""What enroot's hook 50-slurm-pytorch.sh adds to each task."""
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
    "MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
ACCELERATE = {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no", "TORCHELASTIC_RESTART_COUNT": "0"}
PYTORCHJOB = {
    "RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "23456", "PYTHONUNBUFFERED": "1",
    "PET_NNODES": "3",
}  # fmt: skip
SRUN_PER_GPU = {
    **SLURM, "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "RANK": "3", "WORLD_SIZE": "4",
    "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500",
}  # fmt: skip
LAUNCHER = f"launcher-{os.getppid()}"
ALL = (LOCAL, KUBERNETES, SLURM, TORCHRUN, ACCELERATE, PYTORCHJOB)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without what this machine, or a launcher of the tests, has set."""
    names = {name for variables in ALL for name in variables} | {"SUBMITIT_EXECUTOR", "CUDA_VISIBLE_DEVICES"}
    names |= {name for name in os.environ if name.startswith(("SLURM_", "MUSTER_"))}
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "")  # so that what wiring sets is undone
    return monkeypatch


def apply(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)


@pytest.mark.parametrize(
    ("variables", "platform", "hostnames", "launch"),
    [
        (SLURM, "slurm", ("localhost", "n2"), 0),
        ({**SLURM, "SLURM_RESTART_COUNT": "3"}, "slurm", ("localhost", "n2"), 3),
        ({**SLURM, **ENROOT}, "slurm", ("localhost", "n2"), 0),
        (LOCAL, "local", ("127.0.0.1", "127.0.0.2"), 0),
        ({**LOCAL, "MUSTER_LAUNCH": "2"}, "local", ("127.0.0.1", "127.0.0.2"), 2),
        (DOCKER, "docker", ("localhost", "node1"), 0),
        (KUBERNETES, "kubernetes", ("localhost", "d-1.d"), 0),
        ({**KUBERNETES, "SLURM_JOB_ID": "5"}, "kubernetes", ("localhost", "d-1.d"), 0),
    ],
    ids=["slurm", "slurm requeued", "slurm under enroot's hook", "local", "local restarted", "docker", "kubernetes",
         "kubernetes inside an allocation"],
)  # fmt: skip
def test_an_agent_knows_its_place(
    environment: pytest.MonkeyPatch, variables: dict[str, str], platform: str, hostnames: tuple[str, ...], launch: int
) -> None:
    apply(environment, variables)
    assert not is_rank()
    found = wire(2, 4)
    assert (found.platform, found.node_rank, found.nodes, found.launch) == (platform, 1, 2, launch)
    assert found.hostnames == hostnames
    assert found.master_addr == hostnames[0]
    assert found.job_id == variables.get("SLURM_JOB_ID" if platform == "slurm" else "MUSTER_JOB_ID")
    assert set(found.provenance) == set(found.__dataclass_fields__) - {"provenance"}


def test_a_job_that_says_nothing_of_nodes_takes_those_of_its_allocation(environment: pytest.MonkeyPatch) -> None:
    apply(environment, SLURM)
    assert wire(None, 8).nodes == 2
    with pytest.raises(JobError, match="nodes=1"):
        wire(1, 8)


def test_a_launch_has_ports_of_its_own_which_all_nodes_derive_alike(environment: pytest.MonkeyPatch) -> None:
    ports = {}
    for node in "01":
        for launch in "012":
            apply(environment, {**LOCAL, "MUSTER_NODE_RANK": node, "MUSTER_LAUNCH": launch})
            ports[node, launch] = wire(2, 1).ports
    assert all(ports["0", launch] == ports["1", launch] for launch in "012")
    assert len({ports["0", launch][0] for launch in "012"}) == 3
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not any(low <= port <= high for found in ports.values() for port in found)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        (TORCHRUN, RankWiring(3, 4, 1, 2, 2, LAUNCHER)),
        ({**TORCHRUN, "TORCHELASTIC_RUN_ID": "8"}, RankWiring(3, 4, 1, 2, 2, "8")),
        (ACCELERATE, RankWiring(3, 4, 1, 0, 0, LAUNCHER)),
        (PYTORCHJOB, RankWiring(1, 3, 0, 0, 0, LAUNCHER)),
        (SRUN_PER_GPU, RankWiring(3, 4, 1, 0, 0, LAUNCHER)),
        ({**SLURM, **TORCHRUN}, RankWiring(3, 4, 1, 2, 2, LAUNCHER)),
        ({**TORCHRUN, "MUSTER_PLATFORM": "local", "MUSTER_ATTEMPT": "5"}, RankWiring(3, 4, 1, 5, 2, LAUNCHER)),
    ],
    ids=["torchrun", "with a name", "accelerate", "PyTorchJob", "srun per GPU", "torchrun on Slurm", "our agent"],
)  # fmt: skip
def test_under_a_launcher_it_is_a_rank(
    environment: pytest.MonkeyPatch, variables: dict[str, str], expected: RankWiring
) -> None:
    apply(environment, variables)
    assert is_rank()
    assert rank_wiring() == expected


@pytest.mark.parametrize("variables", [{}, {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1"}])
def test_started_by_hand_it_is_the_only_node(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    apply(environment, variables)
    assert not is_rank()
    found = wire(1, 2)
    assert (found.platform, found.nodes, found.node_rank, found.master_addr) == ("alone", 1, 0, "127.0.0.1")


def without(variables: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in variables.items() if key != name}


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        (without(SLURM, "SLURM_JOB_NODELIST"), ["SLURM_JOB_NODELIST=None", "slurm", "partial"]),
        (without(SLURM, "SLURM_STEP_ID"), ["SLURM_STEP_ID=None", "batch script", "srun --nodes"]),
        ({**SLURM, "SLURM_NTASKS": "16"}, ["SLURM_NTASKS=16", "one task on each node"]),
        ({**SLURM, "SLURM_STEP_NUM_NODES": "1"}, ["SLURM_STEP_NUM_NODES='1'", "contradicts SLURM_JOB_NUM_NODES=2"]),
        (without(LOCAL, "MUSTER_HOSTNAMES"), ["MUSTER_HOSTNAMES=None", "local", "partial"]),
        (without(KUBERNETES, "JOB_COMPLETION_INDEX"), ["MUSTER_NODE_RANK=None", "kubernetes"]),
        ({**LOCAL, "MUSTER_NODES": "4"}, ["nodes=2", "MUSTER_NODES says 4"]),
        ({**LOCAL, "MUSTER_NODE_RANK": "2"}, ["=2: does not exist among 2 nodes"]),
        ({**LOCAL, "MUSTER_NODE_RANK": "one"}, ["MUSTER_NODE_RANK='one'", "not a number"]),
        ({**LOCAL, "MUSTER_HOSTNAMES": "127.0.0.1"}, ["names 1 hosts for 2 nodes"]),
        ({**LOCAL, "MUSTER_PLATFORM": "nomad"}, ["MUSTER_PLATFORM='nomad'", "local, docker, kubernetes"]),
        ({**LOCAL, "RANK": "0", "WORLD_SIZE": "2"}, ["RANK='0'", "MUSTER_NODE_RANK says 1", "Unset it"]),
        ({**LOCAL, "MASTER_ADDR": "127.0.0.9"}, ["MASTER_ADDR='127.0.0.9'", "says 127.0.0.1"]),
        ({**LOCAL, "MASTER_PORT": "http"}, ["MASTER_PORT='http'", "is not a valid port"]),
        ({}, ["nodes=2", "started by hand", "muster run"]),
    ],
)  # fmt: skip
def test_partial_and_contradictory_environments_of_an_agent_are_refused_by_name(
    environment: pytest.MonkeyPatch, variables: dict[str, str], parts: list[str]
) -> None:
    apply(environment, variables)
    with pytest.raises(JobError) as refused:
        wire(2, 1)
    assert [part for part in parts if part not in str(refused.value)] == [], refused.value


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"RANK": "0"}, ["WORLD_SIZE=None", "RANK are: a partial environment", "torchrun"]),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, ["RANK=None", "partial"]),
        (without(TORCHRUN, "MASTER_ADDR"), ["MASTER_ADDR=None", "partial"]),
        ({**TORCHRUN, "RANK": "4"}, ["RANK=4", "contradicts WORLD_SIZE=4"]),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, ["LOCAL_RANK=2", "contradicts LOCAL_WORLD_SIZE=2"]),
        ({**TORCHRUN, "WORLD_SIZE": "four"}, ["WORLD_SIZE='four'", "not a number"]),
    ],
)
def test_partial_and_contradictory_environments_of_a_rank_are_refused_by_name(
    variables: dict[str, str], parts: list[str]
) -> None:
    with pytest.raises(JobError) as refused:
        rank_wiring(variables)
    assert [part for part in parts if part not in str(refused.value)] == [], refused.value


@pytest.mark.parametrize(
    ("mask", "leased", "devices", "expected"),
    [
        (None, None, None, None),
        ("2,3", None, None, "2,3"),
        (None, None, [2, 3, 1], "2,3,1"),
        ("1,2,3", None, [2, 3, 1], "2,3,1"),
        (None, "1,2,0", [2, 3, 1], "1,2,0"),
    ],
    ids=["nothing said", "scheduler", "job", "job inside the scheduler's", "a container's own numbers"],
)
def test_devices(
    environment: pytest.MonkeyPatch, mask: str | None, leased: str | None, devices: list[int] | None, expected: str
) -> None:
    for name, value in (("CUDA_VISIBLE_DEVICES", mask), ("MUSTER_VISIBLE_DEVICES", leased)):
        if value is not None:
            environment.setenv(name, value)
    found = wire(1, 3, devices)
    assert found.visible_devices == expected
    assert found.provenance["visible_devices"]


def test_devices_outside_the_schedulers_mask_are_refused(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(JobError, match=r"devices=\[2\].*CUDA_VISIBLE_DEVICES=0,1"):
        wire(1, 1, [2])


def test_everything_is_explained_with_its_source(environment: pytest.MonkeyPatch) -> None:
    apply(environment, {**SLURM, **ENROOT, "MASTER_ADDR": "127.0.0.1"})
    text = wire(2, 4).explain()
    assert "submitit's TorchDistributedEnvironment" in text
    assert "MASTER_ADDR=127.0.0.1 in the environment is the same host" in text
    assert "MASTER_PORT in the environment first" in text
    assert "RANK in the environment agrees" in text
