"""The modes of one process, single and DataParallel, and the choice of a mode."""

from torch import nn

from trainer.config.job import Job
from trainer.parallel.base import Parallel
from trainer.parallel.cpu_replicas import ThreadReplicas
from trainer.parallel.step import Step
from trainer.wiring.rank import RankWiring


class DataParallel(Parallel):
    """One process that computes each batch in parts: on several GPUs, or in several threads."""

    def wrap(self, step: Step) -> None:
        super().wrap(step)
        replicas = self.job.devices_per_node
        self.module = nn.DataParallel(step, self.devices) if self.cuda else ThreadReplicas(step, replicas)


def make_parallel(job: Job, wiring: RankWiring, supervised: bool) -> Parallel:
    """Make the mode that the job asks for; `supervised`: an agent watches this rank's heartbeat."""
    if job.parallel == "ddp":
        from trainer.parallel.ddp import Distributed

        return Distributed(job, wiring, supervised)
    return DataParallel(job, wiring) if job.parallel == "dp" else Parallel(job, wiring)
