"""What agents tell each other in a round."""

from __future__ import annotations

import json

import pytest

from trainer.agent.failure import Failure
from trainer.agent.rounds import Ended, NodeReport, RoundPlan, check_versions
from trainer.errors import WRONG_JOB

VERSIONS = {"muster": "1.0", "torch": "2.9.0"}


def test_nodes_with_other_packages_end_the_job() -> None:
    check_versions([NodeReport(VERSIONS, None), NodeReport(dict(VERSIONS), None)])
    with pytest.raises(Ended, match=r"node 1 has torch 2\.6\.0, and node 0 2\.9\.0") as caught:
        check_versions([NodeReport(VERSIONS, None), NodeReport(VERSIONS | {"torch": "2.6.0"}, None)])
    assert caught.value.code == WRONG_JOB


def test_what_is_told_arrives_as_it_was() -> None:
    failure = Failure(0, "a", 1, 2.5, 1, "killed", "ended by SIGKILL", "rank-1.log")
    for report in (NodeReport(VERSIONS, None), NodeReport(VERSIONS, failure)):
        assert NodeReport.from_json(json.loads(json.dumps(report.to_json()))) == report
    plan = RoundPlan(3, 20000)
    assert RoundPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
