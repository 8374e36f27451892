"""Where a Slurm job stands, asked of whoever knows: squeue, then scontrol, then sacct, then the run folder.

sacct lags by seconds and may not exist; scontrol forgets a job after MinJobAge; the run folder never does.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import DONE, STOPPED, JobError
from trainer.launch.platform import State
from trainer.records import read_lines

PENDING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "CONFIGURING"}
RUNNING = {"RUNNING", "COMPLETING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
ENDED = {
    "COMPLETED": ("done", ""),
    "CANCELLED": ("cancelled", "cancelled"),
    "TIMEOUT": ("failed", "its time limit ended it before it could be requeued: raise time_limit_min or agent.grace_s"),
    "NODE_FAIL": ("failed", "a node failed and Slurm did not requeue it"),
    "OUT_OF_MEMORY": ("failed", "Slurm killed it for memory: raise memory_gb in the site file"),
    "PREEMPTED": ("stopped", "preempted, and not requeued by this partition"),
    "BOOT_FAIL": ("failed", "its nodes did not boot"),
    "DEADLINE": ("failed", "its deadline passed"),
    "FAILED": ("failed", ""),
}
CAUSE = re.compile(r"^srun: error: (Node failure on \S+)|CANCELLED AT \S+ (DUE TO [A-Z ]*[A-Z])", re.MULTILINE)
"""Why Slurm ended a job, as it tells srun and the batch script's log; the first names the node."""


@dataclass(frozen=True)
class SlurmState:
    """One job of one run."""

    run: Path
    job_id: str
    cancelled: bool

    def read(self) -> State:
        """The state, with Slurm's reason while it waits."""
        word, reason, code = self._squeue() or self._scontrol() or self._sacct() or ("", "", None)
        if word in PENDING:
            return State("pending", f"{self._requeued()}Slurm says: {reason}")
        if word in RUNNING:
            return State("running", "completing" if word == "COMPLETING" else "")
        if word in ENDED:
            outcome, why = ENDED[word]
            if self.cancelled and outcome in ("failed", "stopped"):
                outcome = "cancelled"
            if word == "FAILED" and code == STOPPED:
                outcome = "stopped"
            if word == "NODE_FAIL" and self._cause():
                why += f": {self._cause()}"
            if outcome == "failed" and not why and not self._wired():
                why = (
                    f"no node wrote into the run folder: {self.run} must be on a file system that all nodes share "
                    "(`runs` in slurm/site.yaml), and so must the Python environment"
                )
            return State(outcome, why, DONE if outcome == "done" else code or 1)
        return self._run_folder()

    def _squeue(self) -> tuple[str, str, int | None] | None:
        output = _ask(["squeue", "--noheader", f"--jobs={self.job_id}", "--states=all", "--format=%T|%r"])
        line = output.strip().splitlines()[0] if output and output.strip() else ""
        word, _, reason = line.partition("|")
        if not word or word in ENDED:  # squeue does not tell exit codes
            return None
        return word, reason, None

    def _scontrol(self) -> tuple[str, str, int | None] | None:
        output = _ask(["scontrol", "--oneliner", "show", "job", self.job_id])
        if not output:
            return None
        fields = dict(word.split("=", 1) for word in output.split() if "=" in word)
        code = _exit_code(fields.get("ExitCode", ""))
        return fields.get("JobState", ""), fields.get("Reason", ""), code

    def _sacct(self) -> tuple[str, str, int | None] | None:
        output = _ask(["sacct", "-X", "-n", "-P", "-j", self.job_id, "-o", "State,ExitCode"])
        lines = [line for line in (output or "").splitlines() if line]
        if not lines:
            return None
        word, _, code = lines[-1].partition("|")
        return word.split()[0], "", _exit_code(code)

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
        found = CAUSE.findall(re.split(r"^attempt \d+ of job ", text, flags=re.MULTILINE)[-1])  # as job.sbatch says
        return next((node for node, _ in found if node), found[-1][1] if found else "")

    def _log(self) -> Path:
        """The batch script's log: there as soon as this job, and not an earlier one of the run, has begun."""
        return self.run / "logs" / f"slurm-{self.job_id}.out"

    def _wired(self) -> bool:
        """Whether an agent of this job has begun, or left a log that says why not."""
        logs = [*self.run.glob("logs/node-*.log"), self._log()]
        return any(e["event"] == "wired" for e in read_lines(self.run / "events.jsonl")) or any(
            log.exists() for log in logs
        )

    def _run_folder(self) -> State:
        events = [e for e in read_lines(self.run / "events.jsonl") if e["event"] in ("done", "ended", "training")]
        if events and events[-1]["event"] == "done":
            return State("done", code=DONE)
        if events and events[-1]["event"] == "ended":
            code = int(events[-1]["code"])
            word = "cancelled" if self.cancelled else "stopped" if code == STOPPED else "failed"
            return State(word, events[-1]["reason"], code)
        return State(
            "cancelled" if self.cancelled else "lost", "Slurm knows the job no more, and its run folder no end"
        )


def _exit_code(text: str) -> int | None:
    code, _, number = text.partition(":")
    if not code.isdigit():
        return None
    return int(code) or (128 + int(number) if number.isdigit() and int(number) else 0)


def _ask(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def run_client(command: list[str]) -> None:
    """Run one of Slurm's commands.

    Raises:
        JobError: it failed; its own message is shown.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise JobError("--on", "slurm", str(error), "Run this on a login node of the cluster") from None
    if done.returncode:
        raise JobError(command[0], command[-1], " ".join(done.stderr.split()), "`muster status` says where it stands")
