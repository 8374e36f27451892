"""Files to a claim and from it, through the real kubectl: who asks for which pod, when, and what becomes of it.

The API server in memory has no nodes: a pod is ready when it is asked for, and what is run in it runs here, with a
folder of this machine as the claim.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_api_server import Cluster
from kubernetes_runs import put_pod

from trainer.errors import JobError
from trainer.launch.pull import pull
from trainer.launch.submit import submit_job
from trainer.run.folder import RunFolder


@pytest.fixture
def claim(cluster: Cluster, tmp_path: Path) -> Iterator[Path]:
    """The folder that stands for the claim."""
    folder = tmp_path / "claim"
    folder.mkdir()

    def execute(pod: str, container: str, argv: list[str]) -> subprocess.Popen[bytes]:
        assert container == "agent" and argv[0] == "python3"
        assert ("pods", pod) in cluster.objects
        words = [sys.executable, *(word.replace("/runs", str(folder), word.startswith("/runs")) for word in argv[1:])]
        pipe = subprocess.PIPE
        return subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe)

    cluster.execute = execute
    ended = threading.Event()

    def start_pods() -> None:
        while not ended.wait(0.05):
            with cluster.change:
                for pod in cluster.select("pods", {}):
                    if pod["status"] == {"phase": "Pending"}:
                        ready = {"type": "Ready", "status": "True"}
                        pod["status"] = {"phase": "Running", "conditions": [ready], "containerStatuses": []}
                        cluster.changed(pod)
                    elif pod["metadata"].get("deletionTimestamp"):
                        cluster.remove("pods", pod["metadata"]["name"])

    thread = threading.Thread(target=start_pods)
    thread.start()
    yield folder
    ended.set()
    thread.join()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "job.yaml").write_text("name: mine\ntask: my_task:Mine\nnodes: 2\ndevices_per_node: 1\ndevice: cpu\n")
    (folder / "my_task.py").write_text("class Mine:\n    pass\n")
    monkeypatch.chdir(folder)
    return folder


def submit(project: Path, site: Path) -> RunFolder:
    return submit_job("job.yaml", [f"runs={project.parent / 'runs'}"], "kubernetes", site)


def enlarge(project: Path) -> None:
    for part in range(4):
        (project / f"table-{part}.txt").write_bytes(random.Random(part).randbytes(900 << 10))


def files_pods(cluster: Cluster) -> list[str]:
    return [request for request in cluster.requests if "pods" in request and "-files" in request]


def test_small_code_needs_no_pod_of_its_own(cluster: Cluster, claim: Path, project: Path, site: Path) -> None:
    run = submit(project, site)
    assert files_pods(cluster) == [] and list(claim.iterdir()) == []
    maps = [found for (kind, name), found in cluster.objects.items() if kind == "configmaps"]
    assert sorted(found["metadata"]["name"] == run.name for found in maps) == [False, True]
    assert all(found["metadata"]["ownerReferences"][0]["name"] == run.name for found in maps)


def test_large_code_is_on_the_claim_before_the_job_is_made(
    cluster: Cluster, claim: Path, project: Path, site: Path
) -> None:
    enlarge(project)
    run = submit(project, site)
    assert (claim / run.name / "code.tar.gz").stat().st_size > 3 << 20
    asked = [request.split(" ?")[0] for request in cluster.requests]
    made = next(index for index, request in enumerate(asked) if request.startswith(f"POST pods {run.name}-files"))
    jobs = [index for index, line in enumerate(asked) if line.startswith("POST jobs") and "dryRun" not in line]
    assert made < jobs[0]
    assert any(request.startswith(f"DELETE pods {run.name}-files") for request in asked)
    assert not (claim / run.name / ".code.tar.gz").exists()


def test_a_claim_that_cannot_be_written_is_said_and_leaves_nothing(
    cluster: Cluster, claim: Path, project: Path, site: Path
) -> None:
    enlarge(project)
    claim.rmdir()
    claim.write_text("no folder")
    with pytest.raises(JobError, match=r"claim=.*cannot be brought to the claim"):
        submit(project, site)
    assert [key for key in cluster.objects if key[0] != "pods"] == []
    assert list((project.parent / "runs").glob("mine-*")) == []


def test_results_come_through_a_pod_of_the_run_or_one_of_their_own(
    cluster: Cluster, claim: Path, project: Path, site: Path
) -> None:
    run = submit(project, site)
    far = RunFolder(claim / run.name)
    far.logs.mkdir(parents=True)
    (far.logs / "rank-0.log").write_text("hello\n")
    running = {"phase": "Running", "containerStatuses": [{"name": "agent", "state": {"running": {}}}]}
    pod = put_pod(cluster, run.path, 0, "aaaaa", **running)
    assert "logs  1 files" in pull(str(run), None)
    assert files_pods(cluster) == []
    cluster.remove("pods", pod["metadata"]["name"])
    (far.logs / "rank-0.log").write_text("hello\nagain\n")
    far.metrics.write_bytes(random.Random(0).randbytes(1 << 20))
    assert "metrics.jsonl  1 files  1.0 MB" in pull(str(run), None)
    assert (run.logs / "rank-0.log").read_text() == "hello\nagain\n"
    assert run.metrics.read_bytes() == far.metrics.read_bytes()
    assert len([request for request in files_pods(cluster) if request.startswith("POST")]) == 1


def test_without_a_claim_there_is_nothing_to_pull(cluster: Cluster, claim: Path, project: Path, site: Path) -> None:
    site.write_text("")
    run = submit(project, site)
    with pytest.raises(JobError, match="the run folder was lost with its pods"):
        pull(str(run), None)
