"""The last word on a failure: node, rank, exception, class, remedy; and which failures are tried again."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from muster_runs import HERE, Run, kill, muster, result, submitted, wait_for

from trainer.errors import FAILED

EXPECTED = {
    "raise": ("user code", "KeyError: 'no such digit'"),
    "exit 3": ("user code", "SystemExit: 3"),
    "exit 0": ("user code", "SystemExit: 0"),
    "leave": ("user code", "ended with exit code 0 in the middle of the training"),
    "memory": ("out of memory", "MemoryError"),
    "tensor memory": ("out of memory", "can't allocate memory"),
    "shm": ("shm", "Bus error"),
    "crash": ("crashed", "ended by SIGSEGV"),
    "load: raise": ("user code", "KeyError: 'no such digit'"),
}
REMEDIES = {
    "shm": "--shm-size",
    "out of memory": "train.batch_size",
    "crashed": "the Python stack is in the rank's log",
}


def fail_once(run: Run, rank: int, word: str) -> dict[str, object]:
    """Make a rank fail; return the failure once the next attempt trains."""
    failures, starts = len(run.events("failure")), len(run.events("first_step"))
    run.order(rank, word)
    failure = run.wait("failure", failures + 1)
    run.wait("first_step", starts + 1)
    return failure


def test_every_failure_is_named_and_followed_by_a_restart(tmp_path: Path) -> None:
    keys = ["train.steps=1000000", "task_args.step_s=0.01", f"agent.restarts={len(EXPECTED) + 9}"]
    with submitted(tmp_path, *keys) as run:
        run.wait("first_step")
        for number, (word, (kind, message)) in enumerate(EXPECTED.items()):
            rank = number % 2
            failure = fail_once(run, rank, word)
            assert (failure["rank"], failure["kind"]) == (rank, kind), (word, failure)
            assert message in str(failure["message"]), (word, failure)
            paragraph = [line for line in run.log("node-0.log").splitlines() if " begins" not in line][-1]
            assert f"rank {rank} on node 0" in paragraph and f"[{kind}]" in paragraph, paragraph
            assert f"logs/rank-{rank}.log" in paragraph and REMEDIES.get(kind, "") in paragraph
        assert "Segmentation fault" in run.log("rank-1.log")
        kill(run.ranks()[1], signal.SIGKILL)
        assert run.wait("failure", len(EXPECTED) + 1)["kind"] == "killed"
        template = run.template(0)
        starts = len(run.events("first_step"))
        wait_for("a new attempt", lambda: len(run.events("ranks")) == len(EXPECTED) + 2)
        kill(template)
        run.wait("first_step", starts + 1)
        assert "agent.py" not in run.log("node-0.log"), "the agent itself stumbled"


def test_without_progress_the_budget_ends_and_with_it_not(tmp_path: Path) -> None:
    keys = ["train.steps=1000000", "task_args.step_s=0.15", "agent.restarts=2", "checkpoint.in_memory=false"]
    with submitted(tmp_path, *keys) as run:
        for number in range(4):  # progress each time: more failures than restarts
            run.wait("checkpoint", number + 1)
            fail_once(run, 0, "raise")
        for number, word in enumerate(("exit 3", "raise")):  # none any more: restart, restart, end
            run.wait("first_step", 5 + number)
            run.order(1, word)
            run.wait("failure", 5 + number)
        assert result(run) == 1
        status = run.status()
        assert status["state"] == "failed" and status["code"] == 1
        assert "rank 1 on node 0" in status["reason"] and "KeyError" in status["reason"]
        assert "Gave up after 2 restarts without progress" in status["reason"]
        run.wait_gone()
        failures = json.loads((run.folder / "failure.json").read_text())["failures"]
        assert [failure["kind"] for failure in failures] == ["user code"] * 6


def test_a_loss_that_is_not_finite_is_not_tried_again(tmp_path: Path) -> None:
    keys = ["task=digit_tasks:Poisoned", "task_args={index: 7, first: 6, last: 10}", "devices_per_node=2"]
    with submitted(tmp_path, *keys, file=HERE / "small.yaml") as run:
        assert result(run) == 1
        [failure] = json.loads((run.folder / "failure.json").read_text())["failures"]
        assert failure["kind"] == "loss" and "samples" in failure["message"]
        assert "train.on_nan=skip" in run.status()["reason"]


def test_a_wrong_job_is_not_tried_again(tmp_path: Path) -> None:
    with submitted(tmp_path, "train.steps=1000000", "task_args.step_s=0.01", "nodes=2", "devices_per_node=1") as run:
        run.wait("first_step")
        run.order(1, "job error")
        assert result(run) == 64
        status = run.status()
        assert (status["state"], status["code"], status["attempt"]) == ("failed", 64, 0)
        assert "rank 1 on node 1" in status["reason"] and "[config]" in status["reason"]
        assert "task_args.width=7: does not fit these images. Use 8" in status["reason"]
        assert "not retried" in status["reason"]


def test_a_refusal_by_a_rank_is_said_once(tmp_path: Path) -> None:
    done = muster("run", HERE / "small.yaml", "checkpoint.best=acuracy", f"runs={tmp_path}")
    (run,) = tmp_path.glob("small-*")
    said = done.stdout + done.stderr
    assert (done.returncode, said.count("is not a metric of this task"), done.stderr.count(str(run))) == (64, 1, 1)


def test_a_followed_run_ends_with_the_code_of_its_job(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text("import sys\nsys.exit(3)\n")
    done = muster("run", HERE / "faulty.yaml", "task=null", f"script={script}", f"runs={tmp_path}", "agent.restarts=0")
    assert done.returncode == 3
    assert "ended with exit code 3" in done.stderr and "Continue with: " in done.stderr


LATE = """
import sys, time
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == int(sys.argv[1]):
    try:
        raise ValueError("the cause")
    finally:  # its peers notice long before the exception has left the script
        dist.destroy_process_group()
        time.sleep(1.5)
dist.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize(("nodes", "rank"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_the_cause_is_named_even_if_it_shows_after_its_consequences(tmp_path: Path, nodes: int, rank: int) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE)
    keys = [
        "task=null",
        f"script={script}",
        f"script_args=[{rank}]",
        f"nodes={nodes}",
        f"devices_per_node={2 // nodes}",
    ]
    with submitted(tmp_path, *keys, "agent.restarts=0") as run:
        assert result(run) == FAILED
        [failure] = json.loads((run.folder / "failure.json").read_text())["failures"]
    assert (failure["rank"], failure["kind"], failure["message"]) == (rank, "user code", "ValueError: the cause")
