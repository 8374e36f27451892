"""What `muster init` writes into projects of several kinds, and what it leaves alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from trainer.config.load import merge_job, to_job
from trainer.errors import JobError
from trainer.launch.docker.platform import DockerSite
from trainer.launch.init import TEXTS, init
from trainer.launch.kubernetes.site import KubernetesSite
from trainer.launch.site import read_site
from trainer.launch.slurm.platform import SlurmSite
from trainer.launch.source_files import SECRET


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "My Flowers!"
    folder.mkdir()
    monkeypatch.chdir(folder)
    said = init(Path(), None)
    found = files(folder)
    assert sorted(found) == sorted([
        ".dockerignore", ".gitignore", "Dockerfile", "Makefile", "docker/site.yaml", "job.yaml", "k8s/site.yaml",
        "slurm/site.yaml", "training.py",
    ])  # fmt: skip
    assert all(any(name in line for line in said) for name in found)
    assert said[-1] == "Edit training.py first, then job.yaml. Try it: muster run job.yaml"
    job = to_job(merge_job(Path("job.yaml")))
    assert job.name == "my-flowers" and job.task == "training:Training"
    for name, kind in (("slurm", SlurmSite), ("docker", DockerSite), ("k8s", KubernetesSite)):
        read_site(None, name, kind)  # each key is one
    assert "$" not in found["job.yaml"] + found["docker/site.yaml"] + found["k8s/site.yaml"]
    assert "$(MUSTER) run $(JOB)" in found["Makefile"]

    init(Path(), None)
    assert files(folder) == found


def test_what_is_there_stays(tmp_path: Path) -> None:
    mine = {name: f"mine: {name}\n" for name in ("Makefile", "Dockerfile", "train.py", "slurm/site.yaml")}
    mine |= {".gitignore": "*.pt\nruns", "requirements.txt": "numpy\n"}
    for name, text in mine.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    said = init(tmp_path, "train.py")
    found = files(tmp_path)
    assert {name: found[name] for name in mine} == mine
    assert yaml.safe_load(found["job.yaml"])["script"] == "train.py"
    assert "docker-run:" in found["muster.mk"] and any("include muster.mk" in line for line in said)
    assert said[-1].endswith(f"cd {tmp_path} && muster run job.yaml")
    (tmp_path / "my flowers").mkdir()
    assert init(tmp_path / "my flowers", None)[-1].endswith(f"cd '{tmp_path}/my flowers' && muster run job.yaml")


def ignored(name: str, lines: list[str]) -> bool:
    """Whether Docker leaves a file out: the last line counts that matches it or a folder around it."""
    found = False
    for line in lines:
        pattern = re.escape(line.lstrip("!")).replace(r"\*\*/", "(.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
        if not line.startswith("#") and re.fullmatch(f"{pattern}(/.*)?", name):
            found = not line.startswith("!")
    return found


def test_no_secret_gets_into_the_image(tmp_path: Path) -> None:
    """As snapshots of the code leave the same files behind."""
    init(tmp_path, None)
    lines = (tmp_path / ".dockerignore").read_text().splitlines()
    endings = ("pem", "key", "p12", "pfx", "jks", "keystore", "kdbx")
    secrets = [".env", ".env.local", *(f"server.{ending}" for ending in endings), "id_rsa", "id_dsa.pub", "id_ecdsa",
               "id_ed25519.old", ".netrc", "_netrc", ".git-credentials", ".pypirc", ".pgpass", ".htpasswd",
               "kubeconfig", "credentials", "credentials.json", "credentials-prod", "secret.yaml", "secrets.toml",
               ".docker/config.json", ".aws/config", ".ssh/x", ".gnupg/x", ".kube/config"]  # fmt: skip
    code = [
        "train.py",
        ".env.example",
        "credentials.py",
        "keys.py",
        "secrets.py",
        "environment.yml",
        "credentials/a.py",
    ]
    for folder in ("", "a/b/"):
        assert [name for name in secrets if not SECRET.fullmatch(folder + name)] == []
        assert [name for name in secrets if not ignored(folder + name, lines)] == []
        assert [name for name in code if SECRET.fullmatch(folder + name) or ignored(folder + name, lines)] == []
    for name in ("runs/x/job.yaml", ".venv/lib/credentials.py", "a/credentials/__pycache__/a.pyc"):
        assert ignored(name, lines)


@pytest.mark.parametrize(("lines", "lacks"), [
    ("runs\n.git\n.venv\n**/__pycache__\n", "lacks **/credentials*, **/secret.*, "), ("*\n!src\n", ""),
])  # fmt: skip
def test_what_a_list_for_docker_lacks_is_said(tmp_path: Path, lines: str, lacks: str) -> None:
    (tmp_path / ".dockerignore").write_text(lines)
    said = [line for line in init(tmp_path, None) if line.startswith("NOTE   .dockerignore")]
    assert (tmp_path / ".dockerignore").read_text() == lines
    assert lacks in said[0] if lacks else not said
    with (tmp_path / ".dockerignore").open("a") as file:
        file.write((TEXTS / "dockerignore").read_text())
    assert not any("NOTE   .dockerignore" in line for line in init(tmp_path, None))


def test_a_job_that_runs_something_else_is_named(tmp_path: Path) -> None:
    init(tmp_path, None)
    assert any("job.yaml was there and runs something else" in line for line in init(tmp_path, "other.py"))


@pytest.mark.parametrize(("layout", "stub", "task"), [
    ("src/flow/__init__.py", "src/flow/training.py", "flow.training:Training"),
    ("src/notes.txt", "src/training.py", "training:Training"),
    ("flow/__init__.py", "training.py", "training:Training"),
])  # fmt: skip
def test_the_task_lies_where_it_is_found(tmp_path: Path, layout: str, stub: str, task: str) -> None:
    (tmp_path / layout).parent.mkdir(parents=True)
    (tmp_path / layout).touch()
    init(tmp_path, None)
    assert (tmp_path / stub).exists() and yaml.safe_load((tmp_path / "job.yaml").read_text())["task"] == task


@pytest.mark.parametrize(("text", "is_named"), [
    ("[tool.poetry.dependencies]\neinops = '*'\n", True), ("[project]\ndynamic = ['dependencies']\n", True),
    ("[project]\ndependencies = []\n", False), ("[tool.ruff]\n", False),
])  # fmt: skip
def test_packages_that_pyproject_lists_elsewhere_are_named(tmp_path: Path, text: str, is_named: bool) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    assert any("pyproject.toml is not read for packages" in line for line in init(tmp_path, None)) == is_named
    assert ("RUN" in (tmp_path / "Dockerfile").read_text()) == ("\ndependencies" in text)


def test_what_is_not_read_is_named(tmp_path: Path) -> None:
    for name in ("environment.yml", "trainer.py"):
        (tmp_path / name).touch()
    said = "\n".join(init(tmp_path, None))
    assert "environment.yml is not read for packages" in said and "your own module trainer" in said


@pytest.mark.parametrize(("folder", "script", "word"), [
    ("nowhere", None, "there is no such folder"), ("", "../train.py", "no Python file of the project"),
    ("", "train.sh", "no Python file of the project"),
])  # fmt: skip
def test_mistakes(tmp_path: Path, folder: str, script: str | None, word: str) -> None:
    with pytest.raises(JobError, match=word):
        init(tmp_path / folder, script)
    assert not files(tmp_path)


def test_what_is_written_is_python(tmp_path: Path) -> None:
    init(tmp_path, "train.py")
    ast.parse((tmp_path / "train.py").read_text())
