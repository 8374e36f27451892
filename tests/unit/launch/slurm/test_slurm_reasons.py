"""Slurm's reasons in words."""

import pytest

from trainer.launch.slurm.reasons import explain_reason


@pytest.mark.parametrize(
    ("reason", "part"),
    [
        ("Priority", "it starts by itself"),
        ("Resources", "too few nodes are free"),
        ("ReqNodeNotAvail, UnavailableNodes:n[1-2]", "sinfo -R"),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions", "sinfo -R"),
        ("JobHeldUser", "scontrol release 7_1"),
        ("launch failed requeued held", "scontrol release 7_1"),
        ("DependencyNeverSatisfied", "never starts"),
        ("Dependency", "another job"),
        ("BeginTime", "requeued"),
        ("PartitionTimeLimit", "time_limit_min"),
        ("PartitionNodeLimit", "nodes or partition"),
        ("PartitionConfig", "no node of its partition"),
        ("AssocGrpGRES", "limit of your account"),
        ("AssocMaxJobsLimit", "limit of your account"),
        ("QOSMaxGRESPerUser", "limit of your account"),
        ("QOSMaxWallDurationPerJobLimit", "time_limit_min"),
        ("InvalidAccount", "account or qos"),
        ("InvalidQOS", "account or qos"),
        ("JobArrayTaskLimit", "array"),
        ("Licenses", "licenses"),
        ("(Resources)", "too few nodes are free"),
    ],
)
def test_a_reason_keeps_slurms_word_and_says_what_ends_the_wait(reason: str, part: str) -> None:
    text = explain_reason(reason, "7_1")
    assert text.startswith(f"{reason} (") and part in text


def test_an_unknown_reason_stays_as_it_is() -> None:
    assert explain_reason("SomethingNew", "7") == "SomethingNew"
