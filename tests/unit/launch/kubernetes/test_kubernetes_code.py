"""The user's code in manifests: which, equal for equal trees, within the API's limits; and how pods unpack it."""

from __future__ import annotations

import base64
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pod_rules  # noqa: F401  adds its rules
import pytest
import yaml
from manifest_rules import Manifest, only, pod_spec, problems
from paths import ROOT

from trainer.errors import JobError
from trainer.launch.kubernetes import code, unpack
from trainer.launch.kubernetes.platform import Kubernetes
from trainer.launch.kubernetes.site import KubernetesSite
from trainer.launch.submit import make_plan, render_job
from trainer.records import write_json
from trainer.run.folder import RunFolder


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own, with a job file that does not lie at its top."""
    folder = tmp_path / "project"
    for name, text in {
        "jobs/mine.yaml": "name: mine\ntask: my_task:Mine\nnodes: 2\n", "jobs/my_task.py": "class Mine:\n    pass\n",
        "src/part.py": "VALUE = 1\n", "start.sh": "#!/bin/sh\n", ".env": "SECRET=hush\n", "runs/one.pt": "weights",
    }.items():  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "start.sh").chmod(0o755)
    (folder / "link.py").symlink_to("src/part.py")
    monkeypatch.chdir(folder)
    return folder


def render(site: Path | None = None, job: str = "jobs/mine.yaml") -> list[Manifest]:
    return list(yaml.safe_load_all(render_job(job, ["devices_per_node=1"], "kubernetes", site)))


def site_with(folder: Path, *lines: str) -> Path:
    path = folder.parent / "site.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def run_step(documents: list[Manifest], folder: Path) -> subprocess.CompletedProcess[str]:
    """What the pod's first container does, with its volumes below `folder`."""
    config = only(documents, "ConfigMap")["data"]
    for item in pod_spec(documents)["volumes"][0]["configMap"]["items"]:
        path = folder / "etc/muster" / item["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(config[item["key"]])
    for document in documents:
        for key, value in document.get("binaryData", {}).items():
            (folder / "archive").mkdir(exist_ok=True)
            (folder / "archive" / key).write_bytes(base64.b64decode(value))
    (folder / "code").mkdir(exist_ok=True)
    [step] = pod_spec(documents)["initContainers"]
    _, *words = [f"{folder}{word}" if word.startswith("/") else word for word in step["command"]]
    return subprocess.run([sys.executable, *words], capture_output=True, text=True)


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_the_code_of_a_project_goes_with_its_job(project: Path, tmp_path: Path, kind: str) -> None:
    documents = render(site_with(project, f"kind: {kind}", "claim: runs"))
    assert problems(documents) == []
    for document in documents:
        if document["kind"] != "JobSet":
            kubernetes_validate.validate(document, "1.36", strict=True)
    volumes = tmp_path / "volumes"
    done = run_step(documents, volumes)
    assert done.returncode == 0, done.stderr
    found = volumes / "code"
    files = {str(path.relative_to(found)): path.read_text() for path in found.rglob("*") if path.is_file()}
    expected = ["jobs/mine.yaml", "jobs/my_task.py", "link.py", "src/part.py", "start.sh"]
    assert sorted(files) == expected
    assert all(files[name] == (project / name).read_text() for name in expected)
    assert os.readlink(found / "link.py") == "src/part.py"
    modes = [(found / name).stat().st_mode & 0o777 for name in ("start.sh", "src/part.py")]
    assert modes == [0o555, 0o444]
    source = RunFolder(volumes / "etc/muster").source.read_text()
    assert yaml.safe_load(source) == {"working_directory": "/code", "job_folder": "/code/jobs"}


def test_equal_trees_are_equal_whenever_and_wherever(project: Path) -> None:
    before = render()
    for path in project.rglob("*.py"):
        os.utime(path, (1, 1))
    (project / "src").rename(project / "other")
    (project / "other").rename(project / "src")
    assert render() == before
    (project / "src/part.py").write_text("VALUE = 2\n")
    after = render()
    names = [[each["metadata"]["name"] for each in documents if "binaryData" in each] for documents in (before, after)]
    assert len(names[0]) == len(names[1]) == 1 and names[0] != names[1]


def test_what_was_changed_on_its_way_is_not_unpacked(project: Path, tmp_path: Path) -> None:
    documents = render()
    [part] = (each for each in documents if "binaryData" in each)
    key, value = next(iter(part["binaryData"].items()))
    other = code.Code(b"another tar", Path("/code")).packed
    for content in (base64.b64decode(value)[:-9], other, b""):
        part["binaryData"][key] = base64.b64encode(content).decode()
        done = run_step(documents, tmp_path)
        assert done.returncode == 64
        assert "is not what was submitted" in done.stderr and "Traceback" not in done.stderr
        assert list((tmp_path / "code").iterdir()) == []


def test_what_is_not_there_is_said_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(unpack, "LATE_S", 0)
    with pytest.raises(SystemExit) as ended:
        unpack.main("0" * 64, str(tmp_path), "/runs/x/code.tar.gz")
    assert ended.value.code == 64 and "/runs/x/code.tar.gz" in capsys.readouterr().err


def test_a_step_that_begins_again_leaves_nothing_of_the_first(project: Path, tmp_path: Path) -> None:
    documents = render()
    for name in ("code/src/gone.py", "code/start.sh/file"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    assert run_step(documents, tmp_path).returncode == 0
    assert not (tmp_path / "code/src/gone.py").exists() and (tmp_path / "code/start.sh").is_file()


def test_large_code_is_in_several_maps_that_apply_takes(project: Path, tmp_path: Path) -> None:
    (project / "table.txt").write_bytes(random.Random(0).randbytes(400 << 10))
    documents = render()
    assert problems(documents) == []
    assert len([each for each in documents if "binaryData" in each]) == 3
    assert run_step(documents, tmp_path).returncode == 0
    assert (tmp_path / "code/table.txt").read_bytes() == (project / "table.txt").read_bytes()


def test_what_does_not_fit_is_refused_with_what_to_do(project: Path) -> None:
    (project / "table.txt").write_bytes(random.Random(0).randbytes(1000 << 10))
    with pytest.raises(JobError) as caught:
        render()
    for word in ("code=", str(project), "ConfigMaps take 900", "table.txt (1000 KiB)", "Name a claim"):
        assert word in str(caught.value)
    with pytest.raises(JobError, match="Use `muster submit`, which brings it to the claim"):
        render(site_with(project, "claim: runs"))
    assert "initContainers" not in pod_spec(render(site_with(project, "code: image")))


def test_the_image_keeps_its_own_code(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the site says so; and in Muster's own tree, which its image is made of."""
    text = render_job("jobs/mine.yaml", [], "kubernetes", site_with(project, "code: image"))
    assert "/code" not in text and "archive" not in text and "unpack" not in text
    monkeypatch.chdir(ROOT)
    assert "unpack" not in render_job("jobs/digits.yaml", [], "kubernetes", None)


def test_a_run_keeps_the_code_that_it_began_with(project: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    assert code.travels(KubernetesSite(), run)
    write_json(run.handle, {"platform": "kubernetes"})
    assert not code.travels(KubernetesSite(), run)
    assert code.travels(KubernetesSite(code="snapshot"), run)
    run.code.mkdir()
    assert code.travels(KubernetesSite(), run) and not code.travels(KubernetesSite(code="image"), run)


def test_the_runs_of_a_sweep_have_the_same_code(project: Path, tmp_path: Path) -> None:
    """Though it is edited while they are submitted."""
    sweep = RunFolder.create(str(tmp_path / "runs"), "mine-sweep", "")
    hashes = set()
    for value in (1, 2):
        (project / "src/part.py").write_text(f"VALUE = {value}\n")
        run = RunFolder.create(
            str(tmp_path / "runs"), "mine", (project / "jobs/mine.yaml").read_text(), project / "jobs"
        )
        write_json(run.part_of, {"sweep": str(sweep)})
        plan = replace(make_plan("jobs/mine.yaml", [], "kubernetes", None)[1], run=run)
        Kubernetes().take_code(plan)
        packed = code.pack_code(plan)
        assert packed and packed.folder == Path("/code/jobs")
        hashes.add(packed.sha256)
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("job", "site", "words"),
    [
        ("script: train.py\n", "", ["script='train.py'", "is not in"]),
        ("task: my_task:Mine\n", "code: everywhere", ["code='everywhere'", "auto, snapshot, image"]),
        ("task: my_task:Mine\n", "claim: x\nmounts: ['data:/code']", ["mounts=", "Muster itself uses /code"]),
    ],
)
def test_what_cannot_run_is_refused(project: Path, job: str, site: str, words: list[str]) -> None:
    (project / "jobs/mine.yaml").write_text(f"name: mine\n{job}")
    with pytest.raises(JobError) as caught:
        render(site_with(project, site))
    for word in words:
        assert word in str(caught.value)


def test_templates_from_before_are_refused(project: Path) -> None:
    (project / "k8s").mkdir()
    pod: dict[str, Any] = yaml.safe_load((ROOT / "k8s/pod.yaml").read_text())
    del pod["template"]["spec"]["initContainers"]
    (project / "k8s/pod.yaml").write_text(yaml.safe_dump(pod))
    with pytest.raises(JobError, match=r"k8s/pod\.yaml='initContainers'.*code: image"):
        render()
