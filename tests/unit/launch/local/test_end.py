"""How a local run is known to have ended."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from trainer.launch.local.platform import Local
from trainer.launch.platform import Phase
from trainer.run.folder import RunFolder

GONE = {"platform": "local", "pid": 2**22 + 1, "started": "1", "host": socket.gethostname()}


@pytest.mark.parametrize(("text", "phase"), [
    ('{"code": 0}', Phase.DONE), ('{"code": 1}', Phase.FAILED), ('{"code": "0"}', Phase.LOST), ("{}", Phase.LOST),
    ("[]", Phase.LOST), ("{", Phase.LOST),
])  # fmt: skip
def test_an_end_is_believed_only_if_it_is_one(tmp_path: Path, text: str, phase: Phase) -> None:
    run = RunFolder(tmp_path)
    run.exit.write_text(text)
    assert Local().ask(run, GONE).phase == phase
