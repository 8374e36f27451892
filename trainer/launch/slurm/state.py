"""Where a Slurm job stands: squeue, scontrol, sacct and the run folder are asked in this order.

sacct lags by seconds and may not exist. scontrol forgets a job after MinJobAge. The run folder never does.
"""

import re
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.errors import DONE, FAILED, STOPPED, JobError
from trainer.launch.control import by_events
from trainer.launch.platform import JobStatus, Phase
from trainer.launch.slurm.reasons import explain_reason
from trainer.run.folder import RunFolder, last_event

PENDING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "CONFIGURING"}
RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
NOTES = {"COMPLETING": "completing", "SUSPENDED": "suspended by Slurm: it goes on when Slurm resumes it"}
ENDED = {
    "COMPLETED": (Phase.DONE, ""),
    "CANCELLED": (Phase.CANCELLED, "cancelled"),
    "TIMEOUT": (Phase.FAILED, "its time limit ended it before it could requeue: raise time_limit_min or agent.grace_s"),
    "NODE_FAIL": (Phase.FAILED, "a node failed and Slurm did not requeue it"),
    "OUT_OF_MEMORY": (Phase.FAILED, "Slurm killed it for memory: raise memory_gb in the site file"),
    "PREEMPTED": (Phase.STOPPED, "preempted, and not requeued by this partition"),
    "BOOT_FAIL": (Phase.FAILED, "its nodes did not boot"),
    "DEADLINE": (Phase.FAILED, "its deadline passed"),
    "FAILED": (Phase.FAILED, ""),
}
CAUSE = re.compile(r"^srun: error: (Node failure on \S+)|CANCELLED AT \S+ (DUE TO [A-Z ]*[A-Z])", re.MULTILINE)
"""Why Slurm ended a job, as srun writes it into the batch script's log; the first form names the node."""
UNKNOWN_JOB = "Invalid job id specified"
"""What Slurm's commands say of a job that the controller has forgotten. Any other failure of them is no answer."""
Answer = tuple[str, str, int | None]
"""What one of Slurm's commands says about a job: its state, such as COMPLETED, the reason, and the exit code."""


@dataclass(frozen=True)
class SlurmJob:
    run: RunFolder
    job_id: str
    cancelled: bool
    silent: dict[str, str] = field(default_factory=dict)
    """The commands that got no answer, with what they say."""

    def status(self) -> JobStatus:
        """The status, with Slurm's reason while the job waits."""
        state, reason, code = self._squeue() or self._scontrol() or self._sacct() or ("", "", None)
        if state in PENDING:
            cause = self._cause()
            before = f"requeued ({cause}), " if cause else "requeued, " if self.log.exists() else ""
            return JobStatus(Phase.PENDING, f"{before}Slurm says: {self._why(reason)}")
        if state in RUNNING:
            return JobStatus(Phase.RUNNING, NOTES.get(state, ""))
        if state in ENDED:
            return self._ended(state, code)
        status = by_events(self.run)
        if status.is_active and {"squeue", "scontrol"} <= self.silent.keys():
            remedy = "Ask on a login node of its cluster, or wait until `scontrol ping` says that the controller is up"
            return JobStatus(Phase.UNKNOWN, f"Slurm does not answer here ({self.silent['squeue']}). {remedy}")
        if status.is_active:
            status = JobStatus(Phase.LOST, "Slurm does not know the job any more, and the run folder holds no end")
        return replace(status, phase=Phase.CANCELLED) if self.cancelled and status.phase != Phase.DONE else status

    def _ended(self, state: str, code: int | None) -> JobStatus:
        phase, reason = ENDED[state]
        if self.cancelled and phase in (Phase.FAILED, Phase.STOPPED):
            phase = Phase.CANCELLED
        if state == "FAILED" and code == STOPPED:
            phase = Phase.STOPPED
        if state == "NODE_FAIL" and self._cause():
            reason += f": {self._cause()}"
        logs = [*self.run.logs.glob("node-*.log"), self.log]  # one of an agent that did not start says why
        started = any(log.exists() for log in logs) or last_event(self.run.read_events(), "wired")
        if phase == Phase.FAILED and not reason and not started:
            reason = f"no node wrote into the run folder: {self.run} must be on a file system that all nodes share "
            reason += "(`runs` in slurm/site.yaml), and so must the Python environment"
        return JobStatus(phase, reason, DONE if phase == Phase.DONE else code or FAILED)

    def _squeue(self) -> Answer | None:
        text = self._ask("squeue", "--noheader", f"--jobs={self.job_id}", "--states=all", "--format=%T|%r|%S")
        state, _, reason = text.partition("\n")[0].partition("|")
        return (state, reason, None) if state and state not in ENDED else None  # it does not know exit codes

    def _scontrol(self) -> Answer | None:
        words = self._ask("scontrol", "--oneliner", "show", "job", self.job_id).split()
        fields = dict(word.split("=", 1) for word in words if "=" in word)
        code = _exit_code(fields.get("ExitCode", ""))
        return (fields["JobState"], fields.get("Reason", ""), code) if "JobState" in fields else None

    def _sacct(self) -> Answer | None:
        text = self._ask("sacct", "-X", "-n", "-P", "-j", self.job_id, "-o", "State,ExitCode")
        state, _, code = text.rpartition("\n")[2].partition("|")
        return (state.split()[0], "", _exit_code(code)) if state else None  # of CANCELLED by 1000

    def _ask(self, *argv: str) -> str:
        """What a command prints; nothing when it does not know the job, or cannot answer."""
        try:
            return run_client(*argv).strip()
        except JobError as error:
            if UNKNOWN_JOB not in str(error):
                self.silent[argv[0]] = error.problem
        return ""

    def _why(self, reason: str) -> str:
        """Why it waits, of `reason` or `reason|expected start`, in words."""
        word, _, start = reason.partition("|")
        expected = re.fullmatch(r"\d{4}-(\d\d-\d\d)T(\d\d:\d\d):\d\d", start)  # N/A when Slurm has no idea
        until = f", expected at {expected[1]} {expected[2]}" if expected else ""
        return explain_reason(word, self.job_id) + until

    def _cause(self) -> str:
        """Why Slurm ended the last attempt, in its own words; empty when it did not, or did not say."""
        try:
            text = self.log.read_text(errors="replace")
        except OSError:
            return ""
        causes = CAUSE.findall(re.split(r"^attempt \d+ of job ", text, flags=re.MULTILINE)[-1])  # job.sbatch's line
        return next((node for node, _ in causes if node), causes[-1][1] if causes else "")

    @property
    def log(self) -> Path:
        """The batch script's log: it exists as soon as this job, and not an earlier one of the run, has started."""
        return self.run.logs / f"slurm-{self.job_id}.out"


def _exit_code(text: str) -> int | None:
    """The exit code in Slurm's `code:signal`, as a shell would give it."""
    code, _, number = text.partition(":")
    if not code.isdigit():
        return None
    return int(code) or (128 + int(number) if number.isdigit() and int(number) else 0)


def run_client(*argv: str) -> str:
    """Run one of Slurm's commands; return what it prints. Raises JobError: it failed; its own message is shown."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise JobError("--on", "slurm", str(error), "Run this on a login node of the cluster") from None
    if done.returncode:
        raise JobError(argv[0], argv[-1], " ".join(done.stderr.split()), "`muster status` shows the job's state")
    return done.stdout
