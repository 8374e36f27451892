"""A process of the agent writes the checkpoints: whoever is killed meanwhile, nothing that was committed is lost."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from foreign import missing, put_foreign
from muster_runs import Run, alive, children, kill, muster, stat, submitted, wait_for

from trainer.checkpoint.files import UNFINISHED, newest_good
from trainer.records import read_lines
from trainer.run.folder import RunFolder, step_of

HANG_S = 5
KEYS = ["devices_per_node=2", "task_args.step_s=0.004", "train.steps=1000000", "checkpoint.every_steps=10",
        f"agent.hang_timeout_s={HANG_S}"]  # fmt: skip


def writer(run: Run) -> int:
    """The process that writes for the present attempt."""
    found = wait_for("a writer", lambda: [pid for pid in children(run.template(0)) if name(pid) == "muster-writer"])
    assert len(found) == 1
    return int(found[0])


def name(pid: int) -> str:
    """What a process is called."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def stop(run: Run) -> tuple[int, int]:
    """Stop the writer, and wait until the ranks wait for it; the newest step that was committed by then."""
    process, rank = writer(run), run.ranks()[0]
    os.kill(process, signal.SIGSTOP)
    wait_for("the end of its work", lambda: stat(process)[:1] == ["T"])
    steps = [-1, -1]

    def stands() -> bool:
        time.sleep(0.2)
        steps.append(read_lines(run.folder / "metrics.jsonl")[-1]["step"])
        return steps[-1] == steps[-2] == steps[-3]

    wait_for("both buffers in use", stands)
    assert alive(rank)
    return process, RunFolder(run.folder).steps_committed()  # the writer may not have told of it


def leftovers(run: Run) -> set[Path]:
    """What is not a checkpoint yet, or any more."""
    return {path for path in (run.folder / "checkpoints").iterdir() if UNFINISHED.fullmatch(path.name)}


def test_whoever_is_killed_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    with submitted(tmp_path, *KEYS) as run:
        run.wait("checkpoint", 2)

        foreign = put_foreign(run.folder)

        # Nobody: however long the disk takes, the ranks that wait for it do not hang.
        process, newest = stop(run)
        time.sleep(HANG_S + 1)
        assert not run.events("hung", "failure")

        # The ranks: what they ordered is committed, and they go on from it without reading it.
        for rank in run.ranks().values():
            kill(rank)
        resume = run.wait("resume")
        ordered = range(newest + 10, resume["step"] + 1, 10)
        assert resume["folder"] == "memory" and ordered
        assert RunFolder(run.folder).steps_committed() == newest
        os.kill(process, signal.SIGCONT)

        def later() -> list[tuple[int, int]]:
            found = [(event["step"], event["attempt"]) for event in run.events("checkpoint")]
            return [each for each in found if each[0] > newest]

        late = wait_for("the checkpoints", lambda: later() if len(later()) > len(ordered) else None)
        assert late[: len(ordered) + 1] == [*((step, 0) for step in ordered), (ordered[-1] + 10, 1)]

        # The writer: rank 0 says so, the next attempt goes on from memory, and tidies up.
        process, newest = stop(run)
        left = leftovers(run)
        kill(process)
        resume = run.wait("resume", 2)
        assert resume["folder"] == "memory" and resume["step"] >= newest
        assert "the process that writes checkpoints was killed" in run.events("failure")[-1]["message"]
        run.wait("checkpoint", len(run.events("checkpoint")) + 2)
        assert not left & leftovers(run)

        # The agent, and with it the memory, its ranks and the writer.
        process, newest = stop(run)
        kill(run.agents()[0])
        resume = run.wait("resume", 3)
        assert resume["folder"] == f"step-{newest:09d}"
        assert not alive(process)
        run.wait("checkpoint", len(run.events("checkpoint")) + 2)
        saved, refused = newest_good(run.folder / "checkpoints")
        assert saved is not None and step_of(saved) > newest and not refused
        assert not missing(foreign)
        assert run.status()["step"] > 0 and muster("list", tmp_path).returncode == 0
