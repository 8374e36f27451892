"""Wiring: who this node is, who the others are, where they meet.

Node facts come from submitit's JobEnvironment, master address and port through its TorchDistributedEnvironment,
with one submitit task per node. Each value remembers where it came from.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.errors import JobError, wrong_choice
from trainer.wiring import variables as names
from trainer.wiring.devices import choose_mask
from trainer.wiring.hardware import usable_processors
from trainer.wiring.network import candidate_ports, route_to, same_host
from trainer.wiring.variables import read_int

PLATFORMS = ("local", "docker", "kubernetes")


@dataclass(frozen=True)
class NodeFacts:
    """What the scheduler says about this node."""

    platform: str
    job_id: str
    launch: int  # how often the platform started this job again (a requeue, a restart of the supervisor)
    nodes: int
    node_rank: int
    hostnames: tuple[str, ...]


@dataclass(frozen=True)
class Wiring(NodeFacts):
    """One node's place in a job."""

    master_addr: str
    ports: tuple[int, ...]  # candidates for the store that the agents share, in order
    devices_per_node: int
    visible_devices: str | None  # the mask that the scheduler, the site or a lease set: CUDA_VISIBLE_DEVICES
    cpus: int
    deadline: float | None  # when the platform will end the job, seconds since 1970
    interface: str  # the interface that routes to the master; empty when unknown
    provenance: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_one_machine(self) -> bool:
        """Whether no other host has any business with this job: it has one node, or all of them are simulated here."""
        return self.nodes == 1 or self.platform == "local"

    def explain(self) -> str:
        """Each value with where it came from, a line each."""
        rows = [f"{name:16} {value!s:40} {self.provenance.get(name, '')}" for name, value in vars(self).items()]
        return "\n".join(row.rstrip() for row in rows[:-1])  # the last is provenance


def wire(nodes: int | None, devices_per_node: int, devices: list[int] | None = None) -> Wiring:
    """Wire this node; `nodes` None: as many as there are; `devices`: the job's choice. Raises JobError: conflicts."""
    platform, source = _platform()
    sources: dict[str, str] = {"platform": source, "devices_per_node": "job file"}
    if platform == "alone":
        if nodes is not None and nodes > 1:
            problem = f"this process was started by hand, on one machine ({source})"
            remedy = "Use `muster run` to simulate nodes here, or submit to a cluster"
            raise JobError("nodes", nodes, problem, remedy)
        facts = NodeFacts(platform, f"alone-{os.getpid()}", 0, 1, 0, ("127.0.0.1",))
        sources |= dict.fromkeys(("job_id", "node_rank", "hostnames", "nodes", "launch"), "started by hand: one node")
    else:
        facts = _from_submitit(platform, sources)
    _check_facts(facts, nodes, sources)
    ports, master_addr = _ports(facts, sources), _master(facts, sources)
    deadline = os.environ.get(names.SLURM_JOB_END_TIME, "")
    sources["deadline"] = names.SLURM_JOB_END_TIME if deadline.isdecimal() else "no limit known"
    cpus, sources["cpus"] = usable_processors()
    mask, sources["visible_devices"] = choose_mask(os.environ, devices)
    return Wiring(
        **vars(facts), master_addr=master_addr, ports=ports, devices_per_node=devices_per_node, visible_devices=mask,
        cpus=cpus, deadline=float(deadline) if deadline.isdecimal() else None,
        interface=_interface(master_addr, sources), provenance=sources,
    )  # fmt: skip


def _platform() -> tuple[str, str]:
    named = os.environ.get(names.PLATFORM)
    if named and named not in PLATFORMS:
        raise wrong_choice(names.PLATFORM, named, PLATFORMS, "Unset it on Slurm, which needs no such variable")
    if named:
        return named, names.PLATFORM
    if not os.environ.get(names.SLURM_JOB_ID):
        return "alone", "no scheduler variable"
    if os.environ.get(names.SLURM_NODEID):
        return "slurm", "SLURM_JOB_ID and SLURM_NODEID"
    return "alone", "inside a Slurm allocation, but not on a node of it that Slurm numbers"


def _check_facts(facts: NodeFacts, nodes: int | None, sources: dict[str, str]) -> None:
    """Refuse numbers that contradict each other, the job, or what a hook or the shell calls RANK and WORLD_SIZE."""
    count = facts.nodes
    if nodes is not None and count != nodes:
        problem = f"the job file says so, but {sources['nodes']} says {count}"
        raise JobError("nodes", nodes, problem, f"Submit with nodes={count}, or change the allocation")
    if len(facts.hostnames) != count:
        problem = f"names {len(facts.hostnames)} hosts for {count} nodes ({sources['nodes']})"
        raise JobError(sources["hostnames"], ",".join(facts.hostnames), problem, "Both must come from one allocation")
    if not 0 <= facts.node_rank < count:
        problem = f"does not exist among {count} nodes ({sources['nodes']})"
        raise JobError(sources["node_rank"], facts.node_rank, problem, "Both must come from one allocation")
    for name, key, value in ((names.RANK, "node_rank", facts.node_rank), (names.WORLD_SIZE, "nodes", count)):
        given = os.environ.get(name)
        if given and given != str(value):
            problem = f"is set in the environment, but {sources[key]} says {value} to an agent"
            raise JobError(name, given, problem, "Unset it, or find the image, hook or shell that sets it")
        if given:
            sources[key] += f"; {name} in the environment agrees"


def _from_submitit(platform: str, sources: dict[str, str]) -> NodeFacts:
    """What submitit's JobEnvironment says about this node."""
    slurm, environ = platform == "slurm", os.environ
    index = environ.get(names.COMPLETION_INDEX)
    if platform == "kubernetes" and index and not environ.get(names.NODE_RANK):
        environ[names.NODE_RANK] = index  # the Job controller's own name for it
    numbers = (names.SLURM_JOB_NUM_NODES, names.SLURM_NODEID) if slurm else (names.NODES, names.NODE_RANK)
    texts = (names.SLURM_JOB_ID, names.SLURM_JOB_NODELIST) if slurm else (names.JOB_ID, names.HOSTNAMES)
    for name in (*texts, *numbers):
        if not environ.get(name):
            problem = f"is not set, though this is {platform} by {sources['platform']}: a partial environment"
            remedy = f"The template of {platform} sets it; start the job through the template"
            raise JobError(name, None, problem, remedy)
    count = read_int(environ, numbers[0])
    if slurm:
        _check_step(environ, count)
    read_int(environ, numbers[1])
    restarts = names.SLURM_RESTART_COUNT if slurm else names.LAUNCH
    environ["SUBMITIT_EXECUTOR"] = "slurm" if slurm else "muster"
    import submitit

    env = submitit.JobEnvironment()
    sources |= {"job_id": f"submitit, {texts[0]}", "hostnames": f"submitit, {texts[1]}", "launch": restarts,
             "nodes": f"submitit, {numbers[0]}", "node_rank": f"submitit, {numbers[1]}"}  # fmt: skip
    launch = read_int(environ, restarts, "0")
    return NodeFacts(platform, str(env.job_id), launch, env.num_nodes, env.node, tuple(env.hostnames))


def _check_step(environ: Mapping[str, str], nodes: int) -> None:
    """Refuse what srun did not start as one task on each node of the job."""
    remedy = "Use srun --nodes=$SLURM_JOB_NUM_NODES --ntasks-per-node=1, as slurm/job.sbatch does"
    if nodes > 1 and not environ.get(names.SLURM_STEP_ID):
        problem = f"is not set, on a job of {nodes} nodes: this process runs in the batch script, not under srun"
        raise JobError(names.SLURM_STEP_ID, None, problem, remedy)
    here = environ.get(names.SLURM_STEP_NUM_NODES)
    if here and read_int(environ, names.SLURM_STEP_NUM_NODES) != nodes:
        raise JobError(names.SLURM_STEP_NUM_NODES, here, f"contradicts SLURM_JOB_NUM_NODES={nodes}", remedy)
    tasks = read_int(environ, names.SLURM_NTASKS, "1")
    if tasks != nodes and environ.get(names.SLURM_STEP_ID):
        problem = f"on {nodes} nodes: the agent is one task on each node"
        raise JobError(names.SLURM_NTASKS, tasks, problem, remedy + ", or start ranks that know RANK and WORLD_SIZE")


def _master(facts: NodeFacts, sources: dict[str, str]) -> str:
    """The master's address, accepting what another tool (enroot's hook, say) set and agrees."""
    own = facts.hostnames[0]
    sources["master_addr"] = f"first of the host names ({sources['hostnames']})"
    if sources["hostnames"].startswith("submitit"):
        from submitit.helpers import TorchDistributedEnvironment

        own = TorchDistributedEnvironment().master_addr
        sources["master_addr"] = f"submitit's TorchDistributedEnvironment, {sources['master_addr']}"
    given = os.environ.get(names.MASTER_ADDR)
    if given and given != own:
        if not same_host(given, own):
            problem = f"is set in the environment, but {sources['hostnames']} says {own}"
            raise JobError(names.MASTER_ADDR, given, problem, "Unset it, or find the hook or template that sets it")
        sources["master_addr"] += f"; MASTER_ADDR={given} in the environment is the same host"
    return own


def _ports(facts: NodeFacts, sources: dict[str, str]) -> tuple[int, ...]:
    """Candidates for the port where the agents meet."""
    ports = tuple(candidate_ports(f"{facts.job_id}/{facts.launch}"))
    sources["ports"] = "derived from job id and launch, below Linux's ephemeral range"
    given = os.environ.get(names.MASTER_PORT)
    if given:
        if not given.isdecimal() or not 0 < int(given) < 65536:
            raise JobError(names.MASTER_PORT, given, "is not a valid port", "Unset it: Muster chooses one that is free")
        ports = (int(given), *ports)
        sources["ports"] = "MASTER_PORT in the environment first, then " + sources["ports"]
    return ports


def _interface(master_addr: str, sources: dict[str, str]) -> str:
    try:
        local, interface = route_to(master_addr)
    except OSError as error:
        sources["interface"] = f"unknown yet: {master_addr}: {error}"
        return ""
    sources["interface"] = f"routes to {master_addr} from {local}"
    return interface
