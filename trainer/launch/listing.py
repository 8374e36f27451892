"""Runs side by side: `muster list` of a folder, in a terminal as a table, and of a sweep, which says what was best."""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import JobError
from trainer.launch import control
from trainer.records import for_programs, is_number
from trainer.run.descriptions import duration, number
from trainer.run.folder import RunFolder
from trainer.run.named import RUNS, find_path
from trainer.run.sweep import Sweep, read_sweep

SAME = ("name", "runs")
"""Keys of a job that say nothing of what it trains."""
FREE = ("task_args.", "train.optimizer_args.")
SHOWN_METRICS = 3
GAP = "  "
LEAST_LAST, LEAST_NAME = 10, 16
"""Columns that the last column and the name of a run keep, as long as others can be cut."""


def list_runs(given: str, as_json: bool) -> str:
    """What `muster list` prints: of a sweep its results, else the runs of a folder."""
    path = Path(given) if Path(given).is_dir() else find_path(given, sweeps=True) or Path(given)
    if not path.is_dir() and path != RUNS:
        raise JobError("RUNS", given, "is neither a folder nor a sweep", "`muster list` alone shows those in runs")
    sweep = read_sweep(path)
    if sweep is not None:
        found = compare_sweep(sweep)
        return for_programs(found) if as_json else sweep_text(found)
    statuses = control.list_all(path)
    if as_json:
        return for_programs(statuses)
    return run_table(statuses, path) if sys.stdout.isatty() and statuses else control.list_text(statuses)


def run_table(statuses: Sequence[dict[str, Any]], folder: Path) -> str:
    """A row for each run: what it is called, how it is, and the keys in which it differs from others of its job."""
    jobs = [read_job(RunFolder(Path(status["run"]))) for status in statuses]
    main = [main_metric(job, status.get("metrics") or {}) for job, status in zip(jobs, statuses, strict=True)]
    names = set(filter(None, main))
    differ = differences(jobs, statuses)
    rows = [["run", "state", "age", "step", next(iter(names)) if len(names) == 1 else "metric", "differs in"]]
    for status, metric, keys in zip(statuses, main, differ, strict=True):
        path = Path(status["run"])
        value = number(status["metrics"][metric]) if metric else "-"
        rows.append([
            path.name if folder == RUNS else str(folder / path.name), status["state"], _age(status), _steps(status),
            value if len(names) == 1 or not metric else f"{metric} {value}", keys,
        ])  # fmt: skip
    return align(rows, shutil.get_terminal_size().columns, right=(2, 3, 4))


def compare_sweep(sweep: Sweep) -> dict[str, Any]:
    """The status of each run with its value, and which is best: by the job's `checkpoint.best`, else by the loss."""
    statuses = [control.status_or_problem(run) for run in sweep.runs]
    job = next((job for run in sweep.runs if (job := read_job(run))), {})
    metric, mode = best_by(job)
    values = [status.get("metrics", {}).get(metric) for status in statuses]
    known = [value for value in values if is_number(value) and value == value]
    best = (min if mode == "min" else max)(known, default=None)
    runs = [
        {"value": value, "best": best is not None and result == best, **status}
        for value, result, status in zip(sweep.values, values, statuses, strict=True)
    ]
    return {"sweep": str(sweep.folder), "key": sweep.key, "metric": metric, "mode": mode, "runs": runs}


def sweep_text(found: dict[str, Any]) -> str:
    """A row for each run of a sweep, with its metrics; the best is marked."""
    metrics = list(
        dict.fromkeys([found["metric"], *(name for run in found["runs"] for name in run.get("metrics", {}))])
    )
    shown = [name for name in metrics if any(name in run.get("metrics", {}) for run in found["runs"])][:SHOWN_METRICS]
    rows = [[found["key"], "state", "step", *shown, "", "run"]]
    for run in found["runs"]:
        values = [number(value) if is_number(value := run.get("metrics", {}).get(name)) else "-" for name in shown]
        best = "best" if run["best"] else ""
        rows.append([str(run["value"]), run["state"], _steps(run), *values, best, Path(run["run"]).name])
    table = align(rows, shutil.get_terminal_size().columns, right=range(2, 3 + len(shown)))
    by = f"best by {found['metric']}: the {'smallest' if found['mode'] == 'min' else 'largest'}"
    return f"{table}\n{by}" if any(run["best"] for run in found["runs"]) else table


def best_by(job: dict[str, Any]) -> tuple[str, str]:
    """The metric by which runs of a job are better or worse, and whether a smaller or a larger value is: min, max."""
    best = job.get("checkpoint.best")
    return (best, job.get("checkpoint.best_mode", "max")) if best else ("loss", "min")


def main_metric(job: dict[str, Any], metrics: dict[str, Any]) -> str:
    """The metric that tells most of a run: that of its best checkpoint, else the first that is not the loss."""
    best = job.get("checkpoint.best")
    others = [name for name in metrics if name != "loss"]
    return best if best in metrics else next(iter([*others, *metrics]), "")


def read_job(run: RunFolder) -> dict[str, Any]:
    """The keys of a run's job, such as `train.lr`, as they are written; empty when it cannot be read."""
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return dict(_flat(yaml.load(run.job.read_text(), loader)))
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict) or not (value or not prefix):
        return [(prefix.removesuffix("."), value)]
    return [pair for key, item in value.items() for pair in _flat(item, f"{prefix}{key}.")]


def differences(jobs: Sequence[dict[str, Any]], statuses: Sequence[dict[str, Any]]) -> list[str]:
    """For each run, the keys in which runs of jobs with its name differ, those first that have most values."""
    jobs = [job | {"platform": status.get("platform")} for job, status in zip(jobs, statuses, strict=True)]
    differing = {}
    for name in {job.get("name") for job in jobs}:
        members = [job for job in jobs if job.get("name") == name]
        keys = dict.fromkeys(key for job in members for key in job if key not in SAME)
        # A key that a job lacks was unknown to its version, unless it is one of those that any name may follow.
        keys = {key: None for key in keys if key.startswith(FREE) or all(key in job for job in members)}
        values = {key: len({repr(job.get(key)) for job in members}) for key in keys}
        differing[name] = sorted((key for key in keys if values[key] > 1), key=values.__getitem__, reverse=True)
    keys_of = [differing[job.get("name")] for job in jobs]
    return [
        GAP.join(_assignment(key, job.get(key), keys) for key in keys) for job, keys in zip(jobs, keys_of, strict=True)
    ]


def _assignment(key: str, value: Any, keys: list[str]) -> str:
    """`train.lr=0.1` without its section, where another key is not called so."""
    last = key.rpartition(".")[2]
    unique = sum(other.rpartition(".")[2] == last for other in keys) == 1
    return f"{last if unique else key}={'null' if value is None else value}"


def _age(status: dict[str, Any]) -> str:
    since = status.get("submitted")
    return duration(max(0.0, time.time() - since)) if is_number(since) else "-"


def _steps(status: dict[str, Any]) -> str:
    step, steps = status.get("step"), status.get("steps")
    return f"{step or 0}/{steps or '?'}" if step or steps else "-"


def align(rows: Sequence[Sequence[str]], columns: int, right: Sequence[int]) -> str:
    """Rows as lines in columns that fit a terminal: where they must, the last one and the names of the runs are cut."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    names, last = rows[0].index("run"), len(widths) - 1
    excess = sum(widths) + len(GAP) * last - columns
    for index, least in ((last, LEAST_LAST), (names, LEAST_NAME), (last, 0)):
        cut = max(0, min(excess, widths[index] - least))
        widths[index] -= cut
        excess -= cut
    lines = []
    for row in rows:
        cells = []
        for index, (cell, width) in enumerate(zip(row, widths, strict=True)):
            text = _shorten(cell, width, index == names)
            cells.append(text.rjust(width) if index in right else text.ljust(width))
        lines.append(GAP.join(cells).rstrip()[:columns])
    return "\n".join(lines)


def _shorten(text: str, width: int, is_name: bool) -> str:
    """The text in so many columns: of a name, which ends in what makes it unique, the middle is left out."""
    if len(text) <= width:
        return text
    end = min(9, width // 2) if is_name else 0
    return f"{text[: max(0, width - end - 2)]}..{text[len(text) - end :] if end else ''}"[:width]
