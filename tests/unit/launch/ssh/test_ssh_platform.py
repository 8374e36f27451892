"""What is decided on this machine before a job goes to another one, and what its site file says there."""

import json
import shutil
from pathlib import Path

import pytest
from paths import ROOT

from trainer.errors import Cut, JobError, MaybeAccepted, Refused
from trainer.launch.platform import JobStatus, Phase, platform_of
from trainer.launch.ssh import mirror, submission
from trainer.launch.ssh import platform as over_ssh
from trainer.launch.ssh.parcel import pack_folder
from trainer.launch.ssh.site import site_text
from trainer.launch.ssh.there import There
from trainer.launch.submit import make_plan, make_run, render_job, submit_job
from trainer.records import read_json, write_json
from trainer.run.folder import RunFolder

JOB = str(ROOT / "jobs/digits.yaml")


@pytest.fixture(autouse=True)
def no_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these may connect."""
    program = tmp_path / "bin/ssh"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "ssh was called: $*" >&2\nexit 255\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)


def site(folder: Path, *lines: str) -> Path:
    path = folder / "site.yaml"
    path.write_text("\n".join(["ssh: far", *lines, ""]))
    return path


def unfinished(folder: Path, where: Path) -> RunFolder:
    """A run whose submission was cut off."""
    _, plan = make_plan(JOB, [], "slurm", where)
    run = make_run(plan, JOB)
    run.code.mkdir()
    (run.plan / over_ssh.SITE).write_text(site_text(plan.site))
    write_json(run.platform, {"platform": "slurm", "site": str(where)})
    handle = {"ssh": "far", "name": "a", "accepted": False, "submission": "0" * 16, "run": str(run)}
    place = {"platform": "slurm", "site": str(where), "runs": "~/.muster/runs", "ssh_folder": "~/.muster"}
    write_json(run.handle, handle | place | {"environment": "python-" + "0" * 16})
    return run


def copy_code(folder: Path, run: RunFolder) -> None:
    """Give a run the code that one would have now."""
    for path in (*folder.glob("*.*"), folder / "bin/ssh"):
        (copy := run.code / path.relative_to(folder)).parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)


def test_a_rendering_shows_paths_of_the_other_machine(tmp_path: Path) -> None:
    where = site(tmp_path, "python: $HOME/env/bin/python", "runs: /scratch/$USER/runs", "setup: ~/setup.sh")
    text = render_job(JOB, ["runs=here"], "slurm", where)
    assert "# on far, $HOME/env/bin/python runs it" in text and "/scratch/$USER/runs/digits-ID" in text
    assert "/muster.py agent" in text and str(tmp_path / "here") not in text.replace("runs: here", "")
    assert "MUSTER_SETUP=~/setup.sh" in text.replace("'", "")


def test_containers_are_not_rendered_for_this_machine(tmp_path: Path) -> None:
    """Mounts are looked for over there."""
    text = render_job(JOB, [], "docker", site(tmp_path, "mounts: [/data:/data]"))
    assert "docker run" not in text and "muster submit ~/.muster/runs/digits-ID/job.yaml --on docker" in text


@pytest.mark.parametrize(("lines", "words"), [
    (["ssh: -oProxyCommand=true"], "is not a host"), (["ssh: null", "ssh_config: site.yaml"], "ignored without ssh"),
    (["ssh_config: nowhere"], "there is no such file"), (["runtime: pyxis"], "needs an image"),
    (["runs: here"], "is not an absolute path"), (["ssh_folder: here"], "is not an absolute path"),
    (["sbatch_args: ['--comment=${oc.env:HOME}']"], "would send"),
])  # fmt: skip
def test_a_wrong_site_is_refused_before_anything_is_sent(tmp_path: Path, lines: list[str], words: str) -> None:
    where = site(tmp_path, *lines)
    where.write_text(where.read_text().replace("ssh: far\n", "", lines[0].startswith("ssh:")))
    with pytest.raises(JobError, match=words):
        submit_job(JOB, [], "slurm", where)
    assert not list(tmp_path.glob("runs/*/"))


def test_a_machine_that_cannot_be_reached_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="ssh was called") as caught:
        submit_job(JOB, [], "slurm", site(tmp_path))
    assert caught.value.code == 1 and not list(tmp_path.glob("runs/*/"))


def test_the_same_job_completes_what_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = site(tmp_path)
    (tmp_path / "task.py").write_text("a = 1\n")
    run = unfinished(tmp_path, where)
    copy_code(tmp_path, run)
    platform, plan = make_plan(JOB, [], "slurm", where)
    assert platform.unfinished(plan) == run, capsys.readouterr().err
    assert platform.unfinished(make_plan(JOB, ["seed=1"], "slurm", where)[1]) is None
    with (run.plan / mirror.LOCK).open("w") as lock:
        over_ssh.try_lock(lock.fileno())
        assert platform.unfinished(plan) is None  # somebody else is at it
    (tmp_path / "task.py").write_text("a = 2\n")
    assert platform.unfinished(plan) is None
    assert f"muster submit {run}" in capsys.readouterr().err
    with pytest.raises(JobError, match="with another job"):
        submit_job(str(run), ["seed=1"], None, None)
    with pytest.raises(JobError, match="The same command completes it"):  # nobody knows what was over there before
        submit_job(str(run), [], None, None)
    assert (read_json(run.handle) or {})["accepted"] is False


LOCKED = JobError("RUN", "a", "is being submitted by another process", "Try again in a minute")


@pytest.mark.parametrize(("error", "stays"), [
    (JobError("ssh", "far", "does not let you in", "Log in once by hand"), True), (LOCKED, True),
    (MaybeAccepted("runs", "a", "cannot be written", "Correct that"), True),
    (Refused("sbatch", "a", "invalid partition", "Choose another"), False),
])  # fmt: skip
def test_a_cut_run_is_kept_until_its_job_itself_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: JobError, stays: bool
) -> None:
    """With the token by which the other side knows its submission."""
    run = unfinished(tmp_path, where := site(tmp_path))
    copy_code(tmp_path, run)
    monkeypatch.setattr(over_ssh, "_session", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(Cut if stays else Refused, match=error.problem) as caught:
        submit_job(JOB, [], "slurm", where)
    assert [path.name for path in tmp_path.glob("runs/*/")] == [run.name] * stays
    assert (f"{error.remedy}. The job may be there" in str(caught.value)) == stays


def test_what_is_not_known_to_be_refused_is_cut_in_a_first_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk over there is full when sbatch has answered."""

    class Full:
        def __init__(self, *_: object) -> None: ...

        def request(self, verb: str, *_: object, **__: object) -> dict[str, bool]:
            if verb == "submit":
                raise MaybeAccepted("runs", "handle.json", "cannot be written: No space left", "Correct that")
            return {"found": True}

    monkeypatch.setattr(over_ssh, "_session", Full)
    with pytest.raises(Cut, match="No space left"):
        submit_job(JOB, [], "slurm", site(tmp_path))
    assert len(list(tmp_path.glob("runs/*/handle.json"))) == 1


@pytest.mark.parametrize(
    "change", ["ssh: near", "ssh_folder: ~/other", "runs: /scratch/runs", "python: /usr/bin/python3"]
)
def test_a_cut_run_is_completed_where_it_is(tmp_path: Path, change: str) -> None:
    run = unfinished(tmp_path, site(tmp_path))
    other = tmp_path / "other.yaml"
    other.write_text("\n".join(["ssh: far"] * (not change.startswith("ssh: ")) + [change, ""]))
    copy_code(tmp_path, run)
    platform, plan = make_plan(JOB, [], "slurm", other)
    assert platform.unfinished(plan) is None
    assert platform.unfinished(make_plan(JOB, [], "slurm", tmp_path / "site.yaml")[1]) == run
    with pytest.raises(JobError, match="with another `ssh`"):
        submit_job(str(run), [], "slurm", other)


def test_a_cut_run_that_was_cancelled_or_has_ended_is_not_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = unfinished(tmp_path, where := site(tmp_path))
    platform, plan = make_plan(str(run), [], "slurm", where)
    handle = read_json(run.handle) or {}
    write_json(run.handle, handle | {"cancelled": True})
    assert platform.unfinished(plan) is None
    write_json(run.handle, handle)
    answer = {"status": vars(JobStatus(Phase.RUNNING)), "files": {}, "gone": []}
    monkeypatch.setattr(over_ssh.OverSsh, "_request", lambda *_, **__: answer)
    platform.ask(run, handle)
    assert platform.unfinished(plan) == run
    answer |= {"status": vars(JobStatus(Phase.DONE)), "ended": {"job_id": "7"}}
    assert platform.ask(run, handle).phase == Phase.DONE
    assert platform.unfinished(plan) is None and (read_json(run.handle) or {})["there"] == {"job_id": "7"}


def test_a_run_over_there_is_not_begun_anew_here(tmp_path: Path) -> None:
    run = unfinished(tmp_path, site(tmp_path))
    write_json(run.handle, (read_json(run.handle) or {}) | {"accepted": True})
    with pytest.raises(JobError, match="its checkpoints are on far"):
        submit_job(str(run), [], "local", None)


@pytest.mark.parametrize(("key", "value"), [("ssh", "-oProxyCommand=x"), ("submission", "../x"), ("name", "a b")])
def test_a_handle_that_was_changed_is_not_followed(tmp_path: Path, key: str, value: str) -> None:
    from trainer.launch.handle import read_handle

    run = unfinished(tmp_path, site(tmp_path))
    handle = read_json(run.handle) or {}
    assert read_handle(run) == handle and platform_of(handle).name == "slurm"
    write_json(run.handle, handle | {key: value})
    with pytest.raises(JobError, match="Somebody changed it"):
        read_handle(run)


def test_the_site_over_there_has_no_way_there(tmp_path: Path) -> None:
    """The Python of the agents is the one that submits; in a container it is another one."""
    text = site_text(make_plan(JOB, [], "slurm", site(tmp_path, "python: /p", "partition: a"))[1].site)
    assert json.loads(text)["partition"] == "a" and not {"ssh", "python", "runs"} & json.loads(text).keys()
    container = site(tmp_path, "python: /p", "runtime: apptainer", "image: /i")
    assert json.loads(site_text(make_plan(JOB, [], "slurm", container)[1].site))["python"] == "/p"


@pytest.mark.parametrize(("error", "kind", "stays"), [
    (OSError(28, "No space left on device", "handle.json"), MaybeAccepted, True),
    (MaybeAccepted("sbatch", "a", "did not answer", "Try again"), MaybeAccepted, True),
    (JobError("sbatch", "a", "invalid partition", "Choose another"), Refused, False),
])  # fmt: skip
def test_the_other_side_says_whether_it_may_have_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[JobError], stays: bool
) -> None:
    """By a platform that fails when it may have taken the job."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project/task.py").touch()
    code = pack_folder(tmp_path / "project")
    submission.keep_code(tmp_path, code.name, code.packed)
    monkeypatch.setattr(submission, "send", lambda *_: (_ for _ in ()).throw(error))
    source = dict.fromkeys(("working_directory", "job_folder"), str(tmp_path / "project"))
    with pytest.raises(JobError, match=r"No space|answer|partition") as caught:
        submission.submit(
            tmp_path, "slurm", str(tmp_path / "runs"), "a", "0" * 16, Path(JOB).read_text(), source, "{}", code.name
        )
    assert type(caught.value) is kind and (tmp_path / "runs/a").exists() == stays


def test_the_other_side_says_that_a_job_has_ended(tmp_path: Path) -> None:
    there = There.__new__(There)
    for phase in (Phase.RUNNING, Phase.DONE):
        there.runs = {str(tmp_path): ({"platform": "local", "submission": "1"}, lambda phase=phase: JobStatus(phase))}
        answer = there.do_look(str(tmp_path), {}, False, "1")
        assert ("ended" in answer) == (phase == Phase.DONE) and answer["status"]["phase"] == phase
