"""From kill -9 of a rank to the next completed step, and the steps that are lost, under muster and under torchrun.

By turns: a task and a script with a session (`bench/tiny_session.py`), whose state is copied to memory; and the same
training as a plain script (`bench/tiny.py`), which saves every 10 steps, under either. The kill comes some seconds
after the first step, and 5 steps after a save. torchrun's in-job restart is broken on gloo with its default settings in
some versions of torch: it is measured with the known workaround, too, which is what ratios are taken to, within a
round.

    python bench/recovery.py [--rounds 8] [--quick] [--output bench/results/recovery.json]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import measure
from measure import BIN, SESSION, TRAINING, Mark, show, spread, table

from trainer.records import read_lines
from trainer.run.folder import RunFolder

START_S, SETTLE_S, RECOVER_S = 90.0, 6.0, 30.0
"""Until the first step at most; from there to the kill; after the kill, until a job counts as not recovered."""
BASE = "torchrun, workaround"
QUICK = ("muster, task, one node", "muster, task, two nodes", BASE)
GATE = 0.7
"""What fails `--quick`: a ratio to torchrun above it, or a run of ours that does not recover."""


@dataclass
class Runner:
    """One row: how to start the training in a folder so that it restarts after a failure."""

    name: str
    command: Callable[[Path, list[str]], list[str | Path]]
    variables: dict[str, str] = field(default_factory=dict)
    marks: Callable[[Path], list[Mark]] = lambda folder: measure.read_marks(folder / "marks")
    """What the ranks have done so far, in the folder of the training."""

    @property
    def ours(self) -> bool:
        """Whether it is what the others are compared with."""
        return self.name.startswith("muster")


def _muster(script: Path = TRAINING, **keys: Any) -> Callable[[Path, list[str]], list[str | Path]]:
    return lambda folder, words: [BIN / "muster", "run", measure.write_job(folder, words, script, **keys)]


def _muster_task(**keys: Any) -> Callable[[Path, list[str]], list[str | Path]]:
    """The digits, without an end or an evaluation; with the defaults else."""
    job = {
        "task": "trainer.tasks.digits:Digits", "device": "cpu", "train": {"batch_size": 64, "steps": 10**6},
        "evaluation": {"every_epochs": 10**6}, "log": {"every_steps": 1}, **keys,
    }  # fmt: skip

    def command(folder: Path, words: list[str]) -> list[str | Path]:
        (folder / "digits.yaml").write_text(json.dumps(job | {"runs": str(folder / "runs")}))
        return [BIN / "muster", "run", folder / "digits.yaml"]

    return command


def read_task_marks(folder: Path) -> list[Mark]:
    """The steps that rank 0 recorded, which all ranks have completed then."""
    marks = []
    for run in (folder / "runs").glob("[!.]*"):
        lines = read_lines(run / "metrics.jsonl")  # before the events: each line's attempt is among them then
        pids: dict[int, dict[str, int]] = {}
        for event in RunFolder(run).read_events():
            if event["event"] == "ranks":
                pids.setdefault(event["attempt"], {}).update(event["pids"])
        for line in lines:
            if line["kind"] == "train":
                marks += [Mark(line["time"], pid, int(rank), "step", line["step"])
                          for rank, pid in pids[line["attempt"]].items()]  # fmt: skip
    return marks


def _torchrun(folder: Path, words: list[str]) -> list[str | Path]:
    return [BIN / "torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=3", TRAINING, *words]


RUNNERS = [
    Runner("muster, task, one node", _muster_task(devices_per_node=2), marks=read_task_marks),
    Runner("muster, task, two nodes", _muster_task(nodes=2, devices_per_node=1), marks=read_task_marks),
    Runner("muster, session, one node", _muster(SESSION, devices_per_node=2)),
    Runner("muster, session, two nodes", _muster(SESSION, nodes=2, devices_per_node=1)),
    Runner("muster, script, one node", _muster(devices_per_node=2)),
    Runner("muster, script, two nodes", _muster(nodes=2, devices_per_node=1)),
    Runner("torchrun", _torchrun),
    Runner(BASE, _torchrun, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}),
]


def wait_for(read: Callable[[], list[Mark]], ready: Callable[[Mark], bool], timeout_s: float) -> Mark | None:
    """The first mark of a kind; None when it does not come."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        found = next((mark for mark in read() if ready(mark)), None)
        if found is not None:
            return found
        time.sleep(0.02)
    return None


def kill_once(runner: Runner, victim: int) -> dict[str, Any]:
    """Start the training, kill a rank, wait for the next step that any rank of the next attempt completes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = ["--marks", str(folder / "marks"), "--state", str(folder / "state"), "--steps=1000000", "--pause=0.02"]

        def marks() -> list[Mark]:
            return runner.marks(folder)

        process = measure.start(runner.command(folder, words), folder, **runner.variables)
        try:
            first = wait_for(marks, lambda mark: mark.what == "step", START_S)
            kill_at = (first.time if first else 0) + SETTLE_S
            due = first and wait_for(
                marks,
                lambda mark: (
                    mark.rank == victim and mark.what == "step" and mark.step % 10 == 5 and mark.time > kill_at
                ),
                START_S,
            )
            if due is None:
                raise SystemExit(f"{runner.name} did not start:\n{(folder / 'output.txt').read_text()[-3000:]}")
            killed = time.time()
            os.kill(due.pid, signal.SIGKILL)
            old = {mark.pid for mark in marks()}
            after = wait_for(marks, lambda mark: mark.what == "step" and mark.pid not in old, RECOVER_S)
            before = max(mark.step for mark in marks() if mark.what == "step" and mark.pid in old)
        finally:
            end(process.pid)
        if after is None:
            return {"recovered": False}
        # A task's rank 0 may have been killed between a step's end and its record.
        return {"recovered": True, "s": after.time - killed, "lost": max(0, before - after.step + 1)}


def end(pid: int) -> None:
    """Kill a run: the command first, so that it restarts nothing."""
    for left in [pid, *measure.descendants()]:
        with suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    measure.wait_all(0)


def summarize(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each: how often it recovered, seconds and steps lost when it did, ratio to torchrun round by round."""
    rows = []
    for name, results in found.items():
        done = [result for result in results if result["recovered"]]
        pairs = [
            (ours["s"], base["s"]) for ours, base in zip(results, found[BASE], strict=True)
            if ours["recovered"] and base["recovered"]
        ]  # fmt: skip
        rows.append({
            "runner": name, "rounds": len(results), "recovered": len(done),
            "s": spread([result["s"] for result in done]) if done else None,
            "ratio": spread([ours / base for ours, base in pairs]) if pairs else None,
            "steps_lost": spread([float(result["lost"]) for result in done]) if done else None,
        })  # fmt: skip
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The table, as text; a count of steps is shown however far it varies."""
    cells = [["kill -9 to the next step", "recovered", "seconds [quartiles]", f"ratio to {BASE}", "lost"]]
    for row in rows:
        recovered = f"{row['recovered']} of {row['rounds']}"
        if row["s"] is None:
            cells.append([row["runner"], recovered, "-", "-", "-"])
            continue
        ratio = show(row["ratio"]) if row["runner"] != BASE else "1"
        lost = f"{row['steps_lost']['median']:.0f} steps"
        cells.append([row["runner"], recovered, show(row["s"]), ratio, lost])
    return table(cells)


def main() -> int:
    """Measure, print, write; 1 when `--quick` finds a recovery that is far too slow."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, help="default 8; 1 with --quick")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}, for CI")
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "recovery.json")
    options = parser.parse_args()
    measure.adopt_orphans()
    runners = [runner for runner in RUNNERS if not options.quick or runner.name in QUICK]
    found: dict[str, list[dict[str, Any]]] = {runner.name: [] for runner in runners}
    rounds = options.rounds or (1 if options.quick else 8)
    for number in range(rounds):
        turn = number % len(runners)
        for runner in runners[turn:] + runners[:turn]:
            found[runner.name].append(kill_once(runner, number % 2))
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = summarize(found)
    if not options.quick:
        print(report(rows))
        measure.write_results(options.output, rows=rows)
        return 0
    failed = False
    for row in (row for row in rows if row["runner"].startswith("muster")):
        ratio = row["ratio"]["median"] if row["ratio"] else float("nan")
        print(f"{row['runner']}: recovered {row['recovered']} of {row['rounds']}, "
              f"{ratio:.2f} of the time of {BASE} (must be <= {GATE})")  # fmt: skip
        failed = failed or row["recovered"] < row["rounds"] or ratio > GATE
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
