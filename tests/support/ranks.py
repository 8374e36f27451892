"""Run the ranks of a job as processes of one fork server that has imported torch already: 0.1 s for a start.

No agent and no launcher: what is under test is the rank. A run folder can be trained again, as a later attempt.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType
from typing import Any

import unpickling
from faults import Fault, arm

from trainer.config.job import Job
from trainer.config.load import merge_job, to_job
from trainer.errors import FAILED, WRONG_JOB, JobError
from trainer.records import read_lines
from trainer.run.attempts import claim, newest
from trainer.run.folder import RunFolder

HERE = Path(__file__).parent
PRELOAD = ["torch", "torch._dynamo", "trainer.training.rank", "digit_tasks", "data_tasks"]
LINGER_S = 15.0
"""From the first rank that failed until the others are killed."""


def make_job(*overrides: str, file: Path = HERE / "small.yaml") -> Job:
    """The tier's small job with `key=value` changes, checked as a user's."""
    return to_job(merge_job(file, overrides))


@dataclass(frozen=True)
class Run:
    """A run folder and what the ranks of its last attempt came to."""

    folder: Path
    codes: list[int]
    """Exit code of each rank; minus the number of the signal that ended it."""
    attempt: int

    @property
    def code(self) -> int:
        """The exit code that all ranks share."""
        assert len(set(self.codes)) == 1, f"exit codes {self.codes}\n{self.output()}"
        return self.codes[0]

    def output(self, rank: int | None = None) -> str:
        """What the ranks of this attempt, or one of them, printed."""
        ranks = range(len(self.codes)) if rank is None else [rank]
        return "\n".join((self.folder / f"rank{rank}-{self.attempt}.log").read_text() for rank in ranks)


def train(
    folder: Path, job: Job, fault: Fault | None = None, timeout_s: float = 240, attempt: int | None = None,
    **variables: str,
) -> Run:  # fmt: skip
    """Train `job` in `folder` as its next attempt; `fault` happens to this attempt only."""
    folder.mkdir(parents=True, exist_ok=True)
    if attempt is None:
        attempt = newest(RunFolder(folder)) + 1
        claim(RunFolder(folder), attempt)
    shared = {
        "WORLD_SIZE": str(job.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "MUSTER_ATTEMPT": str(attempt), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # or each rank starts compiler processes that import torch
        **variables,
    }  # fmt: skip
    processes = []
    for rank in range(job.world_size):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        mine = fault if fault is not None and fault.rank == rank else None
        processes.append(start(_train_rank, job, folder, environment, mine))
    return Run(folder, wait(processes, timeout_s), attempt)


def complete(folder: Path, job: Job) -> Run:
    """Train to the end."""
    run = train(folder, job)
    assert run.codes == [0] * job.world_size, f"exit codes {run.codes}\n{run.output()}"
    return run


def start(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a module-level function in a new process of the fork server."""
    with _server() as context:
        process = context.Process(target=function, args=arguments, daemon=False)
        process.start()
    return process


def wait(processes: list[Any], timeout_s: float) -> list[int]:
    """Exit codes, once all have ended.

    Soon after a first failure, or when time is up, the rest is killed and says in its log where it stood.
    """
    deadline = time.monotonic() + timeout_s
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode not in (None, 0) for process in processes):
            deadline = min(deadline, time.monotonic() + LINGER_S)
        if time.monotonic() > deadline:
            late = [process for process in processes if process.exitcode is None]
            for process in late:
                os.kill(process.pid, signal.SIGABRT)  # faulthandler writes where it stands into its log
            for process in late:
                process.join(1)
                process.kill()
        for process in processes:
            process.join(0.01)
    return [process.exitcode for process in processes]


def free_port() -> int:
    """A port that nobody listens on, below those that the kernel gives to connections and agents take by themselves."""
    while True:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def losses(folder: Path) -> list[float]:
    """The loss of each step; what a later attempt did again counts."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]
    by_step = {line["step"]: line["loss"] for line in lines}
    assert sorted(by_step) == list(range(1, len(by_step) + 1))
    return [by_step[step] for step in sorted(by_step)]


def evaluations(folder: Path) -> list[dict[str, float]]:
    """The metrics of each evaluation, without what tells attempts apart."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "evaluation"]
    return [{key: value for key, value in line.items() if key not in ("time", "attempt", "kind")} for line in lines]


def events(folder: Path, name: str) -> list[dict[str, Any]]:
    """The events of one kind."""
    return [event for event in RunFolder(folder).read_events() if event["event"] == name]


def order_of_samples(folder: Path) -> dict[int, list[int]]:
    """The samples of each epoch in the order in which the run, all its attempts together, learned from them."""
    epochs: dict[int, list[int]] = {}
    for (epoch, _), samples in samples_of_steps(folder).items():
        epochs.setdefault(epoch, []).extend(samples)
    return epochs


def samples_of_steps(folder: Path) -> dict[tuple[int, int], list[int]]:
    """The samples of each step, rank after rank, by epoch and step, in order.

    What an attempt did after the checkpoint that the next one resumed from never happened to the weights.
    """
    lines = [line for path in sorted(folder.glob("samples-rank*.jsonl")) for line in read_lines(path)]
    began = {event["attempt"]: event["step"] for event in events(folder, "training")}
    steps: dict[tuple[int, int], list[int]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):  # stable: in a step, rank after rank
        if all(line["step"] < step for attempt, step in began.items() if attempt > line["attempt"]):
            steps.setdefault((line["epoch"], line["step"]), []).extend(line["samples"])
    return steps


def _train_rank(job: Job, folder: Path, environment: dict[str, str], fault: Fault | None) -> None:
    os.environ.update(environment)
    with (folder / f"rank{environment['RANK']}-{environment['MUSTER_ATTEMPT']}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    import torch

    import trainer.training.rank

    torch.set_num_threads(1)
    if not (job.data.workers or job.train.compile):  # loaders and compilers talk to processes of their own
        unpickling.forbid()
    if fault is not None:
        arm(fault, folder)
    try:
        code = trainer.training.rank.train(job, folder, None)
    except JobError as error:
        print(f"JobError: {error}", flush=True)
        code = WRONG_JOB
    except Exception:
        traceback.print_exc()
        code = FAILED
    sys.exit(code)


@contextmanager
def _server() -> Iterator[ForkServerContext]:
    """The fork server; it and its children shall not import pytest's own command again, nor this process change."""
    main, environment = sys.modules["__main__"], dict(os.environ)
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ["OMP_NUM_THREADS"] = "1"  # a process that forks must not have OpenMP's threads
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, sys.path)])  # or it could not preload
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    try:
        yield context
    finally:
        sys.modules["__main__"] = main
        os.environ.clear()
        os.environ.update(environment)
