"""`muster plot`: the curves of runs in one picture, drawn by matplotlib; without it, how TensorBoard shows the same."""

import importlib
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.errors import DONE, FAILED, JobError
from trainer.launch.listing import differences, read_job
from trainer.records import is_count, parse_lines, read_json
from trainer.run.folder import RunFolder
from trainer.run.named import find_any, find_run
from trainer.run.progress import measured
from trainer.run.sweep import read_sweep

Curves = dict[tuple[str, str], "Curve"]
"""By the name of a value, and whether it was measured in training or in an evaluation."""
NOT_DRAWN = ("lr", "samples_per_s")
MOST = 2000
"""Points of a curve that are kept at least, where there are as many; more would not be seen."""
ROW = 3
"""Pictures side by side."""
PLOT = Path("plot.png")
STYLES: dict[str, dict[str, Any]] = {
    "train": {"linewidth": 0.8, "alpha": 0.7},
    "evaluation": {"marker": "o", "markersize": 3, "linewidth": 0.8, "linestyle": "--"},
}


class Curve:
    """Steps and values: of a long run each so-manieth."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.seen, self.every = 0, 1

    def add(self, step: int, value: float) -> None:
        self.seen += 1
        if self.seen % self.every == 0:
            self.points.append((step, value))
        if len(self.points) > 2 * MOST:
            self.points, self.every = self.points[1::2], 2 * self.every

    def cut(self, step: int) -> None:
        """Forget what comes from a step on: it was done again."""
        while self.points and self.points[-1][0] >= step:
            self.points.pop()


def read_curves(path: Path) -> Curves:
    """What a run measured, each step once: a later attempt counts from where it went on. Raises JobError: nothing."""
    curves: Curves = {}
    newest, last = -1, -1
    try:
        with path.open("rb") as file:
            for line in (line for text in file for line in parse_lines([text])):
                step, attempt = line.get("step"), line.get("attempt")
                attempt = attempt if is_count(attempt) else newest  # older versions name none
                if not is_count(step) or attempt < newest:
                    continue
                if attempt > newest or step < last:
                    for curve in curves.values():
                        curve.cut(step)
                newest, last = attempt, step
                for name, value in _values(line).items():
                    curves.setdefault((name, str(line.get("kind"))), Curve()).add(step, value)
    except FileNotFoundError:
        pass
    curves = {name: curve for name, curve in curves.items() if curve.points}
    if not curves:
        remedy = "Wait for the first, or bring them here: `muster pull`"
        raise JobError("RUN", str(path.parent), "has no metrics here", remedy)
    return curves


def _values(line: dict[str, Any]) -> dict[str, float]:
    found = measured(line)
    if "mean_loss" in found:  # of a task: the mean over the steps since the line before
        found["loss"] = found.pop("mean_loss")
    return {name: value for name, value in found.items() if name not in NOT_DRAWN}


def plot(given: Sequence[str], output: Path | None) -> int:
    """Draw runs, and say where; return the exit code. Without matplotlib, print the command that starts TensorBoard."""
    runs = list(dict.fromkeys(run for name in given for run in runs_of(name)))
    names = labels(runs)
    try:
        figure = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        print(
            'matplotlib is not installed: pip install "muster-train[plot]". TensorBoard has the same:', file=sys.stderr
        )
        print(tensorboard(runs, names))
        return FAILED if output else DONE
    path = output or PLOT
    try:
        draw(figure, runs, names).savefig(path)
    except (OSError, ValueError) as error:
        if isinstance(error, JobError):
            raise
        raise JobError("--output", str(path), f"cannot be written: {error}", "Give a file, such as plot.png") from None
    print(path)
    return DONE


def runs_of(given: str) -> list[RunFolder]:
    """The run that is meant, or those of a sweep. Raises JobError: there is none."""
    path = find_any(given)
    sweep = read_sweep(path) if path else None
    return sweep.runs if sweep else [find_run(given)]


def labels(runs: Sequence[RunFolder]) -> list[str]:
    """What tells the runs apart: the keys in which they differ, else their names."""
    jobs, statuses = [read_job(run) for run in runs], [read_json(run.handle) or {} for run in runs]
    texts = differences(jobs, statuses)
    return [text if text and texts.count(text) == 1 else run.name for text, run in zip(texts, runs, strict=True)]


def tensorboard(runs: Sequence[RunFolder], names: Sequence[str]) -> str:
    """The command that shows exactly these runs."""
    folders = [str(run.tensorboard) for run in runs]
    if len(folders) == 1:
        return shlex.join(["tensorboard", "--logdir", *folders])
    known = [run.name if re.search("[,:]", name) else name for run, name in zip(runs, names, strict=True)]
    spec = ",".join(f"{name}:{folder}" for name, folder in zip(known, folders, strict=True))
    return shlex.join(["tensorboard", f"--logdir_spec={spec}"])


def draw(figure: Any, runs: Sequence[RunFolder], names: Sequence[str]) -> Any:
    """A picture for each value, with all runs in it: thin lines of the training, and dots of the evaluations."""
    curves = [read_curves(run.metrics) for run in runs]
    wanted = list(dict.fromkeys(name for each in curves for name, _ in each))
    rows, across = math.ceil(len(wanted) / ROW), min(len(wanted), ROW)
    drawn = figure(figsize=(1 + 4.5 * across, 1.2 + 3.4 * rows), layout="constrained", dpi=120)
    places = list(drawn.subplots(rows, across, squeeze=False).flat)
    shown: dict[int, Any] = {}
    for axes, name in zip(places, wanted, strict=False):
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.3)
        for place, each in enumerate(curves):
            for kind, style in STYLES.items():
                if (name, kind) in each:
                    steps, values = zip(*each[name, kind].points, strict=True)
                    [shown[place]] = axes.plot(steps, values, color=f"C{place}", **style)
    for axes in places[len(wanted) :]:
        axes.set_visible(False)
    drawn.suptitle("lines: training, dots: evaluation", fontsize="small")
    drawn.legend(list(shown.values()), names, loc="outside lower center", ncols=min(len(runs), 3), fontsize="small")
    return drawn
