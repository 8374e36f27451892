"""What agents tell each other in a round."""

from importlib import metadata
from typing import Any

import pytest
import torch

from trainer.agent.failure import Failure
from trainer.agent.rounds import Ended, check_versions, make_end, make_report, read_end, read_failures, torch_version
from trainer.errors import FAILED, WRONG_JOB

VERSIONS = {"muster": "1.0", "torch": "2.9.0"}


def test_nodes_with_other_packages_end_the_job() -> None:
    check_versions([VERSIONS, dict(VERSIONS)])
    with pytest.raises(Ended, match=r"node 1 has torch 2\.6\.0, and node 0 2\.9\.0") as caught:
        check_versions([VERSIONS, VERSIONS | {"torch": "2.6.0"}])
    assert caught.value.code == WRONG_JOB


def test_a_torch_that_is_no_installed_package_has_a_version_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert torch_version() == torch.__version__


FAILURE = Failure(1, "host1", 3, 1.0, 1, "killed", "so", "rank.log")


def test_reports_arrive_as_they_were_and_in_a_size_that_can_be_sent() -> None:
    reports = [make_report(VERSIONS, None), make_report(VERSIONS, FAILURE)]
    assert read_failures(reports) == [FAILURE]
    endless = Failure(**{**vars(FAILURE), "message": "x" * 10**6})
    assert read_failures([reports[0], make_report(VERSIONS, endless)])[0].message == "x" * 4000


@pytest.mark.parametrize(
    "nonsense",
    [
        {"node": 999}, {"node": -1}, {"node": 1e999}, {"time": "now"}, {"code": None}, {"kind": "strange"},
        {"message": ["x"]}, {"more": 1},
    ],
)  # fmt: skip
def test_a_report_that_makes_no_sense_ends_the_job_and_names_the_node(nonsense: dict[str, Any]) -> None:
    report = {"versions": VERSIONS, "failure": {**vars(FAILURE), **nonsense}}
    with pytest.raises(Ended, match="node 1 reports what") as caught:
        read_failures([make_report(VERSIONS, None), report])
    assert caught.value.code == FAILED


@pytest.mark.parametrize("told", [None, 7, [], {"torch": 1}])
def test_a_node_that_does_not_say_its_versions_has_others(told: Any) -> None:
    with pytest.raises(Ended, match="node 1 has muster None"):
        check_versions([VERSIONS, told])


def test_an_end_is_what_was_told_or_says_that_it_makes_no_sense() -> None:
    end = read_end(make_end("so", WRONG_JOB))
    assert (str(end), end.code) == ("so", WRONG_JOB)
    for nonsense in (7, [], ["so"], ["so", 0], ["so", 10**9], ["so", "1"], {"so": 1}):
        end = read_end(nonsense)
        assert "cannot be read" in str(end) and end.code == FAILED
