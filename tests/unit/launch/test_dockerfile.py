"""The Dockerfile that a project gets, and what one is made of, by which an image is up to date or not."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import documents
import pytest
from paths import ROOT

from trainer.config.job import Job
from trainer.errors import JobError
from trainer.launch import image as image_module
from trainer.launch.dockerfile import dockerfile, sources
from trainer.launch.image import make_image
from trainer.launch.image_inputs import look_at_inputs, of_base
from trainer.launch.kubernetes.manifests import render_manifests
from trainer.launch.kubernetes.platform import Kubernetes
from trainer.launch.kubernetes.site import KubernetesSite
from trainer.launch.platform import Plan
from trainer.launch.pushed import note_other_inputs, pushed, record_push
from trainer.run.folder import RunFolder
from trainer.run.tree_hash import hash_files, tree_hash

PYPROJECT = '[project]\nname = "flow"\ndependencies = ["einops>=0.7", "tqdm"]\n'


def installation(text: str) -> str:
    """What the shell of the build is told."""
    (run,) = re.findall(r"^RUN --mount=\S+ \\\n((?:.*\\\n)*.*)", text, re.MULTILINE)
    return str(run.replace("\\\n", " "))


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_project_that_needs_nothing(tmp_path: Path) -> None:
    assert dockerfile(tmp_path).splitlines()[-1] == "FROM muster"


def test_the_page_shows_it(tmp_path: Path) -> None:
    write(tmp_path, requirements_txt="numpy\n")
    (shown,) = documents.code(ROOT / "docs/docker.md", "dockerfile")
    assert dockerfile(tmp_path).endswith(shown)


def test_a_lock_comes_first(tmp_path: Path) -> None:
    for name, words in (
        ("pyproject.toml", "pip install --no-cache-dir --requirement /dev/stdin"),
        ("requirements.txt", "pip install --no-cache-dir --requirement requirements.txt"),
        ("pylock.toml", "pip install --no-cache-dir --requirement pylock.toml"),
        ("uv.lock", "uv export --quiet --frozen"),
    ):
        (tmp_path / name).write_text(PYPROJECT)
        text = dockerfile(tmp_path)
        assert words in installation(text) and name in sources(tmp_path, text)
        assert text.endswith("USER 10001:10001\n") and "USER root" in text


def test_the_list_of_pyproject(tmp_path: Path) -> None:
    write(tmp_path, pyproject_toml=PYPROJECT)
    words = shlex.split(installation(dockerfile(tmp_path)).partition(" | ")[0])
    in_310 = [*words[:2], f"import sys; sys.version_info = 3, 10; sys.modules['tomllib'] = None; {words[2]}"]
    for command in (words, in_310):
        done = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout == "einops>=0.7\ntqdm\n"


def test_requirements_with_others_in_them(tmp_path: Path) -> None:
    """Files that they include come along; folders of this machine do not, because the code comes with the run."""
    lines = "-r requirements.txt\n-r more/base.txt\n-c pins.txt\n-e .\n./lib\n--editable=libs/x\n.[dev]\n-e git+https://a.example/b\nnumpy\n.\n./wheels/a.whl\n"
    write(
        tmp_path,
        requirements_txt=lines,
        more__base_txt="tqdm\n",
        pins_txt="tqdm==4\n",
        wheels__a_whl="",
        pyproject_toml=PYPROJECT,
    )
    text = dockerfile(tmp_path)
    assert sources(tmp_path, text) == [
        "more/base.txt",
        "pins.txt",
        "pyproject.toml",
        "requirements.txt",
        "wheels/a.whl",
    ]
    copies = re.findall(r"^COPY (.*)", text, re.MULTILINE)
    assert "more/base.txt more/" in copies and "requirements.txt ./" in copies
    (edit,) = re.findall(r"^RUN (sed .*)", text, re.MULTILINE)
    subprocess.run(["sh", "-c", edit], cwd=tmp_path, check=True)
    kept = "-r requirements.txt\n-r more/base.txt\n-c pins.txt\n-e git+https://a.example/b\nnumpy\n./wheels/a.whl\n"
    assert (tmp_path / "requirements.txt").read_text() == kept
    assert "tomllib" in text and "--requirement requirements.txt" in text


@pytest.mark.parametrize(("text", "expected"), [
    ("FROM muster\nCOPY requirements.txt ./", ["requirements.txt"]),
    ("FROM muster\nCOPY --chown=1:1 \\\n  lib/ train.py /x/", ["lib/a.py", "lib/b.py", "train.py"]),
    ('FROM muster\nCOPY ["train.py", "x/"]\nADD https://a.example/x y', ["train.py"]),
    ("FROM muster AS one\nCOPY . .", ["lib/a.py", "lib/b.py", "requirements.txt", "train.py"]),
    ("FROM x AS one\nFROM muster\nCOPY --from=one /train.py .\nCOPY lib/*.py .", ["lib/a.py", "lib/b.py"]),
    ("FROM muster\nRUN --mount=source=lib,target=/x --mount=type=cache,target=/y a", ["lib/a.py", "lib/b.py"]),
    ("FROM muster\nRUN echo COPY train.py", []),
])  # fmt: skip
def test_what_an_image_is_made_of(tmp_path: Path, text: str, expected: list[str]) -> None:
    write(tmp_path, requirements_txt="", train_py="", lib__a_py="", lib__b_py="")
    assert sources(tmp_path, text) == expected


def test_a_hash_tells_names_contents_links_and_programs_apart(tmp_path: Path) -> None:
    write(tmp_path, a_py="a", b__c_py="c")
    (tmp_path / "link").symlink_to("a.py")
    seen = {tree_hash(tmp_path)}

    def differs() -> bool:
        before = len(seen)
        seen.add(tree_hash(tmp_path))
        return len(seen) > before

    assert not differs()
    (tmp_path / "a.py").chmod(0o600)
    assert not differs(), "who may read it differs between machines"
    (tmp_path / "a.py").chmod(0o755)
    assert differs()
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("b")
    assert differs()
    (tmp_path / "b/c.py").rename(tmp_path / "b/d.py")
    assert differs()
    (tmp_path / "a.py").write_text("b")
    assert differs()
    (tmp_path / "empty").mkdir()
    assert not differs()
    assert hash_files(tmp_path, ["b/d.py", "a.py", "link"]) in seen


def test_what_was_pushed_from_a_folder_is_known_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And that the image would be another one by now."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, requirements_txt="numpy\n")
    image, words = "registry.example/team/a:1", ["--secret", "id=x"]
    assert pushed(image) == image
    record_push(image, "registry.example/team/a@sha256:0", look_at_inputs(tmp_path, words).tag, words)
    record_push("registry.example/b", "registry.example/b@sha256:1", "0", [])
    assert pushed(image) == "registry.example/team/a@sha256:0"
    assert pushed("registry.example/c") == "registry.example/c"
    assert (tmp_path / ".muster/.gitignore").read_text() == "*\n"
    note_other_inputs(image)
    assert not capsys.readouterr().err
    write(tmp_path, requirements_txt="numpy\ntqdm\n")
    note_other_inputs.cache_clear()
    build = Kubernetes().build
    plan = Plan(Job(name="a"), "", RunFolder(tmp_path / "runs/a"), KubernetesSite(image=image, code="image"), None)
    assert "registry.example/team/a@sha256:0" in render_manifests(build(plan))
    build(plan)
    assert capsys.readouterr().err.count(f"note: {image} was pushed before") == 1


def test_only_the_project_is_built_by_options_for_its_dockerfile() -> None:
    kept = ["--secret", "id=x", "--build-arg=A=B", "--no-cache", "--network=host"]
    assert of_base(["--target", "dev", *kept[:2], "--file=X", *kept[2:], "-t", "a"]) == kept


@pytest.mark.parametrize(("image", "registry"), [
    ("team/a", "docker.io"), ("localhost/a", "localhost"), ("b:5000/a", "b:5000"), ("b.example/a", "b.example"),
])  # fmt: skip
def test_the_registry_to_log_in_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, registry: str) -> None:
    write(tmp_path, docker="#!/bin/sh\necho denied: requested access >&2\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(JobError, match=f"docker login {registry}$"):
        image_module._push(f"{image}:1", image)


@pytest.mark.parametrize(("image", "words", "problem"), [
    ("flowers", {"push": True}, "names no registry"), ("a.example/b@sha256:0", {}, "names a finished build"),
    ("flowers", {"on": "slurm"}, "must be one of docker, kubernetes"),
])  # fmt: skip
def test_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image: str, words: dict[str, object], problem: str
) -> None:
    write(tmp_path, k8s__site_yaml=f"image: {image}\n", docker__site_yaml=f"image: {image}\n")
    monkeypatch.chdir(tmp_path)
    asked = {"on": None, "site": None, "push": False, "words": [], **words}
    with pytest.raises(ValueError, match=problem):
        list(make_image(**asked))  # type: ignore[arg-type]
