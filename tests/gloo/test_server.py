"""The parameter server: synchronous it resumes bit by bit; asynchronous it says what it cannot promise, and goes on."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from faults import Fault
from muster_runs import FULL, HERE, kill, result, submitted
from ranks import complete, events, losses, make_job, order_of_samples, train
from states import difference, read_state

from trainer.errors import STOPPED, WRONG_JOB
from trainer.records import read_lines

SERVER = ["parallel=server", "devices_per_node=3", "task_args.count=102"]
ASYNCHRONOUS = [*SERVER, "server.synchronous=false"]
TASK, UNUSED = "task=digit_tasks:Branched", {"second.weight", "second.bias"}


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    """Batch statistics of rank 0 count; the optimizer's state, that rank 0 alone has, is in the checkpoint."""
    keys = [*SERVER, "task_args.batchnorm=true", "task_args.dropout=0.3", "checkpoint.every_steps=3"]
    complete(tmp_path / "calm", make_job(*keys))
    assert train(tmp_path / "run", make_job(*keys), Fault(8, "before update")).codes[0] == -signal.SIGKILL
    complete(tmp_path / "run", make_job(*keys))
    assert events(tmp_path / "run", "training")[-1]["step"] == 6
    assert difference(read_state(tmp_path / "calm"), read_state(tmp_path / "run")) == ""
    assert losses(tmp_path / "calm") == losses(tmp_path / "run")
    assert order_of_samples(tmp_path / "calm") == order_of_samples(tmp_path / "run")


def test_asynchronous_updates(tmp_path: Path) -> None:
    """Each sample once per epoch, through a kill and a stop; staleness of each update; any mode can go on.

    No update touches weights that no rank uses.
    """
    keys = [*ASYNCHRONOUS, TASK, "checkpoint.every_steps=7", "train.steps=30", "train.lr=0.05"]
    first = train(tmp_path, make_job(*keys), Fault(31, "before update"))  # of two updates in a step
    assert first.codes[0] == -signal.SIGKILL
    assert "NOTE: this run is not reproducible" in first.output(0) and "not as if" not in first.output(0)
    early = read_state(tmp_path)["model"]
    second = train(tmp_path, make_job(*keys), Fault(11, number=signal.SIGTERM))
    assert second.codes == [STOPPED] * 3
    assert "goes on from step 15, but not as if it had never stopped" in second.output(0)
    stopped = events(tmp_path, "stopped")[-1]["step"]
    assert 15 < stopped < 30 and stopped % 7
    third = complete(tmp_path, make_job(*keys))
    assert events(tmp_path, "training")[-1]["step"] == stopped
    order = order_of_samples(tmp_path)
    for epoch in range(6):
        assert sorted(order[epoch]) == list(range(102)), epoch
    lines = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "train"]
    assert all(0 <= line["staleness"] <= line["staleness_max"] for line in lines)
    assert any(line["staleness_max"] > 0 for line in lines), "nobody was ever late"
    assert losses(tmp_path)[-1] < 0.7 * losses(tmp_path)[0], third.output(0)
    complete(tmp_path, make_job("parallel=single", TASK, "task_args.count=102", "train.steps=31"))
    late = read_state(tmp_path)["model"]
    assert {name for name in late if torch.equal(early[name], late[name])} == UNUSED


def test_what_an_asynchronous_server_refuses(tmp_path: Path) -> None:
    run = train(tmp_path, make_job(*ASYNCHRONOUS, "task_args.batchnorm=true"))
    assert run.code == WRONG_JOB
    assert "server.synchronous=False" in run.output(1) and "GroupNorm" in run.output(1)


@pytest.mark.parametrize("synchronous", ["true", "false"] if FULL else ["false"])
def test_under_agents(tmp_path: Path, synchronous: str) -> None:
    """Ranks on two nodes that connect when they first talk; a kill is survived, from rank 0's copy in memory."""
    keys = ["parallel=server", "nodes=2", "devices_per_node=2", f"server.synchronous={synchronous}"]
    keys += ["train.steps=200", "train.batch_size=12", "evaluation.every_steps=20"]
    with submitted(tmp_path, *keys, "task_args.step_s=0.004") as run:
        run.wait("checkpoint", 2)
        kill(run.ranks()[3])
        assert result(run, 120) == 0, run.log("node-0.log")
        assert run.events("resume")[-1]["folder"] == "memory"
    if synchronous == "true":
        calm = complete(tmp_path / "calm", make_job(*keys, file=HERE / "faulty.yaml")).folder
        assert difference(read_state(calm), read_state(run.folder)) == ""
