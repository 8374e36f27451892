"""One rank of a task: from its environment to the end of the training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from trainer.config.job import Job
from trainer.config.user_code import add_import_paths
from trainer.data.rng import DATA, derive_seed, seed_generators
from trainer.errors import DONE
from trainer.parallel.base import Parallel
from trainer.parallel.modes import make_parallel
from trainer.parallel.step import Step
from trainer.parallel.units import find_units, recompute_in_backward
from trainer.reporting.heartbeat import Pulse
from trainer.reporting.rank_report import Report
from trainer.run.attempts import check_current
from trainer.run.folder import RunFolder
from trainer.run.summary import plain_table
from trainer.signals import FLAG
from trainer.task import Task, make_task
from trainer.training.determinism import choose_kernels
from trainer.training.first_rank import build_in_turn
from trainer.training.loop import Trainer
from trainer.training.optimizer import autocast
from trainer.training.user_model import take_model, weights_beside
from trainer.wiring.devices import use_cuda
from trainer.wiring.rank import RankWiring, rank_wiring


def train(
    job: Job, run: Path | None, job_file: Path | None, on_failure: Callable[[BaseException], None] = lambda error: None
) -> int:
    """Train `job` in the run folder `run` as the rank that the environment says; return the exit code.

    Without a run folder rank 0 chooses one, the same again when its launcher restarts the ranks. `on_failure` is called
    with an exception before this process closes any connection, so that it is reported before its peers fail. After an
    exception the process must end at once: the process group is still open, because NCCL closes it only together with
    the other ranks, and they wait for this one. Raises Stopped: on request, with a checkpoint; JobError: a wrong job.
    """
    FLAG.install()
    wiring = rank_wiring()
    pulse = Pulse(wiring.local_rank)
    pulse.beat(0, "starting")
    if use_cuda(job):
        choose_kernels(job.train.deterministic, job.train.compile)
    add_import_paths(job_file, job.python_path)
    parallel = make_parallel(job, wiring, supervised=pulse.heartbeat is not None)
    if run is None:
        run = Path(parallel.share(str(choose_run(job, wiring))))
    run.mkdir(parents=True, exist_ok=True)
    folder = RunFolder(run)
    check_current(folder, wiring.attempt)
    report = Report(job, folder, wiring.attempt, parallel, pulse)
    try:
        task, (model, notes), *data = build_in_turn(
            parallel, pulse, lambda: construct(job), lambda task: build(job, parallel, task)
        )
        FLAG.install()  # once more: the user's code, or a library of its, may have taken the signals
        for note in notes:
            report.note(note)
        parallel.wrap(Step(model, task, autocast(job.train.precision, parallel.device), job.train.compile))
        trainer = Trainer(job, task, parallel, report, parallel.step.model, *data)
        metrics = trainer.fit(on_failure)
        report.finish(metrics)
        report.say("\n" + plain_table(folder))
        pulse.beat(trainer.position.step, "finishing")
        parallel.close()
        trainer.stops.close()
    except BaseException as error:
        on_failure(error)
        raise
    finally:
        report.close()
    return DONE


def construct(job: Job) -> Task:
    """The user's task; a random split in its constructor is the same on every rank and each time."""
    assert job.task
    seed_generators(derive_seed(job.seed, 0, 0, DATA))
    return make_task(job.task, job.task_args)


def build(job: Job, parallel: Parallel, task: Task) -> tuple[Task, tuple[nn.Module, list[str]], Any, Any]:
    """What the user's task makes: the model, on its device, with notes about it, and both datasets."""
    seed = derive_seed(job.seed, 0, 0)  # the same initial weights on every rank
    built, home = parallel.build(task, lambda: seed_generators(seed, parallel.devices))
    model, notes = take_model(built, job, home)
    if job.train.checkpoint_activations:
        recompute_in_backward(find_units(model, task.shard_modules(model), job.fsdp.min_params), job)
    notes += weights_beside(task, model)
    seed_generators(derive_seed(job.seed, 0, 0, DATA))
    train_data = task.train_dataset()
    seed_generators(derive_seed(job.seed, 0, 0, DATA))  # the parts of a split that both make anew fit together
    return task, (model, notes), train_data, task.eval_dataset()


def choose_run(job: Job, wiring: RankWiring) -> Path:
    """A run folder that is the same for all restarts under one launcher process."""
    return Path(job.runs).resolve() / f"{job.name}-{wiring.launch}"
