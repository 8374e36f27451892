"""Slurm's reasons why a job waits (squeue(1), "job reason codes"), in words, and what ends the wait."""

import re

BY_ITSELF = "it starts by itself"
NEVER = "it never starts like this: cancel it, and change"
LIMIT = "it starts when other jobs have ended, or ask for a higher limit: sacctmgr show assoc, sacctmgr show qos"
MEANINGS = {
    r"Priority": f"jobs of higher priority are before it: {BY_ITSELF}",
    r"Resources": f"too few nodes are free: {BY_ITSELF}",
    r"None": "Slurm has not looked at it yet",
    r"BeginTime": "Slurm lets a requeued job wait for about two minutes, and other jobs until their --begin",
    r"Cleaning|Prolog": f"the nodes are being prepared: {BY_ITSELF}",
    r"Dependency": f"another job has to end first: {BY_ITSELF}",
    r"DependencyNeverSatisfied": f"the job that it depends on failed: {NEVER} --dependency in sbatch_args",
    r"Reservation": "its reservation has not begun, or is full",
    r"ReservationDeleted|InvalidReservation": f"there is no such reservation: {NEVER} reservation",
    r"Licenses": f"the licenses are in use: {BY_ITSELF}",
    r"JobHeldUser": "it is held: scontrol release {job}",
    r"JobHeldAdmin|launch failed requeued held|RequeueHold|JobHoldMaxRequeue":
        "Slurm or an administrator holds it: look at the batch script's log, then scontrol release {job}",
    r"JobArrayTaskLimit": f"as many tasks of the array run as may: {BY_ITSELF}",
    r"JobLaunchFailure": "Slurm could not start it on a node: ask an administrator for slurmd's log",
    r"ReqNodeNotAvail|Nodes required for job are.*|NodeDown":
        "nodes that it needs are down, drained or reserved: sinfo -R says why; it starts when they are back",
    r"PartitionDown|PartitionInactive": "its partition is closed: sinfo shows others for `partition`",
    r"PartitionNodeLimit": f"it asks for more nodes than its partition allows: {NEVER} nodes or partition",
    r"PartitionTimeLimit": f"its partition does not allow so long a job: {NEVER} time_limit_min or partition",
    r"PartitionConfig|BadConstraints|NodeConfig": f"no node of its partition is as it asks: {NEVER} the site file",
    r"InvalidAccount|AccountNotAllowed|InvalidQOS|QOSNotAllowed": f"it may not run so: {NEVER} account or qos",
    r"(Assoc|QOS)\w*(TimeLimit|WallDuration\w*|MaxWall\w*)": f"{NEVER} time_limit_min, or {LIMIT}",
    r"(Assoc|QOS|MaxJobs|AssociationJob|AssociationResource)\w*": f"a limit of your account or qos is reached: {LIMIT}",
}  # fmt: skip
"""By pattern; the first that fits counts. `{job}` is the job's id."""


def explain_reason(reason: str, job_id: str) -> str:
    """Slurm's word, and what it means where that is known. Details follow a comma, as in `ReqNodeNotAvail, ...`."""
    word = reason.strip("()")
    for pattern, meaning in MEANINGS.items():
        if re.fullmatch(pattern, word) or re.fullmatch(pattern, word.partition(",")[0]):
            return f"{reason} ({meaning.replace('{job}', job_id)})"
    return reason
