"""The line of the user's code that an exception came from."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import pytest

from trainer.agent.exception_place import TRAINER, place_of

LIBRARY = sysconfig.get_paths()["stdlib"]


def text(*files: str) -> str:
    """A traceback through these files; the line is the frame's number."""
    frames = [f'  File "{file}", line {line}, in work\n    work()' for line, file in enumerate(files, 1)]
    return "\n".join(["Traceback (most recent call last):", *frames, "ValueError: bad"])


@pytest.mark.parametrize(
    ("files", "place"),
    [
        ([f"{TRAINER}/training/loop.py", "/code/cells/bad.py"], "cells/bad.py:2"),
        (["/code/cells/bad.py", f"{LIBRARY}/json/decoder.py", "/x/site-packages/torch/nn/module.py"], "cells/bad.py:1"),
        ([f"{TRAINER}/training/loop.py", f"{TRAINER}/tasks/digits.py"], f"{TRAINER}/tasks/digits.py:2"),
        (
            [f"{TRAINER}/tasks/digits.py", "/x/site-packages/torch/nn/module.py", f"{TRAINER}/training/loop.py"],
            f"{TRAINER}/tasks/digits.py:1",
        ),
        (["/elsewhere/train.py", "<frozen runpy>"], "/elsewhere/train.py:1"),
        (
            [f"{TRAINER}/training/loop.py", "/x/site-packages/torch/nn/module.py"],
            "/x/site-packages/torch/nn/module.py:2",
        ),
        ([], ""),
    ],
    ids=[
        "ours calls theirs",
        "theirs calls a library",
        "a task of ours",
        "called back",
        "a script",
        "nobody's",
        "none",
    ],
)
def test_the_innermost_frame_of_the_users_own(
    files: list[str], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of(text(*files), [Path("/code")]) == place


def test_a_path_below_the_working_directory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert place_of(text(f"{tmp_path}/src/cells/bad.py")) == "src/cells/bad.py:1"


def test_a_loader_workers_own_traceback_counts() -> None:
    """torch raises the exception anew in the rank, and puts the worker's traceback into its message."""
    outer = text(f"{TRAINER}/data/loader.py", "/x/site-packages/torch/_utils.py")
    message = "Caught ValueError in DataLoader worker process 0.\nOriginal " + text("/code/a.py", "/code/b.py")
    assert place_of(f"{outer}\n{message}", [Path("/code")]) == "b.py:2"


def test_a_mistake_of_syntax_has_a_line() -> None:
    try:
        compile("x = = 1", "/code/wrong.py", "exec")
    except SyntaxError as error:
        found = place_of("".join(traceback.format_exception(error)), [Path("/code")])
    assert found == "wrong.py:1"
