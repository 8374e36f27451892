"""What agents tell each other in a round."""

from importlib import metadata

import pytest
import torch

from trainer.agent.rounds import Ended, check_versions, torch_version
from trainer.errors import WRONG_JOB

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
