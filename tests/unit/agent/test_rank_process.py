"""What a rank leaves of the exception that ends it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from trainer.agent import rank_process
from trainer.errors import HIDDEN
from trainer.records import read_json
from trainer.wiring.rank import RankWiring


def test_the_place_of_an_exception_is_found_before_anything_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value may be a part of the paths of the code, and a file may be called as one."""
    code = tmp_path / "a-project"
    code.mkdir()
    (code / "train-a-secret.py").write_text("raise ValueError('a-project')\n")
    monkeypatch.setitem(HIDDEN, "a-project", "${oc.env:PROJECT}")
    monkeypatch.setitem(HIDDEN, "a-secret", "${oc.env:TOKEN}")
    monkeypatch.setattr(rank_process, "RECORDED", [])
    with pytest.raises(ValueError, match="a-project") as raised:
        runpy.run_path(str(code / "train-a-secret.py"))
    wiring = RankWiring()
    rank_process.record_failure(tmp_path / "failures/rank-0.json", wiring, [code], raised.value)
    record = read_json(tmp_path / "failures/rank-0.json")
    assert record is not None and record["place"] == "train-${oc.env:TOKEN}.py:1"
    assert "a-secret" not in str(record) and "a-project" not in str(record)
