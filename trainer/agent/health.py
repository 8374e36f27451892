"""Whether the agent of this machine or container is well: what an image's HEALTHCHECK asks."""

from __future__ import annotations

import time

from trainer.agent.scratch_folder import agent_folders
from trainer.reporting.heartbeat import HEARTBEAT, SLOT, Heartbeat

FRESH_S = 600.0
"""A rank may be silent this long while it starts or compiles; the agent itself knows the job's tighter limits."""


def check_health() -> int:
    """Exit code 0 when every rank of every agent here gave a sign of life lately, 1 otherwise."""
    found = [folder / HEARTBEAT for folder, alive in agent_folders() if alive]
    for path in found:
        ranks = path.stat().st_size // SLOT.size if path.exists() else 0
        heartbeat = Heartbeat(path, ranks) if ranks else None
        for local_rank in range(ranks):
            assert heartbeat is not None
            beat = heartbeat.read(local_rank)
            if beat.time and time.monotonic() - beat.time > FRESH_S:
                print(f"rank {local_rank}: no heartbeat for {time.monotonic() - beat.time:.0f} s, step {beat.step}")
                return 1
    print(f"{len(found)} agent(s) well" if found else "no agent runs here")
    return 0 if found else 1
