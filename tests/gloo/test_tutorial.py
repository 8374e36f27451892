"""The documentation's example of user code: short, real, and it works in every mode."""

from __future__ import annotations

from pathlib import Path

import pytest
from paths import ROOT
from ranks import complete, evaluations, losses, make_job

FOLDER = ROOT / "docs/tutorial"
MODES = {"ddp": [], "single": ["parallel=single"], "dp": ["parallel=dp"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A training in each mode."""
    root = tmp_path_factory.mktemp("tutorial")
    keys = ["device=cpu", "log.every_steps=1", "log.tensorboard=false"]
    for mode, more in MODES.items():
        complete(root / mode, make_job(*keys, *more, file=FOLDER / "tumours.yaml"))
    return {mode: root / mode for mode in MODES}


def test_it_is_short() -> None:
    assert len((FOLDER / "tumours.py").read_text().splitlines()) <= 40


@pytest.mark.parametrize("mode", MODES)
def test_it_learns_the_same_in_every_mode(runs: dict[str, Path], mode: str) -> None:
    assert evaluations(runs[mode])[-1]["accuracy"] > 0.95
    assert losses(runs[mode]) == pytest.approx(losses(runs["single"]), rel=1e-4)
