"""One node's part of a job, from wiring to the final word: what `python -m trainer` does when it is the agent."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trainer import attempt, heartbeat
from trainer.config import Job
from trainer.errors import DONE, STOPPED, WRONG_JOB, JobError
from trainer.folder import find_run, steps_committed
from trainer.load import merge_job, save_job, to_job
from trainer.postmortem import Failure, first_failure, paragraph
from trainer.preflight import check_node, network_settings
from trainer.record import record_event, write_json
from trainer.stop import FLAG
from trainer.summary import plain_table
from trainer.symbols import working_directory_first
from trainer.wiring import Wiring, wire


def explain(path: Path, overrides: list[str]) -> int:
    """Print wiring, settings and problems of this node."""
    job = to_job(merge_job(path, overrides))
    wiring = wire(job.nodes, job.devices_per_node, job.devices)
    print(wiring.explain())
    for name, (value, reason) in network_settings(wiring).items():
        print(f"{name}={value}  ({reason})")
    problems = check_node(job, wiring)
    for problem in problems:
        print(f"{'ERROR' if problem.fatal else 'WARNING'} [{problem.kind}] {problem.text}")
    return WRONG_JOB if any(problem.fatal for problem in problems) else DONE


def run_node(path: Path, overrides: list[str]) -> int:
    """Wire, check, fork, watch and report; return the exit code."""
    FLAG.install()
    config = merge_job(path, overrides)
    with working_directory_first():
        job = to_job(config)
    wiring = wire(job.nodes, job.devices_per_node, job.devices)
    run = find_run(path, job, wiring.job_id, wiring.platform)
    run.mkdir(parents=True, exist_ok=True)
    (run / "logs").mkdir(exist_ok=True)
    if wiring.node_rank == 0 and not (run / "job.yaml").exists():
        save_job(config, run / "job.yaml")
    record_event(
        run,
        "wired",
        node=wiring.node_rank,
        master=wiring.master_addr,
        platform=wiring.platform,
        launch=wiring.launch,
        pid=os.getpid(),
    )
    settings = network_settings(wiring)
    for name, (value, why) in settings.items():
        _say(f"{name}={value}: {why}")
    code, reason = _preflight(job, wiring, run)
    if code == DONE:
        code, reason = _supervise(job, path, run, wiring, {name: value for name, (value, _) in settings.items()})
    return _final_word(code, reason, run, wiring)


def _preflight(job: Job, wiring: Wiring, run: Path) -> tuple[int, str | None]:
    problems = check_node(job, wiring)
    for problem in problems:
        _say(f"{'ERROR' if problem.fatal else 'WARNING'} [{problem.kind}] {problem.text}")
    fatal = [problem for problem in problems if problem.fatal]
    record_event(run, "preflight", node=wiring.node_rank, problems=[problem.text for problem in problems])
    if fatal:
        return WRONG_JOB, f"node {wiring.node_rank} failed its preflight [{fatal[0].kind}]: {fatal[0].text}"
    return DONE, None


def _supervise(job: Job, path: Path, run: Path, wiring: Wiring, settings: dict[str, str]) -> tuple[int, str | None]:
    from trainer.agent import NodeAgent, supervise
    from trainer.rendezvous import NodeRendezvous

    ranks = job.ranks_per_node * (wiring.nodes if wiring.platform == "local" else 1)
    threads = max(1, wiring.cpus // ranks)
    handle, name = tempfile.mkstemp(prefix="muster-heartbeat-")
    os.close(handle)
    os.environ["MUSTER_HEARTBEAT_FILE"] = name
    try:
        rounds = Rounds(job, run)
        rendezvous = NodeRendezvous(
            wiring, job.agent.rejoin_timeout_s, rounds.start, lambda: FLAG.requested is not None, _say
        )
        environment = rank_environment(job, run, wiring, threads) | settings | {heartbeat.VARIABLE: name}
        agent = NodeAgent(job, path, run, wiring, rendezvous, threads, Path(name), environment)
        code, reason = supervise(agent, _say)
        if reason is not None and wiring.nodes > 1:
            _let_others_read(rendezvous, wiring)
        if wiring.node_rank == 0 and code not in (DONE, STOPPED):
            write_json(run / "failure.json", {"reason": reason, "code": code, "failures": rounds.history})
        return code, reason
    finally:
        os.unlink(name)


def rank_environment(job: Job, run: Path, wiring: Wiring, threads: int) -> dict[str, str]:
    """What ranks get besides torchrun's variables; what the site or the user set already wins."""
    defaults = {
        # Warnings go to a file of their own rather than nowhere (NCCL user guide, NCCL_DEBUG_FILE).
        "NCCL_DEBUG": "WARN",
        "NCCL_DEBUG_FILE": str(run / "logs" / "nccl-%h-%p.log"),
        # torch's flight recorder: the last collectives of each rank, dumped when one times out (torch 2.9 names).
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE": str(run / "logs" / "flight-recorder-"),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        # Ranks share the cores of the node; more threads than cores only fight.
        "OMP_NUM_THREADS": str(threads),
        # torch 2.13 restarts read a dead attempt's addresses from a shared store; ours is fresh, this makes sure.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    values = {name: value for name, value in defaults.items() if name not in os.environ}
    if wiring.visible_devices is not None:
        values["CUDA_VISIBLE_DEVICES"] = wiring.visible_devices
    return values


class Rounds:
    """Node 0's decisions: which attempt comes next, and when restarting has no point any more."""

    def __init__(self, job: Job, run: Path) -> None:
        """Nothing failed yet."""
        self.job, self.run = job, run
        self.used = 0
        self.progress = -1
        self.history: list[dict[str, Any]] = []

    def start(self, number: int, failures: list[dict[str, Any] | None]) -> dict[str, Any]:
        """Plan a round, or end the job: `failures` has one entry per node, None where nothing failed."""
        found = first_failure([Failure(**item) for item in failures if item])
        if found is not None:
            self.history.append(found.to_json())
            step = steps_committed(self.run)
            self.used = 1 if step > self.progress else self.used + 1
            self.progress = step
            left = self.job.agent.restarts - self.used
            record_event(
                self.run,
                "failure",
                **{k: v for k, v in found.to_json().items() if k != "time"},
                step=step,
                restarts_left=max(left, 0),
            )
            if found.code == WRONG_JOB:
                return {"end": paragraph(found, "It is not retried.", self.run), "code": WRONG_JOB}
            if left < 0:
                outcome = f"Gave up after {self.used - 1} restarts without progress (step {max(step, 0)})."
                return {"end": paragraph(found, outcome, self.run), "code": 1}
            _say(
                paragraph(
                    found, f"Restarting from step {max(step, 0)}; {left} restarts without progress are left.", self.run
                )
            )
        try:
            value = attempt.newest(self.run) + 1
            attempt.claim(self.run, value)
        except OSError as error:
            raise JobError(
                "runs", str(self.run), f"cannot be written ({error})", "Give a writable runs folder"
            ) from None
        record_event(self.run, "restart" if found else "attempt", attempt=value, round=number)
        return {"attempt": value}


def _let_others_read(rendezvous: Any, wiring: Wiring) -> None:
    """Keep node 0's store alive until the others have read why the job ends."""
    if wiring.node_rank or rendezvous.store is None:
        return
    end = time.monotonic() + 5
    while time.monotonic() < end and int(rendezvous.store.add("muster/told", 0)) < wiring.nodes - 1:
        time.sleep(0.02)


def _final_word(code: int, reason: str | None, run: Path, wiring: Wiring) -> int:
    if code == DONE:
        _tell_platform(plain_table(run))
        return code
    word = reason or ("stopped on request with a checkpoint saved" if code == STOPPED else "failed")
    record_event(run, "ended", node=wiring.node_rank, code=code, reason=word)
    _tell_platform(word)
    _say(f"{'STOPPED' if code == STOPPED else 'FAILED'} (exit {code}): {word}")
    return code


def _tell_platform(text: str) -> None:
    """Leave the last word where the platform shows it: Kubernetes' termination message (at most 4096 bytes)."""
    path = os.environ.get("MUSTER_TERMINATION_LOG")
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_bytes(text.encode()[:4000])


def _say(text: str) -> None:
    print(f"[muster] {text}", file=sys.stderr, flush=True)
