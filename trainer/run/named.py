"""How a user names a run: by its path, by `latest`, or by the start of its name if no other run starts the same way."""

import glob
from pathlib import Path

from trainer.errors import JobError, did_you_mean
from trainer.run.folder import JOB, RunFolder

RUNS = Path("runs")
"""Where a name without a folder is looked for."""
LATEST = "latest"
SHOWN = 5
"""Candidates that an error names."""


def find_run(given: str | RunFolder) -> RunFolder:
    """The run that is meant; a RunFolder is taken as it is. Raises JobError: there is none, or there are several."""
    if isinstance(given, RunFolder):
        return RunFolder.open(given.path)
    path = find_path(given)
    if path is not None and RunFolder(path).sweep.is_file():
        raise JobError("RUN", given, "is a sweep", f"`muster list {given}` shows its runs")
    if path is not None:
        return RunFolder.open(path)
    names = [run.name for run in RunFolder.list_all(_root(given))]
    otherwise = "`muster list` shows the runs of a folder"
    raise JobError("RUN", given, "is not a run folder", did_you_mean(Path(given).name, names, otherwise))


def find_path(given: str, sweeps: bool = False) -> Path | None:
    """What is meant: a path that exists, else a run, with `sweeps` a sweep instead, by its name; None: nothing.

    Raises JobError: several match.
    """
    path, root = Path(given), _root(given)
    is_name = path.parent == Path() and path.name  # and not `.`; a folder of code here may be called as the job is
    if path.exists() and (not is_name or _is_run(path)):
        return path
    if (root / path.name).is_dir():
        return root / path.name
    named = f"{glob.escape(path.name)}*" if path.name != LATEST else "*"
    if sweeps:
        found = sorted((each.parent for each in root.glob(f"{named}/sweep.json")), key=lambda p: p.stat().st_mtime)
    else:
        found = [run.path for run in RunFolder.list_all(root, named)]
    if path.name == LATEST:
        return found[-1] if found else None
    if len(found) > 1:
        kind = "sweeps" if sweeps else "runs"
        names = ", ".join(each.name for each in found[-SHOWN:])
        which = f"the newest of {len(found)} are" if len(found) > SHOWN else "they are"
        remedy = f"Give more of the name, or `{root / LATEST if root != RUNS else LATEST}`"
        raise JobError("RUN", given, f"several {kind} start with it; {which} {names}", remedy)
    return found[0] if found else None


def find_any(given: str) -> Path | None:
    """What is meant, be it a run or a sweep; `latest` is a run. Raises JobError: several match."""
    run = find_path(given)
    sweep = find_path(given, sweeps=True)
    if Path(given).name != LATEST and run is not None and sweep is not None and run != sweep:
        problem = f"the run {run.name} and the sweep {sweep.name} start with it"
        raise JobError("RUN", given, problem, "Give more of the name")
    return run or sweep


def _is_run(path: Path) -> bool:
    """Whether it is a run, by its folder or its job file, or a sweep."""
    run = RunFolder(path)
    return run.exists() or run.sweep.is_file() or (path.name == JOB and path.is_file())


def _root(given: str) -> Path:
    """The folder of runs that a name is looked for in."""
    parent = Path(given).parent
    return RUNS if parent == Path() else parent
