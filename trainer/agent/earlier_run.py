"""A job that a platform's own tool started has no run folder of its own: that of its name may be an earlier job's."""

from collections.abc import Iterator
from typing import Any

import yaml

from trainer.errors import JobError
from trainer.run.folder import RunFolder


def note_earlier_run(run: RunFolder, text: str) -> str:
    """What to know about the run that is in the folder already; empty when none has begun there.

    `text`: the job. Raises JobError: that run was made from a job that says something else.
    """
    if not run.job.exists():
        return ""
    before, now = (dict(_values(yaml.safe_load(each))) for each in (run.job.read_text(), text))
    for key in now:
        if key in before and before[key] != now[key]:  # newer versions may know more keys
            problem = f"the run in {run} was made with {before[key]!r}, and by hand jobs of one name are one run"
            remedy = "To train anew, give this job another name (name=...), or remove that folder"
            raise JobError(key, now[key], problem, remedy)
    anew = "to train anew, give the job another name (name=...), or remove that folder"
    if run.result.exists():
        return f"NOTE: the run in {run} is done already, so nothing is trained: {anew}"
    step = run.steps_committed()
    return f"NOTE: this goes on from step {step} of the run in {run}: {anew}" if step >= 0 else ""


def _values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of a job that is no section, such as `train.lr`, with its value."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _values(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, value
