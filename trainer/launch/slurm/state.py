"""Where a Slurm job stands: squeue, scontrol, sacct and the run folder are asked in this order.

sacct lags by seconds and may not exist. scontrol forgets a job after MinJobAge. The run folder never does.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import DONE, FAILED, STOPPED, JobError
from trainer.launch.platform import JobStatus, Phase
from trainer.run.folder import RunFolder, last_event

PENDING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "CONFIGURING"}
RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
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


@dataclass(frozen=True)
class Answer:
    """What one of Slurm's commands says about a job."""

    state: str
    """Slurm's own word, such as COMPLETED."""
    reason: str = ""
    code: int | None = None


@dataclass(frozen=True)
class SlurmJob:
    """One job of one run."""

    run: RunFolder
    job_id: str
    cancelled: bool

    def status(self) -> JobStatus:
        """The status, with Slurm's reason while the job waits."""
        answer = self._squeue() or self._scontrol() or self._sacct() or Answer("")
        if answer.state in PENDING:
            return JobStatus(Phase.PENDING, f"{self._requeued()}Slurm says: {answer.reason}")
        if answer.state in RUNNING:
            return JobStatus(Phase.RUNNING, "completing" if answer.state == "COMPLETING" else "")
        if answer.state in ENDED:
            return self._ended(answer)
        return self._by_run_folder()

    def _ended(self, answer: Answer) -> JobStatus:
        phase, reason = ENDED[answer.state]
        if self.cancelled and phase in (Phase.FAILED, Phase.STOPPED):
            phase = Phase.CANCELLED
        if answer.state == "FAILED" and answer.code == STOPPED:
            phase = Phase.STOPPED
        if answer.state == "NODE_FAIL" and self._cause():
            reason += f": {self._cause()}"
        if phase == Phase.FAILED and not reason and not self._wired():
            reason = (
                f"no node wrote into the run folder: {self.run} must be on a file system that all nodes share "
                "(`runs` in slurm/site.yaml), and so must the Python environment"
            )
        return JobStatus(phase, reason, DONE if phase == Phase.DONE else answer.code or FAILED)

    def _squeue(self) -> Answer | None:
        output = _ask(["squeue", "--noheader", f"--jobs={self.job_id}", "--states=all", "--format=%T|%r"])
        line = output.strip().splitlines()[0] if output and output.strip() else ""
        state, _, reason = line.partition("|")
        if not state or state in ENDED:  # squeue does not know exit codes
            return None
        return Answer(state, reason)

    def _scontrol(self) -> Answer | None:
        output = _ask(["scontrol", "--oneliner", "show", "job", self.job_id])
        if not output:
            return None
        fields = dict(word.split("=", 1) for word in output.split() if "=" in word)
        return Answer(fields.get("JobState", ""), fields.get("Reason", ""), _exit_code(fields.get("ExitCode", "")))

    def _sacct(self) -> Answer | None:
        output = _ask(["sacct", "-X", "-n", "-P", "-j", self.job_id, "-o", "State,ExitCode"])
        lines = [line for line in (output or "").splitlines() if line]
        if not lines:
            return None
        state, _, code = lines[-1].partition("|")
        return Answer(state.split()[0], code=_exit_code(code))

    def _requeued(self) -> str:
        """Whether a job that waits has run before, and what ended it."""
        if not self._log().exists():
            return ""
        cause = self._cause()
        return f"requeued ({cause}), " if cause else "requeued, "

    def _cause(self) -> str:
        """Why Slurm ended the last attempt, in its own words; empty when it did not, or did not say."""
        try:
            text = self._log().read_text(errors="replace")
        except OSError:
            return ""
        causes = CAUSE.findall(re.split(r"^attempt \d+ of job ", text, flags=re.MULTILINE)[-1])  # job.sbatch's line
        return next((node for node, _ in causes if node), causes[-1][1] if causes else "")

    def _log(self) -> Path:
        """The batch script's log: it exists as soon as this job, and not an earlier one of the run, has started."""
        return self.run.logs / f"slurm-{self.job_id}.out"

    def _wired(self) -> bool:
        """Whether an agent of this job has started, or left a log that says why not."""
        logs = [*self.run.logs.glob("node-*.log"), self._log()]
        return any(log.exists() for log in logs) or last_event(self.run.read_events(), "wired") is not None

    def _by_run_folder(self) -> JobStatus:
        event = last_event(self.run.read_events(), "done", "ended", "training")
        if event and event["event"] == "done":
            return JobStatus(Phase.DONE, code=DONE)
        if event and event["event"] == "ended":
            code = int(event["code"])
            phase = Phase.CANCELLED if self.cancelled else Phase.STOPPED if code == STOPPED else Phase.FAILED
            return JobStatus(phase, event["reason"], code)
        reason = "Slurm does not know the job any more, and the run folder holds no end"
        return JobStatus(Phase.CANCELLED if self.cancelled else Phase.LOST, reason)


def _exit_code(text: str) -> int | None:
    """The exit code in Slurm's `code:signal`, as a shell would give it."""
    code, _, number = text.partition(":")
    if not code.isdigit():
        return None
    return int(code) or (128 + int(number) if number.isdigit() and int(number) else 0)


def _ask(argv: list[str]) -> str | None:
    """What a command prints; None when it cannot answer."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def run_client(argv: list[str]) -> None:
    """Run one of Slurm's commands.

    Raises:
        JobError: it failed; its own message is shown.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise JobError("--on", "slurm", str(error), "Run this on a login node of the cluster") from None
    if done.returncode:
        raise JobError(argv[0], argv[-1], " ".join(done.stderr.split()), "`muster status` shows the job's state")
