"""One node's part of a job, from wiring to its report: what `python -m trainer` does when it is the agent."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

from trainer.agent.preflight import check_node, network_settings
from trainer.agent.rank_environment import rank_defaults
from trainer.agent.restarts import RestartPolicy
from trainer.agent.scratch_folder import own_folder
from trainer.checkpoint.memory import Memory, keeps_state
from trainer.config.job import Job
from trainer.config.load import merge_job, read_sections, to_job, to_text
from trainer.errors import DONE, STOPPED, WRONG_JOB
from trainer.records import tell_platform, write_json
from trainer.run.folder import RunFolder, run_of
from trainer.run.summary import plain_table
from trainer.signals import FLAG
from trainer.wiring.node import Wiring, wire
from trainer.wiring.variables import run_is_shared


def explain(path: Path, overrides: list[str]) -> int:
    """Print wiring, settings and problems of this node."""
    job, _, wiring = _wire(path, overrides)
    print(wiring.explain())
    for name, (value, reason) in network_settings(wiring).items():
        print(f"{name}={value}  ({reason})")
    problems = check_node(job, wiring)
    for problem in problems:
        print(f"{'ERROR' if problem.fatal else 'WARNING'} [{problem.kind}] {problem.text}")
    return WRONG_JOB if any(problem.fatal for problem in problems) else DONE


def _wire(path: Path, overrides: list[str]) -> tuple[Job, str, Wiring]:
    """The job, its text, and this node's place in it; a job that does not say `nodes` takes those of its allocation."""
    config = merge_job(path, overrides)
    job = to_job(config)
    says_nodes = "nodes" in read_sections(path) or any(override.startswith("nodes=") for override in overrides)
    wiring = wire(job.nodes if says_nodes else None, job.devices_per_node, job.devices)
    if wiring.nodes != job.nodes:
        config = merge_job(path, [*overrides, f"nodes={wiring.nodes}"])
        job = to_job(config)
    return job, to_text(config), wiring


def run_node(path: Path, overrides: list[str]) -> int:
    """Wire, check, fork, watch and report; return the exit code."""
    FLAG.install()
    job, text, wiring = _wire(path, overrides)
    run = _run_folder(path, job, text, wiring)
    run.logs.mkdir(parents=True, exist_ok=True)
    if wiring.node_rank == 0 and not run.job.exists():
        run.job.write_text(text)
    run.record(
        "wired",
        node=wiring.node_rank,
        master=wiring.master_addr,
        platform=wiring.platform,
        launch=wiring.launch,
        visible_devices=wiring.visible_devices,
        pid=os.getpid(),
    )
    if not run_is_shared():
        say("the run folder goes with this node: the run resumes in place, but not on another node")
    settings = network_settings(wiring)
    for name, (value, why) in settings.items():
        say(f"{name}={value}: {why}")
    code, reason = _preflight(job, wiring, run)
    if code == DONE:
        code, reason = _supervise(job, path, run, wiring, {name: value for name, (value, _) in settings.items()})
    return _report_end(code, reason, run, wiring)


def _run_folder(path: Path, job: Job, text: str, wiring: Wiring) -> RunFolder:
    """The run that `path` belongs to; else a new one, on a scheduler one named after its job."""
    run = run_of(path)
    if run is not None:
        return run
    if wiring.platform == "alone":
        return RunFolder.create(job.runs, job.name, text)
    return RunFolder(Path(job.runs).resolve() / f"{job.name}-{wiring.job_id}")


def _preflight(job: Job, wiring: Wiring, run: RunFolder) -> tuple[int, str | None]:
    problems = check_node(job, wiring)
    for problem in problems:
        say(f"{'ERROR' if problem.fatal else 'WARNING'} [{problem.kind}] {problem.text}")
    fatal = [problem for problem in problems if problem.fatal]
    run.record("preflight", node=wiring.node_rank, problems=[problem.text for problem in problems])
    if fatal:
        return WRONG_JOB, f"node {wiring.node_rank} failed its preflight [{fatal[0].kind}]: {fatal[0].text}"
    return DONE, None


def _supervise(
    job: Job, path: Path, run: RunFolder, wiring: Wiring, settings: dict[str, str]
) -> tuple[int, str | None]:
    """Supervise the ranks to their end; return the exit code and, after a failure, its reason."""
    from trainer.agent.agent import NodeAgent, supervise
    from trainer.agent.rendezvous import NodeRendezvous

    ranks = job.ranks_per_node * (wiring.nodes if wiring.platform == "local" else 1)
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) else max(1, wiring.cpus // ranks)
    memory = Memory.make(job.ranks_per_node) if keeps_state(job) else None
    restarts = RestartPolicy(job, run, say, memory)
    rendezvous = NodeRendezvous(
        wiring, job.agent.start_timeout_s, job.agent.rejoin_timeout_s, lambda: FLAG.requested is not None,
        restarts.next_attempt, say,
    )  # fmt: skip
    with own_folder() as folder:
        environment = rank_defaults(run, wiring, threads) | settings
        agent = NodeAgent(job, path, run, wiring, rendezvous, threads, folder, environment, memory)
        code, reason = supervise(agent)
    if wiring.node_rank == 0 and code not in (DONE, STOPPED):
        failures = [asdict(failure) for failure in restarts.failures]
        write_json(run.failure, {"reason": reason, "code": code, "failures": failures})
    return code, reason


def _report_end(code: int, reason: str | None, run: RunFolder, wiring: Wiring) -> int:
    """Tell everybody how this node's part ended; return the exit code."""
    if code == DONE:
        tell_platform(plain_table(run))
        return code
    reason = reason or ("stopped on request with a checkpoint saved" if code == STOPPED else "failed")
    run.record("ended", node=wiring.node_rank, code=code, reason=reason)
    tell_platform(reason)
    say(f"{'STOPPED' if code == STOPPED else 'FAILED'} (exit {code}): {reason}")
    return code


def say(text: str) -> None:
    """A line in this node's log."""
    print(f"[muster] {text}", file=sys.stderr, flush=True)
