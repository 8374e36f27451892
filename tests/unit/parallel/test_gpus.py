"""What a rank makes of the GPUs that it sees; CUDA's answers are made up, for there need be none."""

from __future__ import annotations

import pytest
import torch

from trainer.agent.diagnosis import Frame, only_waits
from trainer.agent.exception_place import TRAINER
from trainer.config.job import Job
from trainer.errors import JobError
from trainer.parallel import base
from trainer.parallel.base import Parallel
from trainer.wiring.devices import use_cuda
from trainer.wiring.rank import RankWiring

RANK = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"
}  # fmt: skip


@pytest.mark.parametrize(("device", "found", "variables", "expected"), [
    ("auto", 4, {}, True),
    ("auto", 0, {}, False),
    ("auto", 1, {}, False),
    ("cpu", 4, {}, False),
    ("cuda", 1, {}, None),
    ("auto", 1, {"SLURM_GPUS_PER_TASK": "1"}, True),
    ("cuda", 1, {"SLURM_GPUS_PER_TASK": "1"}, True),
    ("auto", 1, {"SLURM_GPUS_PER_TASK": "1", "TORCHELASTIC_RUN_ID": "x"}, False),
    ("cuda", 0, {"SLURM_GPUS_PER_TASK": "1"}, None),
    ("cuda", 1, {"SLURM_GPUS_PER_TASK": "1", "MUSTER_ATTEMPT": "0"}, None),  # an agent's ranks share what it sees
])  # fmt: skip
def test_whether_it_computes_on_them(
    monkeypatch: pytest.MonkeyPatch, device: str, found: int, variables: dict[str, str], expected: bool | None
) -> None:
    for name in ("MUSTER_ATTEMPT", "MUSTER_PLATFORM", "SLURM_GPUS_PER_TASK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (RANK | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    job = Job(task="a:B", parallel="ddp", devices_per_node=4, device=device)
    if expected is None:
        with pytest.raises(JobError, match=f"has {found} usable GPUs"):
            use_cuda(job)
    else:
        assert use_cuda(job) == expected


@pytest.mark.parametrize(("found", "index"), [(1, 0), (4, 3)])
def test_which_one_is_its_own(monkeypatch: pytest.MonkeyPatch, found: int, index: int) -> None:
    monkeypatch.setattr(base, "use_cuda", lambda job: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    rank = Parallel(Job(task="a:B", parallel="ddp", devices_per_node=4), RankWiring(3, 4, 3))
    assert rank.devices == [rank.device] == [torch.device("cuda", index)]
    both = Parallel(Job(task="a:B", parallel="dp", devices_per_node=2), RankWiring())
    assert both.devices == [torch.device("cuda", 0), torch.device("cuda", 1)]


def test_a_look_at_a_number_behind_a_collective_is_waiting() -> None:
    ours = Frame(str(TRAINER / "parallel" / "base.py"), "40", "read")
    task = Frame(str(TRAINER / "tasks" / "digits.py"), "40", "loss")
    assert only_waits([Frame("/x/torch/cuda/streams.py", "200", "synchronize"), ours])
    assert not only_waits([Frame("/x/torch/cuda/streams.py", "200", "synchronize"), Frame("/x/task.py", "3", "loss")])
    assert not only_waits([Frame("/x/torch/cuda/streams.py", "200", "synchronize"), task])
    assert not only_waits([Frame("/x/torch/nn/functional.py", "200", "linear"), ours])
