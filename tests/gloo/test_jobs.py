"""The job files that come with Muster, as they are but for their length: the same in every mode."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from paths import ROOT
from ranks import complete, evaluations, losses, make_job

JOBS = ROOT / "jobs"
MODES = (["parallel=single"], ["parallel=dp"], ["parallel=ddp"])


NAMES = ("digits", "segment", "bytelm")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A part of bytelm's corpus: it evaluates on all that is held out, which takes a while."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_a_job_is_the_same_in_every_mode(tmp_path: Path, sources: Path, name: str) -> None:
    keys = [f"task_args.folder={sources}"] if name == "bytelm" else []
    runs = []
    for mode in MODES:
        job = make_job("train.steps=4", "log.every_steps=1", *keys, *mode, file=JOBS / f"{name}.yaml")
        runs.append(complete(tmp_path / mode[0], job).folder)
    single, *others = runs
    assert len(losses(single)) == 4
    for other in others:
        assert losses(other) == pytest.approx(losses(single), rel=1e-4)
        for metric, value in evaluations(single)[-1].items():
            if metric not in ("time", "attempt"):
                assert evaluations(other)[-1][metric] == pytest.approx(value, rel=1e-2, abs=1e-2), metric
