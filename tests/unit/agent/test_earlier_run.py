"""By hand, jobs of one name are one run: that is said, and refused when they differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.agent.earlier_run import note_earlier_run
from trainer.errors import JobError
from trainer.records import write_json
from trainer.run.folder import RunFolder

JOB = "name: digits\ntrain:\n  lr: 0.1\n  steps: 9\n"


def test_a_run_that_is_there_is_named_or_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert note_earlier_run(run, JOB) == ""
    run.job.write_text(JOB)
    assert note_earlier_run(run, JOB) == ""  # another agent of this job made it
    (run.checkpoints / "step-000000004").mkdir(parents=True)
    assert "goes on from step 4" in note_earlier_run(run, JOB)
    write_json(run.result, {})
    assert f"the run in {run} is done already, so nothing is trained" in note_earlier_run(run, JOB)
    assert "name=" in note_earlier_run(run, JOB + "new_key: 1\n")
    with pytest.raises(JobError, match=r"train\.lr=0\.2: the run in .* was made with 0\.1.*name=") as error:
        note_earlier_run(run, JOB.replace("0.1", "0.2"))
    assert "train.steps" not in str(error.value)
