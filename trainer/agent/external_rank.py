"""A rank that another launcher started (torchrun, accelerate, PyTorchJob, srun per GPU): no agent of ours."""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from pathlib import Path

from trainer.agent.rank_process import exit_code
from trainer.config.load import merge_job, to_job, to_text
from trainer.errors import DONE, STOPPED, JobError, Stopped
from trainer.run.folder import RunFolder, run_of
from trainer.signals import restore_signals
from trainer.wiring.rank import rank_wiring


def run_external_rank(path: Path, overrides: list[str]) -> int:
    """Train, or run the script, as the rank that the environment says; the launcher supervises.

    A task's rank does not return. Raises:
        JobError: the launcher's ranks are not those that the job asks for.
    """
    config = merge_job(path, overrides)
    job = to_job(config)
    wiring = rank_wiring()
    if job.script:
        restore_signals()
        sys.path.insert(0, str(Path(job.script).resolve().parent))
        sys.argv = [job.script, *map(str, job.script_args)]
        runpy.run_path(job.script, run_name="__main__")
        return DONE
    if job.parallel != "ddp":
        if wiring.world_size > 1:
            raise JobError(
                "parallel",
                job.parallel,
                f"uses one process, but the launcher started {wiring.world_size} ranks",
                "Use parallel=ddp, or start one process",
            )
    elif job.world_size != wiring.world_size:
        raise JobError(
            "devices_per_node",
            job.devices_per_node,
            f"with nodes={job.nodes} makes {job.world_size} ranks, but the launcher started {wiring.world_size}",
            "Make the two agree",
        )
    from trainer.training.rank import choose_run, train

    run = run_of(path)  # None: the ranks choose one when they have met
    if wiring.rank == 0:  # so that `muster status` knows it
        chosen = run or RunFolder(choose_run(job, wiring))
        chosen.logs.mkdir(parents=True, exist_ok=True)
        if not chosen.job.exists():
            chosen.job.write_text(to_text(config))
    try:
        code = train(job, run.path if run else None, path)
    except Stopped:
        code = STOPPED
    except BaseException as error:
        print(f"ERROR: {error}" if isinstance(error, JobError) else traceback.format_exc(), file=sys.stderr)
        code = exit_code(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # at once: of an interpreter's end with torch's threads one in some dozens aborts, and NCCL can hang
