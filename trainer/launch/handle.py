"""What names a submission on its platform. It is read from a file, and becomes words of commands: so it is checked."""

import re
from typing import Any

from trainer.errors import JobError
from trainer.launch.platform import platform_of
from trainer.records import read_json
from trainer.run.folder import RunFolder


def read_handle(run: RunFolder) -> dict[str, Any] | None:
    """The handle of a run; None: nobody submitted it. Raises JobError: it holds what its platform never gave."""
    handle = read_json(run.handle)
    if handle is None:
        return None
    platform = platform_of(handle)
    for key, pattern in platform.ids.items():
        if not re.fullmatch(pattern, str(handle.get(key))):
            problem = f"{run.handle} says {key}={handle.get(key)!r}, which {platform.name} never gave"
            remedy = "Somebody changed it: stop the job, if it runs, with its platform's own tools, and remove the file"
            raise JobError("RUN", str(run), problem, remedy)
    return handle
