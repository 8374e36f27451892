"""What `muster render` prints before a platform's own request: shell lines that make the run folder."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from trainer.run.folder import RunFolder

if TYPE_CHECKING:  # the verbs that only read start faster without it
    from omegaconf import DictConfig


def run_folder_lines(run: RunFolder, config: DictConfig, has_code: bool) -> list[str]:
    """The lines; none where the folder exists. `has_code`: whether the ranks find the user's code in the folder."""
    from trainer.config.load import to_text

    if run.source.exists():
        return []
    code = f"mkdir -p {shlex.quote(str(run.code))}  # copy modules of your own here"
    return [
        f"mkdir -p {shlex.quote(str(run.logs))}",
        f"touch {shlex.quote(str(run.events))}  # marks it as a run's folder, so that nobody makes another",
        *([code] if has_code else []),
        f"cat >{shlex.quote(str(run.job))} <<'END_OF_JOB'",
        *to_text(config).splitlines(),
        "END_OF_JOB",
    ]
