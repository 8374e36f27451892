"""The variables of a rank: its place among all ranks, and defaults which a user's own settings override."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from trainer.agent.rank_environment import Round, rank_defaults, rank_variables
from trainer.config.job import Job
from trainer.run.folder import RunFolder
from trainer.wiring.node import Wiring
from trainer.wiring.rank import rank_wiring

NODE = Wiring(
    platform="slurm", job_id="7", launch=0, nodes=3, node_rank=2, hostnames=("a", "b", "c"), master_addr="a",
    ports=(20000,), devices_per_node=2, visible_devices=None, cpus=8, deadline=None, interface="ib0",
)  # fmt: skip
RUN = RunFolder(Path("/runs/digits-7"))


def test_the_place_of_a_rank() -> None:
    job = Job(task="a:B", parallel="ddp", nodes=3, devices_per_node=2)
    variables = rank_variables(job, NODE, 1, Round(4, 9, "10.0.0.1", 23456))
    expected = {"RANK": "5", "LOCAL_RANK": "1", "GROUP_RANK": "2", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2",
                "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "23456", "TORCHELASTIC_RESTART_COUNT": "3"}  # fmt: skip
    assert {name: variables[name] for name in expected} == expected
    wiring = rank_wiring(variables)
    assert (wiring.rank, wiring.world_size, wiring.local_rank) == (5, 6, 1)
    assert (wiring.attempt, wiring.restarts, wiring.launch) == (9, 3, "7")


DEFAULTS = {
    "NCCL_DEBUG": "WARN",
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_FR_DUMP_TEMP_FILE": "/runs/digits-7/logs/flight-recorder-",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    "TORCH_GLOO_LAZY_INIT": "1",
    "OMP_NUM_THREADS": "3",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def test_defaults_yield_to_what_is_set_already(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in DEFAULTS:
        monkeypatch.delenv(name, raising=False)
    assert rank_defaults(RUN, NODE, 3) == DEFAULTS
    for name in DEFAULTS:
        monkeypatch.setenv(name, "mine")
        assert rank_defaults(RUN, NODE, 3) == {key: value for key, value in DEFAULTS.items() if key != name}
        monkeypatch.delenv(name)


def test_ranks_see_the_devices_that_the_node_may_use() -> None:
    masked = dataclasses.replace(NODE, visible_devices="2,3")
    assert rank_defaults(RUN, masked, 3)["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert "CUDA_VISIBLE_DEVICES" not in rank_defaults(RUN, NODE, 3)
