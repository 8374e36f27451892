"""What is a new run, and what goes on."""

from pathlib import Path

import pytest
from paths import ROOT

from trainer.launch.submit import submit_job


def test_a_folder_that_a_rendering_made_by_hand_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.launch.local.platform.Local.submit", lambda *_: {"pid": 0, "started": ""})
    by_hand = tmp_path / "digits-ID"
    by_hand.mkdir()
    (by_hand / "job.yaml").write_text("task: trainer.tasks.digits:Digits\n")
    (by_hand / "events.jsonl").touch()
    first, second = (submit_job(str(ROOT / "jobs/digits.yaml"), [f"runs={tmp_path}"], None, None) for _ in range(2))
    assert len({str(first), str(second), str(by_hand)}) == 3
