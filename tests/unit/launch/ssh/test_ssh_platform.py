"""What is decided on this machine before a job goes to another one, and what its site file says there."""

import json
from pathlib import Path

import pytest
from paths import ROOT

from trainer.errors import JobError
from trainer.launch.platform import platform_of
from trainer.launch.ssh import mirror
from trainer.launch.ssh import platform as over_ssh
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
    for path in folder.glob("*.py"):
        (run.code / path.name).write_text(path.read_text())
    (run.plan / over_ssh.SITE).write_text(over_ssh._site_text(plan))
    write_json(run.platform, {"platform": "slurm", "site": str(where)})
    handle = {"ssh": "far", "name": "a", "accepted": False, "submission": "0" * 16, "run": str(run)}
    place = {"platform": "slurm", "site": str(where), "runs": "~/runs", "ssh_folder": "~/.muster"}
    write_json(run.handle, handle | place | {"environment": "python-" + "0" * 16})
    return run


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
    (run.code / "site.yaml").write_text(where.read_text())
    ignored = {"bin/ssh": (tmp_path / "bin/ssh").read_text()}
    for name, text in ignored.items():
        (run.code / name).parent.mkdir()
        (run.code / name).write_text(text)
        (run.code / name).chmod(0o755)
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
    text = over_ssh._site_text(make_plan(JOB, [], "slurm", site(tmp_path, "python: /p", "partition: a"))[1])
    assert json.loads(text)["partition"] == "a" and not {"ssh", "python", "runs"} & json.loads(text).keys()
    container = site(tmp_path, "python: /p", "runtime: apptainer", "image: /i")
    assert json.loads(over_ssh._site_text(make_plan(JOB, [], "slurm", container)[1]))["python"] == "/p"
