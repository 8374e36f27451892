"""One node's part of a job, from wiring to the final word: what `python -m trainer` does when it is the agent."""

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
from trainer.records import record_event, tell_platform, write_json
from trainer.run.folder import RunFolder, find_run, is_shared
from trainer.run.summary import plain_table
from trainer.signals import FLAG
from trainer.wiring.node import Wiring, wire


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
    says_nodes = "nodes" in read_sections(path) or any(word.startswith("nodes=") for word in overrides)
    wiring = wire(job.nodes if says_nodes else None, job.devices_per_node, job.devices)
    if wiring.nodes != job.nodes:
        config = merge_job(path, [*overrides, f"nodes={wiring.nodes}"])
        job = to_job(config)
    return job, to_text(config), wiring


def run_node(path: Path, overrides: list[str]) -> int:
    """Wire, check, fork, watch and report; return the exit code."""
    FLAG.install()
    job, text, wiring = _wire(path, overrides)
    run = find_run(path, job, text, wiring.job_id, wiring.platform)
    run.mkdir(parents=True, exist_ok=True)
    (run / "logs").mkdir(exist_ok=True)
    if wiring.node_rank == 0 and not (run / "job.yaml").exists():
        (run / "job.yaml").write_text(text)
    record_event(
        run,
        "wired",
        node=wiring.node_rank,
        master=wiring.master_addr,
        platform=wiring.platform,
        launch=wiring.launch,
        visible_devices=wiring.visible_devices,
        pid=os.getpid(),
    )
    if not is_shared():
        say("the run folder goes with this node: the run resumes in place, but not on another node")
    settings = network_settings(wiring)
    for name, (value, why) in settings.items():
        say(f"{name}={value}: {why}")
    code, reason = _preflight(job, wiring, run)
    if code == DONE:
        code, reason = _supervise(job, path, run, wiring, {name: value for name, (value, _) in settings.items()})
    return _final_word(code, reason, run, wiring)


def _preflight(job: Job, wiring: Wiring, run: Path) -> tuple[int, str | None]:
    problems = check_node(job, wiring)
    for problem in problems:
        say(f"{'ERROR' if problem.fatal else 'WARNING'} [{problem.kind}] {problem.text}")
    fatal = [problem for problem in problems if problem.fatal]
    record_event(run, "preflight", node=wiring.node_rank, problems=[problem.text for problem in problems])
    if fatal:
        return WRONG_JOB, f"node {wiring.node_rank} failed its preflight [{fatal[0].kind}]: {fatal[0].text}"
    return DONE, None


def _supervise(job: Job, path: Path, run: Path, wiring: Wiring, settings: dict[str, str]) -> tuple[int, str | None]:
    from trainer.agent.agent import NodeAgent, supervise
    from trainer.agent.rendezvous import NodeRendezvous

    ranks = job.ranks_per_node * (wiring.nodes if wiring.platform == "local" else 1)
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdecimal() and int(given) else max(1, wiring.cpus // ranks)
    memory = Memory.make(job.ranks_per_node) if keeps_state(job) else None
    restarts = RestartPolicy(job, RunFolder(run), say, memory)
    rendezvous = NodeRendezvous(
        wiring, job.agent.start_timeout_s, job.agent.rejoin_timeout_s, lambda: FLAG.requested is not None,
        restarts.next_attempt, say,
    )  # fmt: skip
    with own_folder() as folder:
        environment = rank_defaults(run, wiring, threads) | settings
        agent = NodeAgent(job, path, run, wiring, rendezvous, threads, folder, environment, memory)
        code, reason = supervise(agent)
    if wiring.node_rank == 0 and code not in (DONE, STOPPED):
        write_json(
            run / "failure.json",
            {"reason": reason, "code": code, "failures": [asdict(failure) for failure in restarts.failures]},
        )
    return code, reason


def _final_word(code: int, reason: str | None, run: Path, wiring: Wiring) -> int:
    if code == DONE:
        tell_platform(plain_table(run))
        return code
    word = reason or ("stopped on request with a checkpoint saved" if code == STOPPED else "failed")
    record_event(run, "ended", node=wiring.node_rank, code=code, reason=word)
    tell_platform(word)
    say(f"{'STOPPED' if code == STOPPED else 'FAILED'} (exit {code}): {word}")
    return code


def say(text: str) -> None:
    """A line in this node's log."""
    print(f"[muster] {text}", file=sys.stderr, flush=True)
