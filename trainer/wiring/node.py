"""Wiring: who this node is, who the others are, where they meet.

Node facts come from submitit's JobEnvironment, master address and port through its TorchDistributedEnvironment,
with one submitit task per node. Each value remembers where it came from. Only this module and `trainer.wiring.rank`
read what a launcher or a scheduler sets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.errors import JobError
from trainer.wiring.hardware import usable_processors
from trainer.wiring.network import candidate_ports, route_to, same_host
from trainer.wiring.rank import number

PLATFORMS = ("local", "docker", "kubernetes")


@dataclass(frozen=True)
class Wiring:
    """One node's place in a job."""

    platform: str
    job_id: str
    launch: int
    """How often the platform started this job again (a requeue, a restart of the supervisor)."""
    nodes: int
    node_rank: int
    hostnames: tuple[str, ...]
    master_addr: str
    ports: tuple[int, ...]
    """Candidates for the store that the agents share, in order."""
    devices_per_node: int
    visible_devices: str | None
    """The mask that the scheduler, the site or a lease set: CUDA_VISIBLE_DEVICES."""
    cpus: int
    deadline: float | None
    """When the platform will end the job, seconds since 1970."""
    interface: str
    """The interface that routes to the master; empty when unknown."""
    provenance: Mapping[str, str] = field(default_factory=dict)

    def explain(self) -> str:
        """Each value with where it came from, a line each."""
        rows = [(name, str(getattr(self, name))) for name in self.__dataclass_fields__ if name != "provenance"]
        return "\n".join(f"{name:16} {value:40} {self.provenance.get(name, '')}".rstrip() for name, value in rows)


@dataclass(frozen=True)
class NodeFacts:
    """What the scheduler says about this node."""

    job_id: str
    launch: int
    node_rank: int
    hostnames: tuple[str, ...]
    nodes: int


def array_task(environ: Mapping[str, str] = os.environ) -> str | None:
    """The number of this task of a Slurm array; None outside one."""
    return environ.get("SLURM_ARRAY_TASK_ID")


def wire(nodes: int | None, devices_per_node: int, devices: list[int] | None = None) -> Wiring:
    """Wire this node for a job of `nodes` nodes, None for as many as there are; `devices`: those that the job chooses.

    Raises:
        JobError: an environment that is partial, or that contradicts the job or itself.
    """
    environ = os.environ
    platform, source = _platform(environ)
    says: dict[str, str] = {"platform": source}
    if platform == "alone":
        if nodes is not None and nodes > 1:
            problem = f"this process was started by hand, on one machine ({source})"
            remedy = "Use `muster run` to simulate nodes here, or submit to a cluster"
            raise JobError("nodes", nodes, problem, remedy)
        facts = NodeFacts(f"alone-{os.getpid()}", 0, 0, ("127.0.0.1",), 1)
        says |= dict.fromkeys(("job_id", "node_rank", "hostnames", "nodes", "launch"), "started by hand: one node")
    else:
        facts = _from_submitit(platform, environ, says)
    count = facts.nodes
    if nodes is not None and count != nodes:
        problem = f"the job file says so, but {says['nodes']} says {count}"
        raise JobError("nodes", nodes, problem, f"Submit with nodes={count}, or change the allocation")
    if len(facts.hostnames) != count:
        problem = f"names {len(facts.hostnames)} hosts for {count} nodes ({says['nodes']})"
        raise JobError(says["hostnames"], ",".join(facts.hostnames), problem, "Both must come from one allocation")
    if not 0 <= facts.node_rank < count:
        problem = f"does not exist among {count} nodes ({says['nodes']})"
        raise JobError(says["node_rank"], facts.node_rank, problem, "Both must come from one allocation")
    _accept_ranks(environ, facts, says)
    ports = _ports(environ, facts, says)
    master_addr = _master(environ, facts, says)
    deadline = environ.get("SLURM_JOB_END_TIME", "")
    says["deadline"] = "SLURM_JOB_END_TIME" if deadline.isdecimal() else "no limit known"
    cpus, says["cpus"] = usable_processors()
    says["devices_per_node"] = "job file"
    return Wiring(
        platform, facts.job_id, facts.launch, count, facts.node_rank, facts.hostnames, master_addr, ports,
        devices_per_node, _visible(environ, devices, says), cpus,
        float(deadline) if deadline.isdecimal() else None, _interface(master_addr, says), says,
    )  # fmt: skip


def _platform(environ: Mapping[str, str]) -> tuple[str, str]:
    named = environ.get("MUSTER_PLATFORM")
    if named:
        if named not in PLATFORMS:
            problem = "is none of " + ", ".join(PLATFORMS)
            raise JobError("MUSTER_PLATFORM", named, problem, "Slurm needs no such variable")
        return named, "MUSTER_PLATFORM"
    if environ.get("SLURM_JOB_ID") and environ.get("SLURM_NODEID"):
        return "slurm", "SLURM_JOB_ID and SLURM_NODEID"
    if environ.get("SLURM_JOB_ID"):
        return "alone", "inside a Slurm allocation, but not on a node of it that Slurm numbers"
    return "alone", "no scheduler variable"


def _from_submitit(platform: str, environ: Mapping[str, str], says: dict[str, str]) -> NodeFacts:
    """What submitit's JobEnvironment says about this node."""
    slurm = platform == "slurm"
    index = environ.get("JOB_COMPLETION_INDEX")
    if platform == "kubernetes" and index and not environ.get("MUSTER_NODE_RANK"):
        os.environ["MUSTER_NODE_RANK"] = index  # the Job controller's own name for it
    numbers = ("SLURM_JOB_NUM_NODES", "SLURM_NODEID") if slurm else ("MUSTER_NODES", "MUSTER_NODE_RANK")
    texts = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST") if slurm else ("MUSTER_JOB_ID", "MUSTER_HOSTNAMES")
    for name in (*texts, *numbers):
        if not environ.get(name):
            problem = f"is not set, though this is {platform} by {says['platform']}: a partial environment"
            remedy = f"The template of {platform} sets it; start the job through the template"
            raise JobError(name, None, problem, remedy)
    count = number(environ, numbers[0])
    if slurm:
        _check_step(environ, count)
    number(environ, numbers[1])
    restarts = "SLURM_RESTART_COUNT" if slurm else "MUSTER_LAUNCH"
    os.environ["SUBMITIT_EXECUTOR"] = "slurm" if slurm else "muster"
    import submitit

    env: Any = submitit.JobEnvironment()
    names = env._env
    says |= {"job_id": f"submitit, {names['job_id']}", "node_rank": f"submitit, {names['node']}",
             "nodes": f"submitit, {names['num_nodes']}", "hostnames": f"submitit, {texts[1]}",
             "launch": restarts}  # fmt: skip
    launch = number(environ, restarts, "0")
    return NodeFacts(str(env.job_id), launch, env.node, tuple(env.hostnames), env.num_nodes)


def _check_step(environ: Mapping[str, str], nodes: int) -> None:
    """Refuse what srun did not start as one task on each node of the job."""
    remedy = "Use srun --nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=1, as slurm/job.sbatch does"
    if nodes > 1 and not environ.get("SLURM_STEP_ID"):
        problem = f"is not set, on a job of {nodes} nodes: this process runs in the batch script, not under srun"
        raise JobError("SLURM_STEP_ID", None, problem, remedy)
    here = environ.get("SLURM_STEP_NUM_NODES")
    if here and number(environ, "SLURM_STEP_NUM_NODES") != nodes:
        raise JobError("SLURM_STEP_NUM_NODES", here, f"contradicts SLURM_JOB_NUM_NODES={nodes}", remedy)
    tasks = number(environ, "SLURM_NTASKS", "1")
    if tasks != nodes and environ.get("SLURM_STEP_ID"):
        problem = f"on {nodes} nodes: the agent is one task on each node"
        raise JobError("SLURM_NTASKS", tasks, problem, remedy + ", or start ranks that know RANK and WORLD_SIZE")


def _accept_ranks(environ: Mapping[str, str], facts: NodeFacts, says: dict[str, str]) -> None:
    """Compare what a hook, or the shell, calls RANK and WORLD_SIZE with the numbers of nodes."""
    for name, key, value in (("RANK", "node_rank", facts.node_rank), ("WORLD_SIZE", "nodes", facts.nodes)):
        given = environ.get(name)
        if given and given != str(value):
            problem = f"is set in the environment, but {says[key]} says {value} to an agent"
            raise JobError(name, given, problem, "Unset it, or find the image, hook or shell that sets it")
        if given:
            says[key] += f"; {name} in the environment agrees"


def _master(environ: Mapping[str, str], facts: NodeFacts, says: dict[str, str]) -> str:
    """The master's address, accepting what another tool (enroot's hook, say) set and agrees."""
    own = facts.hostnames[0]
    says["master_addr"] = f"first of the host names ({says['hostnames']})"
    if says["hostnames"].startswith("submitit"):
        from submitit.helpers import TorchDistributedEnvironment

        own = TorchDistributedEnvironment().master_addr
        says["master_addr"] = f"submitit's TorchDistributedEnvironment, {says['master_addr']}"
    given = environ.get("MASTER_ADDR")
    if given and given != own:
        if not same_host(given, own):
            problem = f"is set in the environment, but {says['hostnames']} says {own}"
            raise JobError("MASTER_ADDR", given, problem, "Unset it, or find the hook or template that sets it")
        says["master_addr"] += f"; MASTER_ADDR={given} in the environment is the same host"
    return own


def _ports(environ: Mapping[str, str], facts: NodeFacts, says: dict[str, str]) -> tuple[int, ...]:
    """Candidates for the port where the agents meet."""
    ports = tuple(candidate_ports(f"{facts.job_id}/{facts.launch}"))
    says["ports"] = "derived from job id and launch, below Linux's ephemeral range"
    given = environ.get("MASTER_PORT")
    if given:
        if not given.isdecimal() or not 0 < int(given) < 65536:
            raise JobError("MASTER_PORT", given, "is not a port", "Unset it: Muster chooses one that is free")
        ports = (int(given), *ports)
        says["ports"] = "MASTER_PORT in the environment first, then " + says["ports"]
    return ports


def _interface(master_addr: str, says: dict[str, str]) -> str:
    try:
        local, interface = route_to(master_addr)
    except OSError as error:
        says["interface"] = f"unknown yet: {master_addr}: {error}"
        return ""
    says["interface"] = f"routes to {master_addr} from {local}"
    return interface


def _visible(environ: Mapping[str, str], devices: list[int] | None, says: dict[str, str]) -> str | None:
    leased = environ.get("MUSTER_VISIBLE_DEVICES")
    if leased:  # a container numbers the devices that it was given anew
        says["visible_devices"] = "MUSTER_VISIBLE_DEVICES: the lease, as this container numbers its devices"
        return leased
    mask = environ.get("CUDA_VISIBLE_DEVICES")
    says["visible_devices"] = "CUDA_VISIBLE_DEVICES of the environment" if mask is not None else "no mask is set"
    if devices is None:
        return mask
    if mask is None:
        says["visible_devices"] = "devices in the job file"
        return ",".join(map(str, devices))
    entries = [entry.strip() for entry in mask.split(",") if entry.strip()]
    if any(str(device) not in entries for device in devices):
        raise JobError(
            "devices",
            devices,
            f"contradicts CUDA_VISIBLE_DEVICES={mask}, which the scheduler or you set",
            "Choose among those, or unset CUDA_VISIBLE_DEVICES",
        )
    says["visible_devices"] = "devices in the job file, inside CUDA_VISIBLE_DEVICES"
    return ",".join(map(str, devices))
