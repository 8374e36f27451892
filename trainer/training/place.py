"""Where a session finds itself: its job, its run folder and its ranks, under an agent, another launcher, or neither."""

import copy
import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from trainer.config.given import JOBS
from trainer.config.job import Job
from trainer.config.load import merge_sources, name_of, read_sections, to_job, to_text
from trainer.parallel.base import Parallel
from trainer.parallel.modes import make_parallel
from trainer.reporting.heartbeat import Pulse
from trainer.reporting.rank_report import Report
from trainer.run import attempts
from trainer.run.folder import RunFolder
from trainer.run.ownership import forbid_group_writes
from trainer.training.rank import choose_run
from trainer.wiring.rank import RankWiring, rank_wiring
from trainer.wiring.variables import LOCAL_WORLD_SIZE, SESSION, read_int, read_path


@dataclass(frozen=True)
class Place:
    """What a session stands on."""

    job: Job
    wiring: RankWiring
    parallel: Parallel
    pulse: Pulse
    report: Report


def find_place(run: str | Path | None, settings: Mapping[str, Any]) -> Place:
    """Join the other ranks. `run` and `settings` are those of the session. Raises JobError: a setting is wrong."""
    forbid_group_writes()
    wiring = rank_wiring()
    pulse = Pulse(wiring.local_rank)
    pulse.beat(0, "starting")
    given = read_path(SESSION)
    config = _merge(given, settings) if settings or not JOBS else None
    job = copy.deepcopy(JOBS[0]) if config is None else to_job(config)
    local = read_int(os.environ, LOCAL_WORLD_SIZE, "1")
    job.nodes, job.devices_per_node = max(1, wiring.world_size // local), local
    job.parallel = job.parallel if wiring.world_size > 1 else "single"
    parallel = make_parallel(job, wiring, pulse.heartbeat is not None)
    if given is not None and (folder := RunFolder(given.parent)).exists():
        attempts.check_current(folder, wiring.attempt)
    else:
        config = config or _merge(given, settings)
        path, attempt = parallel.share(_begin(run, job, wiring, config) if parallel.rank == 0 else None)
        folder, wiring = RunFolder(Path(path)), dataclasses.replace(wiring, attempt=attempt)
    return Place(job, wiring, parallel, pulse, Report(job, folder, wiring.attempt, parallel, pulse))


def _merge(job_file: Path | None, settings: Mapping[str, Any]) -> DictConfig:
    """The job's keys, over them those that the session was given."""
    own = {"muster.Session(...)": dict(settings)}
    if JOBS:
        return merge_sources(own, JOBS[0])
    script = os.path.abspath(sys.argv[0]) if sys.argv and sys.argv[0] else "session"
    sources = {str(job_file): read_sections(job_file)} if job_file is not None else {}
    config = merge_sources({"": {"script": script}, **sources, **own})
    config.name = config.name or name_of(Path(script).stem)
    return config


def _begin(run: str | Path | None, job: Job, wiring: RankWiring, config: DictConfig) -> tuple[str, int]:
    """Rank 0 without an agent: the run folder, made if need be, and the number of this attempt in it."""
    if run is None and not wiring.launch:
        folder = RunFolder.create(job.runs, job.name, to_text(config))
    else:
        folder = RunFolder(Path(run).resolve() if run is not None else choose_run(job, wiring))
        folder.make()
        if not folder.job.exists():
            folder.job.write_text(to_text(config))
    attempt = attempts.newest(folder) + 1
    attempts.claim(folder, attempt)
    return str(folder), attempt
