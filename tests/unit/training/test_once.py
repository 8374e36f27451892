"""What one rank of a node makes for all: whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.job import Job
from trainer.parallel.base import Parallel
from trainer.reporting.heartbeat import Pulse
from trainer.training.once import make_once
from trainer.wiring.rank import RankWiring


def once(path: Path, make: object) -> Path:
    return make_once(path, make, Parallel(Job(task="a:B"), RankWiring()), Pulse(0))  # type: ignore[arg-type]


def test_what_was_made_half_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "cache/digits.bin"

    def fail(part: Path) -> None:
        part.write_text("half")
        raise ConnectionError("the network is gone")

    with pytest.raises(ConnectionError):
        once(path, fail)
    assert not path.exists()
    assert once(path, lambda part: part.write_text("whole")) == path and path.read_text() == "whole"


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    def fail(part: Path) -> None:
        raise AssertionError("nobody needs it")

    assert once(tmp_path, fail) == tmp_path


def test_a_folder_can_be_made(tmp_path: Path) -> None:
    def unpack(part: Path) -> None:
        part.mkdir()
        (part / "one.txt").write_text("1")

    assert (once(tmp_path / "unpacked", unpack) / "one.txt").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["unpacked"]
