"""The configuration files of the test cluster, as text. What runs with them is in slurm_controller.py."""

from dataclasses import dataclass
from pathlib import Path

STATE = Path("/run/cluster")  # inside the cluster's own mount namespace: nothing of it reaches the real disk
CONTROLLER = "ctl"


@dataclass(frozen=True)
class Layout:
    """Size and timers of a cluster. The timers are short, and long enough for a machine with other work."""

    hosts: int = 4
    gpus_per_host: int = 4  # device files without a driver: Slurm counts and masks them like real ones
    cpus_per_host: int = 8  # what Slurm is told; the kernel shares the machine's real cores
    memory_mb_per_host: int = 16000
    accounting: bool = True  # slurmdbd and a database, so that sacct answers
    node_timeout_s: int = 10  # silence after which a host is DOWN and its jobs are requeued
    credential_s: int = 5  # Slurm's least; a requeued job waits this long and 1 s more (default: 120)
    kill_wait_s: int = 5  # between SIGTERM and SIGKILL (default 30)
    grace_s: int = 10  # between a preemption's notice and its SIGTERM
    first_job_id: int = 1000

    @property
    def host_names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.hosts + 1)]

    def address(self, name: str) -> str:
        return "10.77.0.1" if name == CONTROLLER else f"10.77.0.{10 + int(name[1:])}"


def slurm_conf(layout: Layout) -> str:
    accounting = (
        # associations,qos: an unknown account or QOS is refused at submission, as on a real cluster
        "AccountingStorageType=accounting_storage/slurmdbd\n"
        f"AccountingStorageHost={CONTROLLER}\n"
        "AccountingStorageTRES=gres/gpu\n"
        "AccountingStorageEnforce=associations,qos"
        if layout.accounting
        else "AccountingStorageType=accounting_storage/none"
    )
    cpus = layout.cpus_per_host
    nodes = f"n[1-{layout.hosts}]" if layout.hosts > 1 else "n1"
    return f"""\
ClusterName=test
SlurmctldHost={CONTROLLER}({layout.address(CONTROLLER)})
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire={layout.credential_s}
StateSaveLocation={STATE}/state
SlurmdSpoolDir={STATE}/spool/%n
SlurmctldPidFile={STATE}/run/slurmctld.pid
SlurmdPidFile={STATE}/run/slurmd.%n.pid
SlurmctldLogFile={STATE}/log/slurmctld.log
SlurmdLogFile={STATE}/log/slurmd.%n.log
{accounting}
# No cgroups: a nested container may not have them, and nothing tested here needs a limit enforced.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
# Believe the CPUS= below: the hosts share fewer real cores than they claim.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
MpiDefault=none
# A host that was silent serves again when it answers; one that an administrator set down stays down.
ReturnToService=1
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Without this a preempted job gets only SIGTERM, never the signal of its --signal.
SlurmctldParameters=preempt_send_user_signal
# Slurm's default, and the worse one for training: the job script itself must ask for the contrary.
KillOnBadExit=0
KillWait={layout.kill_wait_s}
SlurmdTimeout={layout.node_timeout_s}
SlurmctldTimeout=30
MessageTimeout=5
TCPTimeout=2
# Ids that began at 1 each time would let one session's job resume the files of another's.
FirstJobId={layout.first_job_id}
NodeName={nodes} CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 \
RealMemory={layout.memory_mb_per_host} Gres=gpu:{layout.gpus_per_host} State=UNKNOWN
PartitionName=normal Nodes=ALL Default=YES State=UP PriorityTier=10 PreemptMode=REQUEUE \
GraceTime={layout.grace_s}
PartitionName=high Nodes=ALL State=UP PriorityTier=100 PreemptMode=OFF
"""


def slurmdbd_conf() -> str:
    return f"""\
AuthType=auth/munge
DbdHost={CONTROLLER}
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
PidFile={STATE}/run/slurmdbd.pid
LogFile={STATE}/log/slurmdbd.log
"""


def hosts_file(layout: Layout) -> str:
    names = [CONTROLLER, *layout.host_names]
    return "127.0.0.1 localhost\n" + "".join(f"{layout.address(name)} {name}\n" for name in names)


def files(layout: Layout) -> dict[str, str]:
    """Everything under /etc that the cluster's machines see in place of the real file: path -> text."""
    written = {
        "slurm/slurm.conf": slurm_conf(layout),
        "slurm/gres.conf": f"Name=gpu File={STATE}/dev/gpu[0-{layout.gpus_per_host - 1}]\n",
        "slurm/cgroup.conf": "CgroupAutomount=no\n",
        "hosts": hosts_file(layout),
        # No name server is reachable inside, and every reverse look-up would wait for one.
        "nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
    }
    if layout.accounting:
        written["slurm/slurmdbd.conf"] = slurmdbd_conf()
    return written
