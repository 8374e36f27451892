"""What is seen of a run that is followed: lines, and in a terminal a bar below them."""

import os
import shutil
import sys
import time
from collections import deque
from contextlib import suppress
from typing import Any

from trainer.records import is_count
from trainer.run.descriptions import describe, duration, epoch, values_of
from trainer.run.event_files import Event
from trainer.run.log_tail import Tail, write_out
from trainer.run.progress import pace

EVERY_S = 5.0
"""Between two lines about steps, where there is no bar."""
LONGEST_BAR = 50
NARROW = 60
"""Columns below which the bar itself gets hardly any."""
FREE = 3
"""Columns at the right that stay empty: terminals differ in what happens in the last one, and echo `^C`."""
LATELY = 50
"""Lines of the metrics that the time left is told from."""


def can_draw() -> bool:
    """Whether standard output is a terminal that can go back to the begin of a line."""
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"


class Lines:
    """Plain lines for a log: events and evaluations, and now and then a step."""

    is_told = False
    """Whether what is shown of the ranks' logs tells the evaluations already."""

    def __init__(self) -> None:
        self.training: Event = {}
        self.shown = 0.0

    def say(self, text: str) -> None:
        print(text, flush=True)

    def copy(self, log: Tail) -> None:
        """What a script printed, as it is."""
        log.copy()

    def output(self, logs: dict[int, Tail], ended: bool) -> None:
        """What ranks printed, line by line; that of rank 0 as it is."""
        for rank, log in logs.items():
            for line in log.lines(ended):
                self.say(f"[rank {rank}] {line}" if rank else line)

    def event(self, event: Event) -> None:
        if event["event"] == "training":
            self.training = event
        text = describe(event)
        if text:
            self.say(text)

    def metrics(self, line: dict[str, Any]) -> None:
        """Evaluations always, steps now and then."""
        if line["kind"] == "evaluation":
            if self.is_told:
                return
        elif time.monotonic() - self.shown <= EVERY_S:
            return
        else:
            self.shown = time.monotonic()
        steps, now = self.training.get("steps"), epoch(self.training, line["step"])
        values, speed = values_of(line)
        words = [f"step {line['step']}/{steps if is_count(steps) and steps else '?'}", f"epoch {now}" if now else ""]
        self.say("  ".join(filter(None, [*words, f"{line['kind']} {'  '.join(values)}", speed])))

    def stopping(self) -> None:
        self.say("stopping: one step, one checkpoint (Ctrl-C again to end at once)")

    def draw(self) -> None:
        """Show how far the run is."""

    def clear(self) -> None:
        """Take away what `draw` drew."""


class Bar(Lines):
    """A line with a bar, which stays below the others: how far the run is, its newest values, the time left."""

    def __init__(self, is_script: bool) -> None:
        """`is_script`: it speaks itself, and gets no bar unless a session tells how far it is."""
        super().__init__()
        self.state = "" if is_script else "starting"
        """What goes on instead of a training."""
        self.wanted = not is_script
        self.drawn = ""
        self.at_begin = True
        """Whether the cursor is where a line begins: scripts print parts of lines."""
        self.step, self.since = 0, time.time()
        self.train: list[str] = []
        self.evaluation: list[str] = []
        self.speed = ""
        self.lately: deque[dict[str, Any]] = deque(maxlen=LATELY)

    def say(self, text: str) -> None:
        self.clear()
        super().say(text if self.at_begin else f"\n{text}")
        self.at_begin = True

    def copy(self, log: Tail) -> None:
        new = log.read()
        if new:
            self.clear()
            write_out(new)
            self.at_begin = new.endswith(b"\n")

    def event(self, event: Event) -> None:
        super().event(event)
        kind = event["event"]
        if kind == "training":
            self.state, self.wanted = "", True
            self.lately.clear()
            self._go_to(event.get("step"))
        elif kind == "failure":
            self.state = "restarting"
        elif kind in ("stopped", "done", "ended"):
            self.wanted = False

    def metrics(self, line: dict[str, Any]) -> None:
        values, speed = values_of(line)
        if line.get("attempt") != self.training.get("attempt", line.get("attempt")):
            return  # a killed attempt's
        if line["kind"] == "evaluation":
            self.evaluation = values
            super().metrics(line)
        else:
            self.train, self.speed = values, speed
            self.lately.append(line)
        self._go_to(line["step"])

    def _go_to(self, step: Any) -> None:
        if is_count(step):
            self.step = step

    def stopping(self) -> None:
        super().stopping()
        self.state = "stopping"

    def draw(self) -> None:
        columns = shutil.get_terminal_size().columns
        if self.wanted and self.at_begin and (line := self.line(columns)) != self.drawn:
            self._replace(line, columns)

    def clear(self) -> None:
        if self.drawn:
            with suppress(OSError):  # the terminal is gone
                self._replace("", shutil.get_terminal_size().columns)

    def _replace(self, line: str, columns: int) -> None:
        """Draw over the line before, which has several rows if the terminal was made narrower."""
        rows = (len(self.drawn) - 1) // columns if self.drawn else 0
        sys.stdout.write("\r\x1b[K\x1b[A" * rows + f"\r{line}\x1b[K")
        sys.stdout.flush()
        self.drawn = line

    def line(self, columns: int) -> str:
        """What is drawn."""
        steps, room = self.training.get("steps"), columns - FREE
        steps = steps if is_count(steps) and steps else None
        least = columns // 8 if columns >= NARROW else 4
        text = "  ".join(fitting(self._parts(steps), room - (least + 2 if steps else 0)))
        if not steps:
            return text[:room]
        length = max(0, min(LONGEST_BAR, room - 2 - len(text)))
        done = min(length, length * self.step // steps)
        full, rest = ("━", "─") if _can_say("━─") else ("#", "-")
        return f"{full * done}{rest * (length - done)}  {text}"[:room]

    def _parts(self, steps: int | None) -> list[tuple[int, list[str]]]:
        """What there is to say from left to right: how much it matters (0 most), and its texts from short to long."""
        now, of = epoch(self.training, self.step), epoch(self.training, steps)
        parts = [
            (0, [f"{self.step}/{steps}" if steps else f"step {self.step}" if self.step else ""]),
            (4, [f"epoch {now}", f"epoch {now}/{of}"] if now and of else [f"epoch {now}"] if now else []),
            (2, _forms("train", self.train)), (3, _forms("eval", self.evaluation)),
            (5, [self.speed]), (1, [self._time(steps)]),
        ]  # fmt: skip
        return [(weight, [text for text in forms if text]) for weight, forms in parts if any(forms)]

    def _time(self, steps: int | None) -> str:
        """How long it will take; while nothing is trained, what goes on instead."""
        if self.state:
            return self.state
        speed = pace(self.lately)
        if not steps or not speed:
            return ""
        passed = time.time() - self.lately[-1]["time"]
        return f"{duration(max(0.0, (steps - self.lately[-1]['step']) / speed - passed))} left"


def _forms(what: str, values: list[str]) -> list[str]:
    """Values in words, from short to long: the first one, where that is the loss without its name, then all."""
    if not values:
        return []
    return [f"{what} {values[0].removeprefix('loss ')}", f"{what} {values[0]}", f"{what} {'  '.join(values)}"]


def fitting(parts: list[tuple[int, list[str]]], room: int) -> list[str]:
    """Of the parts those that fit together into so many columns, with two between them; as long as they can be."""
    chosen: dict[int, str] = {}
    ranked = sorted((weight, place) for place, (weight, _) in enumerate(parts))
    for longest in (False, True):
        for _, place in ranked:
            forms = parts[place][1]
            for text in forms if longest else forms[:1]:
                others = sum(len(other) + 2 for at, other in chosen.items() if at != place)
                if others + len(text) <= room and (not longest or place in chosen):
                    chosen[place] = text
    return [chosen[place] for place in sorted(chosen)]


def _can_say(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
