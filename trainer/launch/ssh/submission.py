"""Handing a job over to its platform once, on the machine that it was sent to, whatever is killed meanwhile.

The other side names the run folder here and each submission of it. A submission is written down before the platform is
asked and when it has answered, both under a lock. Where only the first is found, the platform is asked what it has.
"""

import contextlib
import gzip
import hashlib
import io
import os
import shutil
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.config.load import merge_job, to_job
from trainer.errors import JobError, MaybeAccepted, Refused
from trainer.launch.local.gpu_lease import try_lock
from trainer.launch.platform import AnyPlatform, Plan, find_platform
from trainer.launch.ssh.mirror import LOCK, run_of
from trainer.launch.submit import continued, removed_if_refused, send
from trainer.records import read_json, write_json, write_text
from trainer.run.abilities import check_abilities
from trainer.run.folder import RunFolder, make_ignored

BEGUN, SITE = "ssh.json", "site.yaml"
"""In the folder of the plan: which submission has begun; the site file."""
WAIT_S = 60.0
"""How long a submission waits for another one of the same run, whose connection was cut."""
SETTLED_S = 3.0
"""How long a platform may take to show a job whose submission was killed."""


def submit(
    folder: Path, platform_name: str, runs: str, name: str, submission: str, job: str, source: dict[str, Any],
    site: str, code: str,
) -> dict[str, Any]:  # fmt: skip
    """Submit a run, new or to be continued; or find that this was done. Return its handle here.

    Raises Refused: the job is not here. Of every other error, an earlier try may have handed it over.
    """
    run = _make(run_of(f"{runs}/{name}").path)
    platform = find_platform(platform_name)
    with _lock(run):
        handle = read_json(run.handle)
        if handle is not None and handle.get("submission") == submission:
            return handle
        is_new = not run.job.exists() or handle is None
        if is_new:
            _fill(run, source, folder, code)
        os.chdir(run.code)
        write_text(run.plan / SITE, site)
        begun = read_json(run.plan / BEGUN) or {}
        if begun.get("submission") == submission and (found := _find(platform, run, begun["known"])):
            return _keep(run, platform, submission, found)
        with _told():
            plan = _plan(platform, run, job)
            with removed_if_refused([run]) if is_new else continued(run, plan):
                known = [] if is_new else platform.find(run)
                write_json(run.plan / BEGUN, {"submission": submission, "known": known})
                return send(platform, plan, False, {"submission": submission})


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Say of what goes wrong whether the job is here. Raises Refused: it is not; MaybeAccepted: nobody knows."""
    try:
        yield
    except MaybeAccepted:
        raise
    except JobError as error:
        raise Refused(error.key, error.value, error.problem, error.remedy) from None
    except OSError as error:  # such as a full disk, when the platform has answered
        raise MaybeAccepted(
            "runs", error.filename, f"cannot be written: {error.strerror}", "Correct that over there"
        ) from None


def _keep(run: RunFolder, platform: AnyPlatform, submission: str, found: dict[str, Any]) -> dict[str, Any]:
    """Write the handle that nobody was left to write."""
    place = read_json(run.platform) or {"platform": platform.name}
    handle = place | found | {"run": str(run), "submission": submission}
    write_json(run.handle, handle)
    if run.read_events()[-1]["event"] == "ended":  # by the word of who did not know that it was taken
        run.record("continued")
    return handle


def _make(path: Path) -> RunFolder:
    """The run folder, with room for the lock. Raises JobError: it cannot be made."""
    root = path.parent
    try:
        make_ignored(root)
        if not path.exists():
            check_abilities(root)
        run = RunFolder(path)
        run.make()
        run.plan.mkdir(exist_ok=True)
    except OSError as error:
        problem = f"cannot be written: {error}"
        raise JobError("runs", str(root), problem, "Set `runs` in the site file to a folder that can") from None
    return run


@contextlib.contextmanager
def _lock(run: RunFolder) -> Iterator[None]:
    """Keep other submissions of the run away until this process, and what it started to submit it, has ended.

    The lock is our standard input: the platform's command inherits it, and holds it if we are killed.
    """
    end = time.monotonic() + WAIT_S
    with (run.plan / LOCK).open("a+") as file, open(os.devnull, "rb") as nothing:
        while try_lock(file.fileno()) is False:
            if time.monotonic() > end:
                raise JobError("RUN", str(run), "is being submitted by another process", "Try again in a minute")
            time.sleep(0.1)
        os.dup2(file.fileno(), 0)
        try:
            yield
        finally:
            os.dup2(nothing.fileno(), 0)


def _fill(run: RunFolder, source: dict[str, Any], folder: Path, code: str) -> None:
    """What a new run folder holds before its job is known to be good; whatever is there already was cut off."""
    run.events.mkdir(exist_ok=True)
    write_json(run.source, source | {"run": str(run)})
    if run.code.exists():
        return
    kept = code_file(folder, code)
    os.utime(kept)
    pending = run.path / ".code"
    shutil.rmtree(pending, ignore_errors=True)
    pending.mkdir(mode=0o700)
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(kept.read_bytes()))) as tar:
        tar.extraction_filter = getattr(tarfile, "fully_trusted_filter", None)  # links may lead out, as in the source
        tar.extractall(pending)
    pending.rename(run.code)
    run.record("submitted", by=os.environ.get("USER", str(os.getuid())))


def _plan(platform: AnyPlatform, run: RunFolder, text: str) -> Plan[Any]:
    """The plan of a job whose text may differ from that of the run that it continues."""
    draft = run.path / ".job.yaml"  # beside job.yaml, because user code is found from there
    write_text(draft, text)
    try:
        job = to_job(merge_job(draft), platform.runs_code_of_here)
        if not run.job.exists():
            draft.replace(run.job)
    finally:
        draft.unlink(missing_ok=True)
    site_file = run.plan / SITE
    return Plan(job, text, run, platform.load_site(site_file), site_file)


def _find(platform: AnyPlatform, run: RunFolder, known: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What the platform has of a submission that was killed. Raises JobError: it cannot be asked."""
    end = time.monotonic() + SETTLED_S
    while True:
        found = [handle for handle in platform.find(run) if handle not in known]
        if found or time.monotonic() > end:
            return found[-1] if found else None
        time.sleep(0.2)


def code_file(folder: Path, name: str) -> Path:
    """Where the code of that name is kept."""
    return folder / "code" / f"{name}.tar.gz"


def keep_code(folder: Path, name: str, content: bytes) -> None:
    """Keep code that was sent, as a whole or not at all. Raises JobError: it is something else."""
    if hashlib.sha256(gzip.decompress(content)).hexdigest()[:16] != name:
        raise JobError("code", name, "what arrived has another hash", "Try again")
    path = code_file(folder, name)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    pending = path.with_name(f".{name}.{os.getpid()}")
    try:
        pending.write_bytes(content)
        pending.replace(path)
    finally:
        pending.unlink(missing_ok=True)
    for old in path.parent.glob("*.tar.gz"):
        if time.time() - old.stat().st_mtime > KEPT_S:
            old.unlink(missing_ok=True)


KEPT_S = 30 * 86400
"""How long code is kept that no run was made with: it would only be sent again."""
