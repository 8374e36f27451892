"""Following a run from its folder until it ends. Then there is a table, or the reason why there is none.

What is seen meanwhile is in `trainer.launch.display`.
"""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from trainer.config.job import Job
from trainer.errors import FAILED, WRONG_JOB
from trainer.launch.display import Bar, Lines, can_draw
from trainer.launch.platform import JobStatus, Phase
from trainer.launch.waiting import Waiting
from trainer.records import NOT_OURS, is_number, parse_lines
from trainer.run.folder import RunFolder
from trainer.run.history import likely_end, restarts_text, why_ended
from trainer.run.line_file import warn
from trainer.run.log_tail import EventTail, Tail
from trainer.run.summary import plain_table, resume_command, separate_ranks

POLL_S = 0.1


def follow(
    run: RunFolder,
    job: Job,
    status: Callable[[], JobStatus],
    stop: Callable[[], None],
    all_ranks: bool = False,
    speaks: bool = False,
) -> int:
    """Show a run until it ends; Ctrl-C calls `stop` and goes on waiting. Return the job's exit code.

    Of a script, what rank 0 prints is shown as under torchrun; `all_ranks`: what every rank prints. `speaks`: `status`
    itself prints how the run goes.
    """  # fmt: skip
    events, metrics, waiting = EventTail(run), Tail(run.metrics), Waiting(run)
    ranks = range(job.world_size if all_ranks else 1 if job.script else 0)
    output = {rank: Tail(run.rank_log(rank)) for rank in ranks}
    show = Bar(bool(job.script)) if can_draw() and not speaks else Lines()
    show.is_told = all_ranks and not job.script  # by rank 0 of a task, in its log
    now, problem = JobStatus(Phase.PENDING), ""
    try:
        while True:
            try:
                now = status()
                if text := waiting.line(now):
                    show.say(text)
                for line in sorted([*events.events(not now.is_active), *parse_lines(metrics.lines())], key=_time):
                    with suppress(*NOT_OURS):
                        show.event(line) if "event" in line else show.metrics(line)
                if all_ranks:
                    show.output(output, not now.is_active)
                elif output:
                    show.copy(output[0])
                if not now.is_active:
                    break
                with suppress(*NOT_OURS):
                    show.draw()
                time.sleep(POLL_S)
            except BrokenPipeError:
                raise  # nobody follows the run any more
            except OSError as error:  # a file server that does not answer, or a full disk that our output goes to
                if str(error) != problem:
                    show.clear()
                    warn(f"cannot be shown: {error}")
                problem = str(error)
                if not now.is_active:
                    break
                time.sleep(POLL_S)
            except KeyboardInterrupt:
                show.stopping()
                stop()
    finally:
        show.clear()
    try:
        end(run, now, show.is_told)
    except BrokenPipeError:
        raise
    except OSError as error:
        warn(f"the end of {run} cannot be shown: {error.strerror}")
    except NOT_OURS as error:
        warn(f"the end of {run} cannot be shown: its records cannot be read: {error!r}")
    return now.code if now.code is not None else FAILED


def _time(line: dict[str, Any]) -> float:
    """When an event or a line of the metrics was written."""
    return float(when) if is_number(when := line.get("time")) else 0.0


def end(run: RunFolder, status: JobStatus, is_told: bool = False) -> None:
    """Print the table, or why there is none; `is_told`: a rank has printed the table already."""
    events = run.read_events()
    restarts = f"\nrestarts {text}" if (text := restarts_text(events)) else ""
    if status.phase == Phase.DONE:
        # Where the nodes keep the run folder, or a script trained, there is no table here.
        note = separate_ranks(run)
        table = "" if is_told else plain_table(run)
        print("\n" + (table or f"done: {run}{restarts}") + (f"\n{note}" if note else ""))
        return
    reason = why_ended(run, events) or status.reason or likely_end(run, events) or status.phase
    print(f"{status.phase.upper()}: {reason}{restarts}", file=sys.stderr)
    if status.code != WRONG_JOB:  # that one would only be refused again
        print(f"Continue with: {resume_command(run)}", file=sys.stderr)
