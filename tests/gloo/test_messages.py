"""What ranks tell each other: the same as it was, and nothing of it is unpickled.

The ranks of `ranks.train` refuse to unpickle anything, so each test of this tier asks for that, too: from the start of
the group to steps, evaluations, saves, a resume, and the end.
"""

from __future__ import annotations

from pathlib import Path

from ranks import free_port, start, wait
from talking import talk


def test_what_ranks_tell_each_other_arrives(tmp_path: Path) -> None:
    port = free_port()
    assert wait([start(talk, rank, 3, port, tmp_path) for rank in range(3)], 60) == [0, 0, 0], [
        path.read_text() for path in tmp_path.iterdir()
    ]
