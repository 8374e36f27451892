"""A platform of another machine, reached by ssh: planned, checked and rendered here, handed over and asked there.

The run folder here holds the job, a handle that says where the other folder is, and copies of the records there.
"""

import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trainer
from trainer.config.job import Job
from trainer.errors import Cut, JobError, MaybeAccepted, Refused
from trainer.launch.far_folder import FarFolder
from trainer.launch.local.gpu_lease import try_lock
from trainer.launch.platform import AnyPlan, AnyPlatform, JobStatus, Phase, Plan, Platform, own_program
from trainer.launch.snapshot import check_files, take_snapshot
from trainer.launch.ssh import mirror
from trainer.launch.ssh.connection import ABSOLUTE, HOST, Connection, NotReached
from trainer.launch.ssh.packages import environment_name
from trainer.launch.ssh.parcel import pack_folder, pack_muster
from trainer.launch.ssh.session import Place, Session
from trainer.launch.ssh.site import is_given, runs_of, site_text, wanted, where
from trainer.records import read_json, write_json
from trainer.run.event_files import own_file
from trainer.run.folder import RunFolder
from trainer.run.tree_hash import tree_hash

SITE = "ssh-site.json"
"""In the folder of the plan: the site file for over there."""
SESSIONS: dict[Place, Session] = {}
"""A conversation with each machine, for all runs that are there."""
NOT_BEFORE: dict[Place, tuple[float, NotReached]] = {}
"""When a machine may be tried again that could not be reached, and why: a list of its runs waits for it once."""
AGAIN_S = 5.0


@dataclass(frozen=True)
class SshRequest:
    """What goes to the other machine, in words, and what is done with it there."""

    parts: list[str]
    there: str


class OverSsh(Platform[Any, SshRequest]):
    """Another platform, on the machine that the site file names."""

    ids = {  # noqa: RUF012
        "ssh": HOST, "submission": "[0-9a-f]{16}", "name": r"[\w.-]+", "runs": ABSOLUTE, "ssh_folder": ABSOLUTE,
        "environment": "python-[0-9a-f]{16}",
    }  # fmt: skip
    poll_s = 1.0
    copies_logs = True

    def __init__(self, inner: AnyPlatform) -> None:
        self.inner = inner
        self.name, self.folder, self.site_type = inner.name, inner.folder, inner.site_type

    # Here.
    def build(self, plan: AnyPlan) -> SshRequest:
        site, needed = plan.site, wanted(plan.site, Path.cwd())
        host, folder = site.ssh, site.ssh_folder
        python = site.python if is_given(site) else f"{folder}/{environment_name(needed)}/bin/python"
        muster = f"{folder}/muster-{pack_muster().name}"
        made = "" if is_given(site) else ", which is made there on first use"
        parts = [
            f"{muster}: Muster {trainer.__version__}", f"{folder}/code: {Path.cwd()}, less what git ignores",
            f"on {host}, {python} runs it{made}",
        ]  # fmt: skip
        there = RunFolder(Path(runs_of(site)) / plan.run.name)
        if self.inner.asks_machine:  # what it would render depends on where it is
            return SshRequest(parts, f"muster submit {there.job} --on {self.name}\n{plan.job_text.rstrip()}")
        facts = replace(site, python=None) if is_given(site) else site  # as over there: see `site_text`
        inner = self.inner.build(Plan(plan.job, plan.job_text, there, facts))
        ours = shlex.join(own_program("agent"))
        text = self.inner.render(inner).replace(ours, f"{python} {muster}/muster.py agent")
        return SshRequest(parts, text)

    def render(self, request: SshRequest) -> str:
        return "\n".join([*(f"# {line}" for line in request.parts), request.there])

    def unfinished(self, plan: AnyPlan) -> RunFolder | None:
        """The run that `plan` is of, or the newest with the same job, site and code, if its submission was cut off."""
        if _is_unfinished(plan.run):
            other = "job" if plan.run.job.read_text() != plan.job_text else "`ssh`, `runs` or `python`"
            if other != "job" and _is_at(plan.site, plan.run):
                return plan.run
            remedy = f"Complete it first, with the job and the site file as they were: muster submit {plan.run}"
            raise JobError("RUN", str(plan.run), f"its submission was cut off, with another {other}", remedy)
        if plan.run.job.exists():
            return None
        for run in reversed(RunFolder.list_all(plan.run.path.parent)):
            same = _is_unfinished(run) and _is_at(plan.site, run) and run.job.read_text() == plan.job_text
            if same and _site_of(run) == site_text(plan.site) and not mirror.is_under_way(run):
                if _has_code_of_now(run, plan.job):
                    print(f"note: going on with {run}, whose submission was cut off", file=sys.stderr)
                    return run
                print(
                    f"note: the submission of {run}, with other code, was cut off: `muster submit {run}` completes it",
                    file=sys.stderr,
                )
        return None

    def submit(self, plan: AnyPlan, request: SshRequest, follow: bool) -> dict[str, Any]:
        """Hand the job over, once: however often this is tried. Raises MaybeAccepted: the connection was cut."""
        run, before = plan.run, read_json(plan.run.handle)
        check_files(plan.job, run, take_snapshot(Path.cwd(), run, plan.job), False)
        with _held(run):
            handle = before if before and _is_unfinished(run) else self._new_handle(plan, before)
            sent = handle is before
            (run.plan / SITE).write_text(site_text(plan.site))
            write_json(run.handle, handle)  # first: whoever is killed from here on leaves what the next try needs
            try:
                session = _session(_place(handle), lambda: wanted(plan.site, run.code))
                code = pack_folder(run.code)
                if not session.request("has_code", name=code.name)["found"]:
                    session.request("put_code", code.packed, name=code.name)
                sent = True
                handle["there"] = session.request("submit", code=code.name, **self._what(plan, handle))["handle"]
            except JobError as error:
                told = handle is not before and not isinstance(error, (NotReached, MaybeAccepted))
                if isinstance(error, Refused) or told or not sent:
                    _restore(run, handle)
                    raise
                same = f"The job may be there or not. The same command completes it, and so does `muster submit {run}`"
                raise Cut(error.key, error.value, error.problem, f"{error.remedy}. {same}") from None
        for path in run.event_files():  # those over there count: clocks differ
            path.unlink()
        self.following, self.kept = follow, None
        return handle | {"accepted": True, "there": handle["there"]}

    def _new_handle(self, plan: AnyPlan, before: dict[str, Any] | None) -> dict[str, Any]:
        """What names a submission that begins: of a new run, or of one that is there already."""
        site, run = plan.site, plan.run
        is_there = before is not None and "ssh" in before
        if is_there and before and before["ssh"] != site.ssh:
            remedy = f"Continue it there, or submit its {run.job} as a run of its own"
            raise JobError("ssh", site.ssh, f"the run is on {before['ssh']}", remedy)
        if not is_there and run.steps_committed() >= 0:
            problem, remedy = "has its checkpoints here", f"Submit a run of its own with checkpoint.load={run}"
            raise JobError("RUN", str(run), problem, remedy)
        kept = {key: before[key] for key in ("runs", "name")} if is_there and before else {}
        return (read_json(run.platform) or {}) | where(site) | {"name": f"{run.name}-{secrets.token_hex(4)}"} | kept | {
            "environment": environment_name(wanted(site, run.code)),
            "submission": secrets.token_hex(8), "accepted": False, "run": str(run),
            "last": before["submission"] if is_there and before else None,
        }  # fmt: skip

    def _what(self, plan: AnyPlan, handle: dict[str, Any]) -> dict[str, Any]:
        return {
            "platform": self.name, "runs": handle["runs"], "name": handle["name"], "submission": handle["submission"],
            "job": plan.job_text, "source": read_json(plan.run.source) or {}, "site": site_text(plan.site),
        }  # fmt: skip

    # There.
    def called(self, handle: dict[str, Any]) -> str:
        there = f"{self.inner.called(handle['there'])}, " if "there" in handle else ""
        return f"{there}{handle['runs']}/{handle['name']} on {handle['ssh']}"

    def ask(self, run: RunFolder, handle: dict[str, Any]) -> JobStatus:
        status = self._look(run, handle, self.following)
        if status.reason == mirror.NEVER and handle["accepted"]:
            return JobStatus(Phase.LOST, f"{handle['runs']}/{handle['name']} is not on {handle['ssh']} any more")
        return status

    def _look(self, run: RunFolder, handle: dict[str, Any], everything: bool) -> JobStatus:
        """The status over there; copy what is new in the run folder, or a part of it, if that is much."""
        begun = None if handle["accepted"] else handle["submission"]
        if handle["accepted"]:  # what was tried here since, and refused, is not part of the run
            own_file(run.events).unlink(missing_ok=True)
        while True:
            have = mirror.have(run, everything)
            answer = self._request(handle, "look", have=have, logs=everything, begun=begun)
            mirror.apply(run, answer)
            if "ended" in answer and read_json(run.handle) == handle:  # so the same command is a run of its own
                write_json(run.handle, handle | {"accepted": True, "there": answer["ended"]})
            if not (everything and answer.get("more")):
                status = answer["status"]
                return JobStatus(**status | {"phase": Phase(status["phase"])})

    def bring_rank_log(self, run: RunFolder, handle: dict[str, Any], rank: int | None) -> None:
        with suppress(NotReached):  # the status says it
            self._look(run, handle, True)

    def cancel(self, run: RunFolder, handle: dict[str, Any]) -> None:
        self._act(run, handle, "cancel")

    def preempt(self, run: RunFolder, handle: dict[str, Any]) -> None:
        self._act(run, handle, "preempt")

    def _act(self, run: RunFolder, handle: dict[str, Any], verb: str) -> None:
        self.kept = None
        try:
            self._request(handle, verb)
        except NotReached as error:
            problem, remedy = f"{error.problem}. The job may go on", f"`muster {verb} {run}` when it can be reached"
            raise NotReached(error.key, error.value, problem, remedy) from None

    def reach(self, run: RunFolder, handle: dict[str, Any]) -> AbstractContextManager[FarFolder]:
        """By a plain command of the connection: any Python can read files."""
        connection = _place(handle).connection
        connection.open()
        folder = handle.get("there", {}).get("run") or f"{handle['runs']}/{handle['name']}"  # `$NAME` is replaced there
        python = handle["python"] if str(handle.get("python")).startswith("/") else "python3"
        return nullcontext(FarFolder(folder, lambda words: connection.command(shlex.join(words)), python))

    def _request(self, handle: dict[str, Any], verb: str, **fields: Any) -> dict[str, Any]:
        return _session(_place(handle)).request(verb, run=f"{handle['runs']}/{handle['name']}", **fields)


def _restore(run: RunFolder, handle: dict[str, Any]) -> None:
    """Let a run that is continued be what it was before that was refused."""
    if handle.get("last"):
        write_json(run.handle, handle | {"submission": handle.get("last"), "accepted": True})


def _session(place: Place, wanted: Any = None) -> Session:
    session = SESSIONS.get(place)
    if session is not None and session.is_open:
        return session
    if time.monotonic() < NOT_BEFORE.get(place, (0.0, None))[0]:
        raise NOT_BEFORE[place][1]
    try:
        session = SESSIONS[place] = Session(place, wanted)
    except NotReached as error:
        NOT_BEFORE[place] = time.monotonic() + AGAIN_S, error
        raise
    return session


def _place(handle: dict[str, Any]) -> Place:
    connection = Connection(handle["ssh"], handle.get("ssh_config"))
    return Place(connection, handle["ssh_folder"], handle.get("python"), handle["environment"])


def _is_at(site: Any, run: RunFolder) -> bool:
    """Whether a run is where its site file leads now."""
    handle, asked = read_json(run.handle) or {}, where(site)
    if handle.get("last"):  # it stays in the folder that it has
        del asked["runs"]
    return all(handle.get(key) == value for key, value in asked.items())


def _site_of(run: RunFolder) -> str:
    with suppress(OSError):
        return (run.plan / SITE).read_text()
    return ""


def _is_unfinished(run: RunFolder) -> bool:
    handle = read_json(run.handle) or {}
    return handle.get("accepted") is False and not handle.get("cancelled")


def _has_code_of_now(run: RunFolder, job: Job) -> bool:
    """Whether a run has the code that a run of the same job would have now."""
    with tempfile.TemporaryDirectory(dir=run.path.parent, prefix=".code-") as folder:
        now = RunFolder(Path(folder))
        now.plan.mkdir()
        write_json(now.source, read_json(run.source) or {})
        return tree_hash(take_snapshot(Path.cwd(), now, job)) == tree_hash(run.code)


@contextmanager
def _held(run: RunFolder) -> Iterator[None]:
    """Keep other processes here from submitting the same run. Raises JobError: one does."""
    with (run.plan / mirror.LOCK).open("a") as lock:
        if try_lock(lock.fileno()) is False:
            raise JobError("RUN", str(run), "is being submitted by another process", "Wait for it")
        yield
