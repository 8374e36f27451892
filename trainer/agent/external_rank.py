"""A rank that another launcher started (torchrun, accelerate, PyTorchJob, srun per GPU): no agent of ours."""

import os
from pathlib import Path

from trainer.agent.rank_process import end_with, print_error
from trainer.agent.script import run_script
from trainer.config.job import RANKED
from trainer.config.load import merge_job, to_job, to_text
from trainer.errors import JobError
from trainer.run.folder import RunFolder, run_of
from trainer.wiring.rank import rank_wiring
from trainer.wiring.variables import SESSION


def run_external_rank(path: Path, overrides: list[str]) -> int:
    """Train, or run the script, as the rank that the environment says; the launcher supervises.

    A task's rank does not return. Raises JobError: the launcher's ranks are not those that the job asks for.
    """
    config = merge_job(path, overrides)
    job, wiring = to_job(config), rank_wiring()
    if job.script:
        os.environ[SESSION] = str(path)
        return run_script(job, path)
    if job.parallel not in RANKED and wiring.world_size > 1:
        problem = f"uses one process, but the launcher started {wiring.world_size} ranks"
        raise JobError("parallel", job.parallel, problem, "Use parallel=ddp, or start one process")
    if job.parallel in RANKED and job.world_size != wiring.world_size:
        problem = f"with nodes={job.nodes} makes {job.world_size} ranks, but the launcher started {wiring.world_size}"
        raise JobError("devices_per_node", job.devices_per_node, problem, "Make the two agree")
    from trainer.training.rank import choose_run, train

    run = run_of(path)  # None: the ranks choose one when they have met
    if wiring.rank == 0:  # so that `muster status` knows it
        chosen = run or RunFolder(choose_run(job, wiring))
        chosen.make()
        if not chosen.job.exists():
            chosen.job.write_text(to_text(config))
    return end_with(lambda: train(job, run.path if run else None, path), print_error)
