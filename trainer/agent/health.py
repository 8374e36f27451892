"""Whether the agents of this machine or container are well: what an image's HEALTHCHECK asks."""

import time
from pathlib import Path

from trainer.agent.scratch_folder import agent_folders
from trainer.errors import DONE, FAILED
from trainer.reporting.heartbeat import HEARTBEAT, ROOM, Heartbeat

FRESH_S = 600.0
"""A rank may be silent this long, or as long as its job allows; the agent itself knows which limit holds now."""
LIMIT = "limit"
"""A file in an agent's own folder: the longest silence in seconds that the job allows."""


def check_health() -> int:
    """Exit code 0 when there is an agent and every rank of every agent gave a sign of life lately, else 1."""
    files = [folder / HEARTBEAT for folder, alive in agent_folders() if alive]
    problems = [problem for file in files if file.exists() for problem in _silent_ranks(file)]
    print("\n".join(problems) or (f"{len(files)} agent(s) well" if files else "no agent runs here"))
    return DONE if files and not problems else FAILED


def _silent_ranks(file: Path) -> list[str]:
    ranks, now = range(file.stat().st_size // ROOM), time.monotonic()
    limit = file.with_name(LIMIT)
    fresh_s = max(FRESH_S, float(limit.read_text()) if limit.exists() else 0.0)
    beats = map(Heartbeat(file, len(ranks)).read, ranks) if ranks else ()
    return [
        f"rank {local_rank}: no heartbeat for {now - beat.time:.0f} s, step {beat.step}"
        for local_rank, beat in enumerate(beats) if beat.time and now - beat.time > fresh_s
    ]  # fmt: skip
