"""Following a run from its folder: what a script prints; of a task a bar in a terminal, plain lines elsewhere.

At the end there is a table, or the reason why there is none.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from trainer.config.job import Job
from trainer.errors import FAILED
from trainer.launch.platform import JobStatus, Phase
from trainer.records import read_json
from trainer.run.folder import RunFolder
from trainer.run.log_tail import Tail
from trainer.run.summary import plain_table, resume_command

POLL_S = 0.1
BESIDE = 45
"""Columns for bar, counts, time and gaps: what is said beside them gets the rest of the terminal."""


def follow(
    run: RunFolder, job: Job, status: Callable[[], JobStatus], stop: Callable[[], None], all_ranks: bool = False
) -> int:
    """Show a run until it ends; Ctrl-C calls `stop` and goes on waiting. Return the job's exit code.

    Of a script, what rank 0 prints is shown as under torchrun; `all_ranks`: what every rank prints.
    """
    show = Bar() if sys.stdout.isatty() and not job.script else Lines()
    events, metrics = Tail(run.events), Tail(run.metrics)
    ranks = range(job.world_size if all_ranks else 1 if job.script else 0)
    output = {rank: Tail(run.rank_log(rank)) for rank in ranks}
    with show:
        while True:
            try:
                now = status()
                for event in _read_json(events):
                    show.event(event)
                for line in _read_json(metrics):
                    show.metrics(line)
                if all_ranks:
                    show.output(output, not now.is_active)
                elif output:
                    output[0].copy()
                if not now.is_active:
                    break
                time.sleep(POLL_S)
            except KeyboardInterrupt:
                show.say("stopping: one step, one checkpoint (Ctrl-C again to end at once)")
                stop()
    end(run, now)
    return now.code if now.code is not None else FAILED


def _read_json(tail: Tail) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tail.lines() if line.startswith("{")]


def end(run: RunFolder, status: JobStatus) -> None:
    """Print the table, or why there is none."""
    if status.phase == Phase.DONE:
        # Not wrapped: its last line is to be pasted. Where the nodes keep the run folder there is no table here.
        print("\n" + (plain_table(run) or f"continue with  {resume_command(run)}"))
        return
    failure = read_json(run.failure)
    ended = [event for event in run.read_events() if event["event"] == "ended"]
    reason = (failure or {}).get("reason") or (ended[-1]["reason"] if ended else status.reason) or status.phase
    print(f"{status.phase.upper()}: {reason}", file=sys.stderr)
    print(f"Continue with: {resume_command(run)}", file=sys.stderr)


class Lines:
    """Plain lines for a log: events and evaluations, and now and then a step."""

    def __init__(self) -> None:
        """Nothing shown yet."""
        self.steps = 0
        self.shown = 0.0

    def __enter__(self) -> Lines:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End."""

    def say(self, text: str) -> None:
        """One line."""
        print(text, flush=True)

    def output(self, logs: dict[int, Tail], ended: bool) -> None:
        """What ranks printed, line by line; that of rank 0 as it is."""
        for rank, log in logs.items():
            for line in log.lines(ended):
                self.say(f"[rank {rank}] {line}" if rank else line)

    def event(self, event: dict[str, Any]) -> None:
        """Say what matters to a person."""
        if event["event"] == "training":
            self.steps = event["steps"]
        text = describe(event)
        if text:
            self.say(text)

    def metrics(self, line: dict[str, Any]) -> None:
        """Evaluations always, steps at most every 5 s."""
        if line["kind"] == "evaluation":
            self.say(f"step {line['step']}/{self.steps}  " + scalars(line))
        elif time.monotonic() - self.shown > 5:
            self.shown = time.monotonic()
            self.say(
                f"step {line['step']}/{self.steps}  loss {line['mean_loss']:.4f}  "
                f"{line['samples_per_s']:,.0f} samples/s"
            )


class Bar(Lines):
    """A progress bar with the newest loss, speed and evaluation."""

    def __init__(self) -> None:
        """Make the bar; it appears when the training begins."""
        super().__init__()
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"), expand=True
        )
        self.task = self.bar.add_task("", total=None, text="starting")
        self.best = ""

    def __enter__(self) -> Bar:
        """Show it."""
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last state on the screen."""
        self.bar.stop()

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.bar.console.print(text, highlight=False, markup=False)

    def event(self, event: dict[str, Any]) -> None:
        """Events that change the bar, and those worth a line."""
        if event["event"] == "training":
            self.bar.update(self.task, total=event["steps"], completed=event["step"])
        super().event(event)

    def metrics(self, line: dict[str, Any]) -> None:
        """Move the bar."""
        if line["kind"] == "evaluation":
            self.best = scalars(line)
        else:
            text = f"loss {line['mean_loss']:.4f}  {line['samples_per_s']:,.0f} samples/s"
            if len(text) + 2 + len(self.best) <= self.bar.console.width - BESIDE:
                text += f"  {self.best}"
            self.bar.update(self.task, completed=line["step"], text=text)


def scalars(line: dict[str, Any]) -> str:
    """The metrics of an evaluation in words."""
    skip = ("kind", "step", "attempt", "time")
    return "  ".join(f"{name} {value:.4f}" for name, value in line.items() if name not in skip)


def describe(event: dict[str, Any]) -> str:
    """An event in words, empty for those that only machines read."""
    kind = event["event"]
    if kind == "training":
        begun = f"from step {event['step']} " if event["step"] else ""
        where = f"{event['parallel']}, {event['world_size']} rank(s) on {event['device']}"
        return f"training {begun}to {event['steps']}: {where}"
    if kind == "failure" and event.get("rank") is not None:
        return f"rank {event['rank']} on node {event['node']} failed [{event['kind']}]: {event['message'][:300]}"
    if kind == "failure":
        return f"node {event['node']} failed [{event['kind']}]: {event['message'][:300]}"
    texts = {
        "restart": "restarting: attempt {attempt}", "resume": "resumed from {folder}", "requeued": "requeued",
        "checkpoint_refused": "checkpoint refused: {problem}", "pending": "pending: {reason}",
        "agent_lost": "the agent of node {node} was lost (exit {code}); starting it again",
        "stopped": "stopped at step {step} with a checkpoint",
        "nonfinite_loss": "the loss of step {step} is {loss}",
    }  # fmt: skip
    return texts[kind].format(**event) if kind in texts else ""
