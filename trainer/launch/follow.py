"""Following a run from its folder: what a script prints; of a task a bar in a terminal, plain lines elsewhere.

At the end there is a table, or the reason why there is none.
"""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any

from trainer.config.job import Job
from trainer.errors import FAILED, WRONG_JOB
from trainer.launch.platform import JobStatus, Phase
from trainer.launch.waiting import Waiting
from trainer.records import NOT_OURS, is_count, parse_lines
from trainer.run.event_files import Event
from trainer.run.folder import RunFolder
from trainer.run.history import likely_end, restarts_text, why_ended
from trainer.run.line_file import warn
from trainer.run.log_tail import EventTail, Tail
from trainer.run.progress import measured
from trainer.run.summary import plain_table, resume_command, separate_ranks

POLL_S = 0.1
BESIDE = 45
"""Columns for bar, counts, time and gaps: what is said beside them gets the rest of the terminal."""


def follow(
    run: RunFolder, job: Job, status: Callable[[], JobStatus], stop: Callable[[], None], all_ranks: bool = False
) -> int:
    """Show a run until it ends; Ctrl-C calls `stop` and goes on waiting. Return the job's exit code.

    Of a script, what rank 0 prints is shown as under torchrun; `all_ranks`: what every rank prints.
    """
    events, metrics, waiting = EventTail(run), Tail(run.metrics), Waiting(run)
    ranks = range(job.world_size if all_ranks else 1 if job.script else 0)
    output = {rank: Tail(run.rank_log(rank)) for rank in ranks}
    with ExitStack() as stack:
        show = Bar(stack) if sys.stdout.isatty() and not job.script else Lines()
        now, problem = JobStatus(Phase.PENDING), ""
        while True:
            try:
                now = status()
                if text := waiting.line(now):
                    show.say(text)
                for event in events.events(last=not now.is_active):
                    with suppress(*NOT_OURS):
                        show.event(event)
                for line in parse_lines(metrics.lines()):
                    with suppress(*NOT_OURS):
                        show.metrics(line)
                if all_ranks:
                    show.output(output, not now.is_active)
                elif output:
                    output[0].copy()
                if not now.is_active:
                    break
                time.sleep(POLL_S)
            except BrokenPipeError:
                raise  # nobody follows the run any more
            except OSError as error:  # a file server that does not answer, or a full disk that our output goes to
                if str(error) != problem:
                    warn(f"cannot be shown: {error}")
                problem = str(error)
                if not now.is_active:
                    break
                time.sleep(POLL_S)
            except KeyboardInterrupt:
                show.say("stopping: one step, one checkpoint (Ctrl-C again to end at once)")
                stop()
    try:
        end(run, now)
    except BrokenPipeError:
        raise
    except OSError as error:
        warn(f"the end of {run} cannot be shown: {error.strerror}")
    except NOT_OURS as error:
        warn(f"the end of {run} cannot be shown: its records cannot be read: {error!r}")
    return now.code if now.code is not None else FAILED


def end(run: RunFolder, status: JobStatus) -> None:
    """Print the table, or why there is none."""
    events = run.read_events()
    restarts = f"\nrestarts {text}" if (text := restarts_text(events)) else ""
    if status.phase == Phase.DONE:
        # Where the nodes keep the run folder, or a script trained, there is no table here.
        note = separate_ranks(run)
        print("\n" + (plain_table(run) or f"done: {run}{restarts}") + (f"\n{note}" if note else ""))
        return
    reason = why_ended(run, events) or status.reason or likely_end(run, events) or status.phase
    print(f"{status.phase.upper()}: {reason}{restarts}", file=sys.stderr)
    if status.code != WRONG_JOB:  # that one would only be refused again
        print(f"Continue with: {resume_command(run)}", file=sys.stderr)


class Lines:
    """Plain lines for a log: events and evaluations, and now and then a step."""

    steps = 0
    shown = 0.0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def output(self, logs: dict[int, Tail], ended: bool) -> None:
        """What ranks printed, line by line; that of rank 0 as it is."""
        for rank, log in logs.items():
            for line in log.lines(ended):
                self.say(f"[rank {rank}] {line}" if rank else line)

    def event(self, event: Event) -> None:
        steps = event.get("steps") if event["event"] == "training" else None
        self.steps = steps if is_count(steps) else self.steps
        text = describe(event)
        if text:
            self.say(text)

    def metrics(self, line: dict[str, Any]) -> None:
        """Evaluations always, steps at most every 5 s."""
        if line["kind"] != "evaluation":
            if time.monotonic() - self.shown <= 5:
                return
            self.shown = time.monotonic()
        self.say(f"step {line['step']}/{self.steps or '?'}  {numbers(line)}")


class Bar(Lines):
    """A progress bar with the newest loss, speed and evaluation; lines appear above it."""

    def __init__(self, stack: ExitStack) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # slow

        columns = BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}")
        self.bar = stack.enter_context(Progress(*columns, expand=True))
        self.task, self.best = self.bar.add_task("", total=None, text="starting"), ""

    def say(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, markup=False)

    def event(self, event: Event) -> None:
        if event["event"] == "training":
            steps, step = event.get("steps"), event.get("step")
            self.bar.update(self.task, total=steps if is_count(steps) and steps else None)
            self._go_to(step)
        super().event(event)

    def metrics(self, line: dict[str, Any]) -> None:
        text = numbers(line)
        if line["kind"] == "evaluation":
            self.best = text
            return
        if len(text) + 2 + len(self.best) <= self.bar.console.width - BESIDE:
            text += f"  {self.best}"
        self.bar.update(self.task, text=text)
        self._go_to(line["step"])

    def _go_to(self, step: Any) -> None:
        """Anything but a number would end the thread that draws the bar."""
        if is_count(step):
            self.bar.update(self.task, completed=step)


def numbers(line: dict[str, Any]) -> str:
    """What a line of `metrics.jsonl` measured, in words."""
    found = measured(line)
    speed = f"{found.pop('samples_per_s'):,.0f} samples/s" if "samples_per_s" in found else ""
    if "mean_loss" in found:  # of a task
        found = {"loss": found["mean_loss"]}
    return "  ".join([*(f"{name} {value:.4f}" for name, value in found.items()), *filter(None, [speed])])


TEXTS = {
    "training": "training{begun}{end}: {parallel}, {world_size} rank(s) on {device}",
    "failure": "{who}node {node} failed [{kind}]: {message:.300}{place}",
    "restart": "restarting: attempt {attempt}", "resume": "resumed from {folder}", "requeued": "requeued",
    "checkpoint_refused": "checkpoint refused: {problem}", "pending": "pending: {reason}",
    "agent_lost": "the agent of node {node} was lost (exit {code}); starting it again",
    "stopped": "stopped at step {step} with a checkpoint",
    "note": "NOTE: {message}", "notice": "WARNING: {message}", "nonfinite_loss": "the loss of step {step} is {loss}",
}  # fmt: skip


def describe(event: Event) -> str:
    """An event in words, empty for those that only machines read, and for a refusal: the end of the run is about it."""
    if event["event"] == "failure" and event.get("code") == WRONG_JOB:
        return ""
    begun = f" from step {event['step']}" if event.get("step") else ""
    end = f" to {event['steps']}" if event.get("steps") else ""  # scripts need not tell
    who = "" if event.get("rank") is None else f"rank {event['rank']} on "
    place = f" (at {where})" if (where := event.get("cause", "").partition(" at ")[2]) else ""
    words = {"begun": begun, "end": end, "who": who, "place": place}
    return TEXTS.get(event["event"], "").format_map({**event, **words})
