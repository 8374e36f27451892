"""Fixtures of the slurm tier: one real cluster for all files but those with their own, put in order between tests.

Where none can run, every test that asks for one is skipped with the reason and the remedy.
"""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import slurm_packages
from paths import ROOT
from slurm_cluster import Cluster
from slurm_runs import Run, uninterrupted


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    """What a cluster is made of. MUSTER_INSTALL=1 lets it install Debian packages first, as root."""
    try:
        slurm_packages.ensure(install=os.environ.get("MUSTER_INSTALL") == "1")
    except slurm_packages.Unavailable as reason:
        pytest.skip(f"no Slurm cluster: {reason}")


@pytest.fixture(scope="session")
def slurm_session(slurm_programs: None) -> Iterator[Cluster]:
    """The cluster of this session."""
    with Cluster(shared=[ROOT]) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def reference(slurm_programs: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What tests/support/slow.yaml trains when nothing interrupts it."""
    return uninterrupted(tmp_path_factory.mktemp("reference"))


@pytest.fixture
def slurm(slurm_session: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster for one test, idle; sbatch and the others are on PATH."""
    monkeypatch.setenv("PATH", slurm_session.path)
    yield slurm_session
    try:
        slurm_session.reset()
    except Exception:  # the other tests get a new one
        slurm_session.stop()
        slurm_session.start()
        raise


@pytest.fixture
def shared_path(slurm_session: Cluster, request: pytest.FixtureRequest) -> Path:
    """An empty folder of this test, which the submitting machine and every host see under the same path."""
    name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name)
    path = slurm_session.session / f"{name}-{len(list(slurm_session.session.iterdir()))}"
    path.mkdir()
    return path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the cluster's state and the jobs' logs to the report of a test that failed."""
    report = yield
    fixtures = getattr(item, "funcargs", {})
    if report.failed and report.when == "call" and "slurm" in fixtures:
        report.sections.append(("Slurm", fixtures["slurm"].describe()))
        for log in sorted(fixtures["shared_path"].rglob("*.out")) if "shared_path" in fixtures else ():
            report.sections.append((str(log), log.read_text(errors="replace")[-4000:]))
    return report
