"""What agents compare before ranks start."""

from __future__ import annotations

from trainer.agent.rendezvous import VERSIONS, mismatch


def test_nodes_with_other_packages_end_the_job() -> None:
    assert mismatch([VERSIONS, dict(VERSIONS)]) is None
    end = mismatch([VERSIONS, VERSIONS | {"torch": "2.6.0"}])
    assert end is not None and end["code"] == 64
    assert "node 1 has torch 2.6.0" in end["end"] and VERSIONS["torch"] in end["end"]
