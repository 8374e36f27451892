"""Required tiers: a test that skips in one of them fails, so that green never means "nothing ran".

A tier is a folder of tests/. MUSTER_REQUIRED_TIERS, which .ci/run sets, names the required ones, with commas. Only what
skips because it "needs root" may skip for somebody who is not.
"""

import os
from collections.abc import Generator
from pathlib import Path

import pytest

pytest_plugins = ["engine_fixtures"]  # two tiers run containers, in one engine

TESTS = Path(__file__).parent
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


@pytest.hookimpl(tryfirst=True)  # before -k and -m take tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuses a run of everything in which a required tier has no test: misspelt, moved or emptied."""
    empty = REQUIRED - {tier_of(item.path) for item in items}
    if empty and config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        raise pytest.UsageError(f"MUSTER_REQUIRED_TIERS: no test under tests/ for {', '.join(sorted(empty))}")
