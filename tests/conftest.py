"""What holds in every tier: tests that must not skip, and which tests share a worker.

A tier is a folder of tests/. MUSTER_REQUIRED_TIERS, which .ci/run sets, names those in which a skipped test is a
failure, separated by commas. Only a test that "needs root" may skip there, for somebody who is not root.

Limits on wall-clock time depend on what else the machine does. A test of nothing else has the marker `speed` and runs
only in `make test-speed`. A test that proves more takes the fixture `stopwatch`: it runs in every run, and its limits
count in `make test-speed` alone.

With several workers, the tests of a file stay in one worker, as do all tests that share a Slurm cluster or a container
engine. Slurm's faults have a cluster of their own.
"""

import os
import signal
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from stopwatch import Stopwatch
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["engine_fixtures"]  # two tiers run containers, in one engine

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # what we start inherits it, and under nohup it would be ignored
for name in (
    "ARGS",
    "JOB",
    "SITE",
    "IMAGE",
    "MAKEFLAGS",
    "MAKELEVEL",
    "MFLAGS",
):  # of the `make` that started the tests
    os.environ.pop(name, None)
os.umask(os.umask(0o022) | 0o022)  # as all our programs do: a run folder that others may write is refused

TESTS = Path(__file__).parent
APART = "slurm/test_faults.py"
ONE_WORKER = {
    APART: APART,
    "slurm": "slurm",
    "docker": "engine",
    "kubernetes/test_pods.py": "engine",
    "kubernetes/test_travel.py": "engine",
}
"""Files and tiers whose tests share what takes long to start: they run in the same worker."""
FIRST = ("slurm", "engine", APART, "cli/test_make_train.py", "cli/test_documents.py")
"""The longest groups of tests, which workers begin with."""
LAST = "unit"
"""A tier of quick tests. They come last, so that no worker still has a long file when the others have nothing left."""
REQUIRED = {tier.strip() for tier in os.environ.get("MUSTER_REQUIRED_TIERS", "").split(",")} - {""}


def tier_of(path: Path) -> str:
    """The folder under tests/ that the path is in, or an empty string."""
    return next(iter(path.relative_to(TESTS).parts), "") if path.is_relative_to(TESTS) else ""


def fail_if_skipped(path: Path, report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turns a required tier's skip into a failure that gives the reason. An expected failure is no skip."""
    tier = tier_of(path)
    if report.skipped and tier in REQUIRED and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        if "needs root" in reason and os.geteuid() != 0:
            return
        report.outcome = "failed"
        report.longrepr = f"{tier} is a required tier (MUSTER_REQUIRED_TIERS), and this did not run: {reason}"


def measures_speed(config: pytest.Config) -> bool:
    """Whether this is the run in which limits on time count."""
    return str(config.option.markexpr) == "speed"


@pytest.fixture(autouse=True)
def import_path() -> Generator[None]:
    """What a command that is called as a function adds to the path is not for the next test."""
    before = sys.path.copy()
    yield
    sys.path[:] = before


@pytest.fixture
def stopwatch(request: pytest.FixtureRequest) -> Stopwatch:
    """Limits on time, for a test that proves more than its speed."""
    return Stopwatch(strict=measures_speed(request.config))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    fail_if_skipped(item.path, report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    fail_if_skipped(collector.path, report)
    return report


def group_of(nodeid: str) -> str:
    """The name of the tests that run in the same worker as this one."""
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return ONE_WORKER.get(file) or ONE_WORKER.get(file.partition("/")[0]) or file


class Groups(LoadScopeScheduling):
    """Gives each worker one group of tests after the other."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)  # a run without pytest-xdist has no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Groups:
    """Our groups, whatever --dist says."""
    return Groups(config, log)


def place_of(item: pytest.Item) -> int:
    """Where the test's group stands in the order of all."""
    group = group_of(item.nodeid)
    return FIRST.index(group) if group in FIRST else len(FIRST) + (tier_of(item.path) == LAST)


@pytest.hookimpl(tryfirst=True)  # before -k and -m take tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest groups of tests first. Refuse a run in which a required tier has no test."""
    for item in items:
        if measures_speed(config) and "stopwatch" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.speed)
    items.sort(key=place_of)
    empty = REQUIRED - {tier_of(item.path) for item in items}
    if empty and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        raise pytest.UsageError(f"MUSTER_REQUIRED_TIERS: no test under tests/ for {', '.join(sorted(empty))}")
