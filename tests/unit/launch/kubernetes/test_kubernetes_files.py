"""Files on a claim: the pod that brings them, and code that arrives whole, once, or not at all."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from paths import ROOT

from trainer.errors import JobError
from trainer.launch.far_folder import CutOff, FarFolder
from trainer.launch.kubernetes.code import Code
from trainer.launch.kubernetes.files import give, pod_for_files
from trainer.run.folder import RunFolder

CODE = Code(random.Random(0).randbytes(3 << 20), Path("/code"))


def workload(name: str) -> dict[str, Any]:
    *_, found = yaml.safe_load_all((ROOT / f"k8s/examples/{name}.yaml").read_text())
    return found


def pod_spec(name: str) -> dict[str, Any]:
    spec = workload(name)["spec"]
    jobs = spec.get("replicatedJobs")
    return (jobs[0]["template"]["spec"] if jobs else spec)["template"]["spec"]


@pytest.mark.parametrize("name", ["gpu", "jobset", "kueue"])
def test_the_pod_for_files_may_do_what_those_of_the_run_may_and_no_more(name: str) -> None:
    pod, own = pod_for_files(workload(name)), pod_spec(name)
    kubernetes_validate.validate(pod, "1.36", strict=True)
    for key in ("securityContext", "automountServiceAccountToken", "enableServiceLinks", "tolerations"):
        assert pod["spec"][key] == own[key]
    assert pod["spec"].get("nodeSelector") == own.get("nodeSelector")
    [container], [agent] = pod["spec"]["containers"], own["containers"]
    assert (container["image"], container["securityContext"]) == (agent["image"], agent["securityContext"])
    assert [volume["persistentVolumeClaim"]["claimName"] for volume in pod["spec"]["volumes"]] == ["runs"]
    assert "env" not in container and "envFrom" not in container
    assert "app.kubernetes.io/instance" not in pod["metadata"]["labels"]  # it would count as a node of the run
    assert pod["spec"]["activeDeadlineSeconds"] <= 3600 and pod["spec"]["restartPolicy"] == "Never"


def test_without_a_claim_there_is_nothing_to_bring_files_from() -> None:
    with pytest.raises(JobError, match="claim=None: the run folder was lost with its pods"):
        pod_for_files(workload("digits"))


def on(folder: Path, most: int | None = None) -> FarFolder:
    """A folder of this machine, with a way there that ends after `most` bytes."""

    def command(words: list[str]) -> list[str]:
        plainly = [sys.executable, *words[1:]]
        block = 4096 if (most or 0) > 8000 else 1
        cut = f'dd bs={block} count={(most or 0) // block} status=none | "$0" "$@"'
        return plainly if most is None else ["bash", "-c", cut, *plainly]

    return FarFolder(str(folder), command)


def test_code_arrives_whole_and_once(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path / "digits-1"), RunFolder(tmp_path / "digits-2")
    give(on(first.path), CODE)
    assert first.code_archive.read_bytes() == CODE.packed
    assert first.code_archive.stat().st_mode & 0o777 == 0o444
    give(on(second.path, 8000), CODE)  # it is not sent again
    give(on(first.path, 8000), CODE)
    assert second.code_archive.stat().st_ino == first.code_archive.stat().st_ino
    first.code_archive.unlink()
    assert second.code_archive.read_bytes() == CODE.packed


@pytest.mark.parametrize("most", [100, 8000, 1 << 20, len(CODE.packed)])
def test_what_is_cut_off_leaves_nothing(tmp_path: Path, most: int) -> None:
    with pytest.raises(JobError) as caught:
        give(on(tmp_path / "digits-1", most), CODE)
    assert isinstance(caught.value, CutOff) or "did not arrive whole" in str(caught.value)
    end = time.monotonic() + 10  # the program there notices it by itself
    while any(path.is_file() for path in tmp_path.rglob("*")) and time.monotonic() < end:
        time.sleep(0.05)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_other_code_of_the_same_size_is_not_taken_for_it(tmp_path: Path) -> None:
    other = RunFolder(tmp_path / "digits-1").code_archive
    other.parent.mkdir()
    content = bytearray(CODE.packed)
    content[5000] ^= 1
    other.write_bytes(content)
    give(on(tmp_path / "digits-2"), CODE)
    assert RunFolder(tmp_path / "digits-2").code_archive.read_bytes() == CODE.packed


def test_what_cannot_be_written_there_is_said(tmp_path: Path) -> None:
    (tmp_path / "digits-1").write_text("a file")
    with pytest.raises(JobError, match=r"claim=.*digits-1.*File exists"):
        give(on(tmp_path / "digits-1"), CODE)
