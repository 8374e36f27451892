"""What skips in a required tier fails, save what only root can do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

TESTS = ROOT / "tests"
SKIPPING = """
import pytest

@pytest.mark.parametrize("reason", ["needs root, to mount", "there is no tool"])
def test_one(reason):
    pytest.skip(reason)
"""


@pytest.mark.parametrize(
    ("user", "tiers", "outcome"),
    [(0, "unit", "2 failed"), (1001, "unit", "1 failed, 1 skipped"), (1001, "", "2 skipped")],
)
def test_what_may_skip(tmp_path: Path, user: int, tiers: str, outcome: str) -> None:
    (tmp_path / "unit").mkdir()
    (tmp_path / "unit/test_one.py").write_text(SKIPPING)
    shutil.copy(TESTS / "conftest.py", tmp_path)
    (tmp_path / "be_user.py").write_text(f"import os\nos.geteuid = lambda: {user}\n")
    command = [sys.executable, "-m", "pytest", f"--rootdir={tmp_path}", "-p", "be_user", "--import-mode=importlib"]
    done = subprocess.run(
        [*command, "--override-ini", f"pythonpath={TESTS / 'support'} {tmp_path}", tmp_path],
        cwd=tmp_path, env=os.environ | {"MUSTER_REQUIRED_TIERS": tiers, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert outcome in done.stdout.splitlines()[-1], done.stdout + done.stderr
