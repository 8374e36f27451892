"""One node's part of a job, from wiring to the final word: what `python -m trainer` does when it is the agent."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trainer.agent.ahead import Loaded, load
from trainer.agent.preflight import check_node, network_settings
from trainer.agent.restarts import Rounds
from trainer.checkpoint.memory import Memory, keeps_state
from trainer.config.job import Job
from trainer.config.user_code import add_import_paths
from trainer.errors import DONE, STOPPED, WRONG_JOB
from trainer.records import record_event, tell_platform, write_json
from trainer.reporting.heartbeat import own_folder
from trainer.run.folder import find_run, is_shared
from trainer.run.summary import plain_table
from trainer.signals import FLAG
from trainer.wiring.node import Wiring, wire


def explain(path: Path, overrides: list[str]) -> int:
    """Print wiring, settings and problems of this node."""
    (job, *_), wiring = _wire(path, overrides, load(path, overrides))
    print(wiring.explain())
    for name, (value, reason) in network_settings(wiring).items():
        print(f"{name}={value}  ({reason})")
    problems = check_node(job, wiring)
    for problem in problems:
        print(f"{'ERROR' if problem.fatal else 'WARNING'} [{problem.kind}] {problem.text}")
    return WRONG_JOB if any(problem.fatal for problem in problems) else DONE


def _wire(path: Path, overrides: list[str], loaded: Loaded) -> tuple[Loaded, Wiring]:
    """The job and this node's place in it; a job that says nothing of nodes takes those of its allocation."""
    job = loaded.job
    wiring = wire(job.nodes if loaded.says_nodes else None, job.devices_per_node, job.devices)
    if wiring.nodes != job.nodes:
        loaded = load(path, [*overrides, f"nodes={wiring.nodes}"])
    return loaded, wiring


def run_node(path: Path, overrides: list[str], loaded: Loaded) -> int:
    """Wire, check, fork, watch and report; return the exit code. `loaded`: the job of these words."""
    FLAG.install()
    add_import_paths(path / "job.yaml" if path.is_dir() else path)  # another process may have loaded the job
    loaded, wiring = _wire(path, overrides, loaded)
    job = loaded.job
    run = find_run(path, job, wiring.job_id, wiring.platform)
    run.mkdir(parents=True, exist_ok=True)
    (run / "logs").mkdir(exist_ok=True)
    if wiring.node_rank == 0 and not (run / "job.yaml").exists():
        (run / "job.yaml").write_text(loaded.text)
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
    rounds = Rounds(job, run, say, memory)
    rendezvous = NodeRendezvous(
        wiring, job.agent.start_timeout_s, job.agent.rejoin_timeout_s, lambda: FLAG.requested is not None,
        rounds.start, say,
    )  # fmt: skip
    with own_folder() as folder:
        environment = rank_environment(job, run, wiring, threads) | settings
        agent = NodeAgent(job, path, run, wiring, rendezvous, threads, folder, environment, memory)
        code, reason = supervise(agent)
    if wiring.node_rank == 0 and code not in (DONE, STOPPED):
        write_json(run / "failure.json", {"reason": reason, "code": code, "failures": rounds.history})
    return code, reason


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
