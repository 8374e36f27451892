"""What goes over ssh, and what comes back: parcels, records, the first program on the other side, what ssh says."""

import base64
import gzip
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from trainer.errors import FAILED, WRONG_JOB, JobError
from trainer.launch.ssh import connection, environment, mirror, packages, parcel, session, submission
from trainer.run.event_files import own_file
from trainer.run.folder import RunFolder

BOOTSTRAP = session.BOOTSTRAP.read_text()
NONCE = "00ff"


def bootstrap(folder: Path, text: str = BOOTSTRAP, given: bool = True) -> list[dict[str, object]]:
    """What it says on a machine that has nothing yet, to somebody who sends Muster."""
    asked = {"nonce": NONCE, "folder": str(folder), "muster": parcel.pack_muster().name, "given": given,
             "environment": "none"}  # fmt: skip
    words = base64.b64encode(json.dumps(asked).encode()).decode()
    content = parcel.pack_muster().packed
    command = [sys.executable, "-I", "-c", text, words]
    done = subprocess.run(command, input=b"%d\n" % len(content) + content, capture_output=True, timeout=60)
    mark = f"@muster-{NONCE}@".encode()
    return [json.loads(line[len(mark) :]) for line in done.stdout.split(b"\n") if line.startswith(mark)]


def test_equal_files_make_equal_parcels(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name / "package"
        folder.mkdir(parents=True)
        (folder / "a.py").write_text("1")
        (folder / "link").symlink_to("a.py")
        os.utime(folder / "a.py", (0, hash(name) % 1000))
    one, two = (parcel.pack_folder(tmp_path / name) for name in ("one", "two"))
    assert one == two
    (tmp_path / "two/package/a.py").chmod(0o755)
    assert parcel.pack_folder(tmp_path / "two").name != one.name


def test_muster_arrives_whole_and_answers(tmp_path: Path) -> None:
    """With templates and the metadata of a distribution, from a folder that nobody had made."""
    said = bootstrap(tmp_path / "new")
    assert said == [{"need": "muster"}, {"ready": True}]
    [place] = (tmp_path / "new").glob("muster-*")
    assert (place / "slurm/job.sbatch").exists() or (place / "trainer/templates/slurm/job.sbatch").exists()
    assert list(place.glob("*.dist-info/entry_points.txt"))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(("old", "new", "error"), [
    ("OLDEST = (3, 10)", "OLDEST = (9, 0)", "python"),
    ('content).hexdigest()[:16]', 'content).hexdigest()[1:17]', "muster"),
])  # fmt: skip
def test_a_machine_that_cannot_says_why(tmp_path: Path, old: str, new: str, error: str) -> None:
    assert old in BOOTSTRAP
    assert bootstrap(tmp_path / "new", BOOTSTRAP.replace(old, new))[-1]["error"] == error
    assert error in session.REMEDIES


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert bootstrap(tmp_path)[-1]["error"] == "folder"
    assert bootstrap(Path("/dev/null/x"))[-1]["error"] == "system"


def test_records_come_as_they_grow(tmp_path: Path) -> None:
    there, here = (RunFolder(tmp_path / name) for name in ("there", "here"))
    for run in (there, here):
        run.make()
        run.events.mkdir()
    event, local = there.events / "launch-far-1.jsonl", own_file(there.events).name
    event.write_text('{"a": 1}\n{"b"')
    (there.events / local).write_text("theirs\n")
    there.failure.write_text("1")
    there.node_log(0).write_text("one\n")
    there.rank_log(2).write_text("two\n")
    (here.events / local).write_text("ours\n")

    def bring(logs: bool = False) -> list[str]:
        answer = json.loads(json.dumps(mirror.collect(there, mirror.have(here, logs), logs)))
        mirror.apply(here, answer)
        return sorted(answer["files"])

    assert set(bring()) == {f"events/{local}", "events/launch-far-1.jsonl", "failure.json", "logs/node-0.log"}
    assert bring() == []
    event.write_text('{"a": 1}\n{"b": 2}\n')
    there.failure.unlink()
    assert bring(logs=True) == ["events/launch-far-1.jsonl", "logs/rank-2.log"]
    assert (here.events / event.name).read_bytes() == event.read_bytes()
    assert (here.events / event.name).stat().st_mtime_ns == event.stat().st_mtime_ns
    assert not here.failure.exists() and (here.events / local).read_text() == "ours\n"
    event.write_text("anew\n")
    bring()
    assert (here.events / event.name).read_text() == "anew\n"


def test_much_comes_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = (RunFolder(tmp_path / name) for name in ("there", "here"))
    for run in (there, here):
        run.make()
    there.node_log(0).write_bytes(os.urandom(1000))
    monkeypatch.setattr(mirror, "PART", 300)
    answers = []
    while not answers or answers[-1]["more"]:
        answers.append(mirror.collect(there, mirror.have(here, False), False))
        mirror.apply(here, answers[-1])
    assert len(answers) == 4 and here.node_log(0).read_bytes() == there.node_log(0).read_bytes()


@pytest.mark.parametrize("name", [
    "../x", "plan/platform.json", "logs/../job.yaml", "job.yaml", "/etc/x", "code/a.json", "handle.json", "sweep.json",
])  # fmt: skip
def test_the_other_side_writes_nothing_but_records(tmp_path: Path, name: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.make()
    part = {"begin": 0, "data": "", "changed_ns": 0}
    with pytest.raises(JobError, match="is not a file of a run"):
        mirror.apply(run, {"files": {name: part}, "gone": []})


def test_the_other_side_decides_on_no_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of zeros is a kilobyte on the way, and a hole costs nothing there."""
    run = RunFolder(tmp_path / "run")
    run.make()
    monkeypatch.setattr(mirror, "PART", 1000)
    part = {"begin": 0, "data": base64.b64encode(zlib.compress(bytes(1 << 20))).decode(), "changed_ns": 0}
    mirror.apply(run, {"files": {"logs/node-0.log": part, "logs/node-1.log": part | {"begin": 1 << 40}}, "gone": []})
    assert run.node_log(0).stat().st_size == 1000 and not run.node_log(1).exists()


def test_code_that_is_not_what_it_is_called_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="another hash"):
        submission.keep_code(tmp_path, "0" * 16, gzip.compress(b"something"))
    assert not list(tmp_path.rglob("*.tar.gz"))


def test_an_environment_is_made_once_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """By a pip that fails the first time, and writes down what it is asked."""
    place, asked = tmp_path / "env", tmp_path / "asked"
    python = place / "bin/python"
    python.parent.mkdir(parents=True)
    (place / "bin/pip").touch()
    python.write_text(f'#!/bin/sh\necho "$@" >>{asked}\necho Collecting it\necho "ERROR: no index"; exit 1\n')
    python.chmod(0o755)
    said: list[dict[str, str]] = []
    wanted = {"locked.txt": "a==1 --hash=sha256:0\n", "others.txt": "b\n"}
    with pytest.raises(SystemExit):
        environment.make_environment(str(place), wanted, lambda **answer: said.append(answer))
    assert {"note": "Collecting it"} in said and "ERROR: no index" in said[-1]["text"]
    assert said[-1]["error"] in session.REMEDIES and not (place / environment.COMPLETE).exists()
    python.write_text(python.read_text().replace("exit 1", "exit 0"))
    environment.make_environment(str(place), wanted, lambda **answer: None)
    assert "--require-hashes" in asked.read_text() and (place / environment.COMPLETE).exists()
    python.unlink()
    environment.make_environment(str(place), wanted, lambda **answer: None)


def test_an_environment_has_what_the_image_has_and_what_the_project_lists(tmp_path: Path) -> None:
    (tmp_path / "requirements.txt").write_text("einops\n")
    wanted = packages.requirements(tmp_path, False)
    assert (
        "omegaconf==" in wanted["locked.txt"]
        and "--hash" in wanted["locked.txt"]
        and "pip==" not in wanted["locked.txt"]
    )
    assert wanted["others.txt"].startswith("torch==") and "einops" in wanted["others.txt"]
    few = packages.requirements(tmp_path, True)
    assert {line.split("==")[0] for line in few["locked.txt"].splitlines() if line[0] != " "} == set(
        packages.LAUNCH_ONLY
    )
    assert packages.environment_name(few) != packages.environment_name(wanted)
    (tmp_path / "requirements.txt").write_text("-e .\n-r more.txt\ntorch==2.11.0\n")
    (tmp_path / "more.txt").write_text("tqdm>=4\n")
    assert packages.requirements(tmp_path, False)["others.txt"] == "tqdm>=4\ntorch==2.11.0\n"
    (tmp_path / "requirements.txt").unlink()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "a"\nversion = "1"\ndependencies = ["torchvision"]\n')
    assert "torch==" in (text := packages.requirements(tmp_path, False)["others.txt"]) and "torchvision" in text
    (tmp_path / "pyproject.toml").write_text("[")
    with pytest.raises(JobError, match=r"pyproject\.toml cannot be read"):
        packages.requirements(tmp_path, False)


def test_what_a_list_includes_is_read_as_pip_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constraints install nothing; lists at an address, or that include themselves, are none of our files to read."""
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "requirements.txt": "numpy\n-r deep/more.txt\n-c pins.txt\n-r https://a.example/base.txt\n",
        "deep/more.txt": "-r ../requirements.txt\ntqdm\n", "pins.txt": "torch==2.11.0\n-r deep/pins.txt\n",
        "deep/pins.txt": "numpy==1.26\n", "docker/lock.txt": "flask==3.0\n",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    wanted = packages.requirements(tmp_path, False)
    assert wanted["others.txt"] == "-c constraints.txt\ntorch\nnumpy\ntqdm\n-r https://a.example/base.txt\n"
    assert wanted["constraints.txt"] == "torch==2.11.0\nnumpy==1.26\n"
    assert "flask" not in wanted["locked.txt"], "a lock file of the project's is not Muster's"
    (tmp_path / "deep/pins.txt").unlink()
    with pytest.raises(JobError, match=r"include deep/pins\.txt, which is not in"):
        packages.requirements(tmp_path, False)


@pytest.mark.parametrize(("said", "code", "words"), [
    ("@ REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.", WRONG_JOB, "another host key"),
    ("ssh: connect to host a port 22: Connection timed out", FAILED, "cannot be reached"),
    ("ssh: Could not resolve hostname a: Name or service not known", FAILED, "not a host that this machine knows"),
    ("config: line 3: Bad configuration option: x\nterminating, 1 bad configuration options", WRONG_JOB, "refuses"),
    ("me@a: Permission denied (publickey,keyboard-interactive).", WRONG_JOB, "does not let you in"),
    ("", FAILED, "no reason"),
])  # fmt: skip
def test_what_ssh_says_becomes_one_line(
    said: str, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an ssh that says so: the true one is asked in the tests of the cluster."""
    program = tmp_path / "ssh"
    program.write_text(f"#!/bin/sh\ncase \"$*\" in *-G*) exit 0;; esac\ncat >&2 <<'END'\n{said}\nEND\nexit 255\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(JobError) as caught:
        connection.Connection("a").open()
    assert words in str(caught.value) and "\n" not in str(caught.value) and caught.value.code == code
    assert "BatchMode" not in str(caught.value)
