"""One node's part of a job, from wiring to its report: what `python -m trainer` does when it is the agent."""

import contextlib
import os
import socket
from pathlib import Path

from trainer.agent.agent import NodeAgent
from trainer.agent.earlier_run import note_earlier_run
from trainer.agent.failure import Failure
from trainer.agent.fork_server import PRELOAD, ensure_fork_server
from trainer.agent.last_word import judge, leave, say
from trainer.agent.preflight import check_node, network_settings
from trainer.agent.scratch_folder import own_folder
from trainer.agent.script import report_separate_ranks
from trainer.config.job import Job
from trainer.config.load import merge_job, read_sections, to_job, to_text
from trainer.errors import DONE, WRONG_JOB, JobError
from trainer.records import tell_platform, write_text
from trainer.run.abilities import check_abilities, patiently
from trainer.run.event_files import write_as
from trainer.run.folder import RunFolder, run_of
from trainer.run.reserve import keep_room, make_room
from trainer.run.summary import plain_table, separate_ranks
from trainer.wiring.node import Wiring, wire
from trainer.wiring.secret import shared_secret
from trainer.wiring.variables import is_by_hand, run_is_shared

NO_SECRET = "agents of several nodes make one in the run folder. If they share none, set the same on each: "
NO_SECRET += "export MUSTER_SECRET=$(openssl rand -hex 32)"


def explain(path: Path, overrides: list[str], secret: str) -> int:
    """Print wiring, settings and problems of this node; `secret`: where it has the run's secret from, if it has one."""
    job, _, wiring = _wire(path, overrides)
    print(wiring.explain())
    print(f"{'secret':16} {'given' if secret else 'none':40} {secret or NO_SECRET}")
    for name, (value, reason) in network_settings(wiring).items():
        print(f"{name}={value}  ({reason})")
    problems = check_node(job, wiring)
    print(*problems, sep="\n", end="\n" if problems else "")
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


def run_node(path: Path, overrides: list[str], secret: bytes | None) -> int:
    """Wire, check, fork, watch and report; return the exit code."""
    job, text, wiring = _wire(path, overrides)
    own = ["trainer.parallel.fsdp"] if job.parallel == "fsdp" else []  # torch's part of it takes 0.7 s
    os.environ[PRELOAD] = ",".join([*own, *job.preload])
    ensure_fork_server()
    run = run_of(path)
    if run is None:  # a new one; on a scheduler it is named after the job there
        named = RunFolder(Path(job.runs).resolve() / f"{job.name}-{wiring.job_id}")
        run = RunFolder.create(job.runs, job.name, text) if wiring.platform == "alone" else named
    patiently(lambda: _open(run), say)
    note = note_earlier_run(run, text) if is_by_hand() else ""
    if note and wiring.node_rank == 0:
        say(note)
    write_as(wiring.node_rank)
    if wiring.node_rank == 0 and not run.job.exists():
        patiently(lambda: write_text(run.job, text), say)
    run.record(
        "wired", node=wiring.node_rank, master=wiring.master_addr, platform=wiring.platform, launch=wiring.launch,
        visible_devices=wiring.visible_devices, pid=os.getpid(),
    )  # fmt: skip
    if not run_is_shared():
        say("the run folder goes with this node: the run resumes in place, but not on another node")
    failures: list[Failure] = []
    try:
        secret = secret or shared_secret(run.secret, wiring.nodes)
        code, reason = _check_and_supervise(job, path, run, wiring, secret, failures)
    except Exception as error:
        code, reason = judge(error)
    if code != DONE:
        leave(run, code, reason, wiring.node_rank, failures)
        return code
    with contextlib.suppress(OSError):  # what cannot be read now does not undo what is done
        if wiring.node_rank == 0:
            make_room(run)
            report_separate_ranks(job, run, say)
        tell_platform("\n".join(filter(None, (note, plain_table(run) or separate_ranks(run)))))
    return code


def _open(run: RunFolder) -> None:
    """Make the run folder if it is not there. Raises JobError: this node cannot write there what a run needs."""
    try:
        run.make()
        check_abilities(run.path)
    except PermissionError as error:
        remedy = (
            "Let the user of the ranks write there, or give another folder: runs=... (Kubernetes: user_id, group_id)"
        )
        raise JobError("runs", str(run), f"cannot be written on {socket.gethostname()}: {error}", remedy) from None


def _check_and_supervise(
    job: Job, path: Path, run: RunFolder, wiring: Wiring, secret: bytes, failures: list[Failure]
) -> tuple[int, str]:
    """Check this node, and supervise its ranks to their end; return the exit code and, unless it is 0, the reason.

    `failures` gets the first failure of each attempt.
    """
    problems = check_node(job, wiring, run.state_bytes())
    run.record("preflight", node=wiring.node_rank, problems=[problem.text for problem in problems])
    for problem in problems:
        say(str(problem))
    for problem in problems:
        if problem.fatal:
            return WRONG_JOB, f"node {wiring.node_rank} failed its preflight [{problem.kind}]: {problem.text}"
    if wiring.node_rank == 0:
        keep_room(run)
    with own_folder() as folder:
        agent = NodeAgent(job, path, run, wiring, secret, folder)
        agent.restarts.failures = failures
        return agent.supervise()
