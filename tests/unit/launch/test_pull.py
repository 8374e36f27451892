"""`muster pull`: exact, in as many tries as it takes, and safe from whatever the other side says.

The other side is a folder of this machine, read by the real program there.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import JobError
from trainer.launch.far_folder import CutOff, FarFolder
from trainer.launch.kubernetes.platform import Kubernetes
from trainer.launch.pull import OF_CHECKPOINT, RESULTS, pull
from trainer.launch.ssh.platform import OverSsh
from trainer.records import write_json
from trainer.run.folder import RunFolder

Command = Callable[[list[str]], list[str]]


def plainly(words: list[str]) -> list[str]:
    return [sys.executable, *words[1:]]


def cut_after(size: int) -> Command:
    """A way there that ends after at most so many bytes."""
    cut = f'{sys.executable} -I -c "$0" "$@" | dd bs=100 count={size // 100} status=none'
    return lambda words: ["bash", "-c", cut, *words[3:]]


@pytest.fixture
def far(tmp_path: Path) -> Path:
    """A run folder as its nodes have it, with two checkpoints of which the first is the best."""
    folder = tmp_path / "far" / "digits-1"
    chance = random.Random(0)
    files = {
        "events/node-0-pod.jsonl": b'{"event": "training", "time": 1, "step": 0}\n', "evaluation.json": b"{}\n",
        "metrics.jsonl": b"".join(
            json.dumps({"kind": "evaluation", "step": step, "accuracy": value}).encode() + b"\n"
            for step, value in ((10, 0.9), (20, 0.8), (30, 0.99))
        ),
        "logs/rank-0.log": b"hello\n" * 9, "logs/ranks-100/rank-100.log": b"", "secret": b"hush", "exit.json": b"{}",
        "tensorboard/events.x": chance.randbytes(70000), "job.yaml": b"name: other\n", "plan/source.json": b"{}",
    }  # fmt: skip
    for step in (10, 20):
        content = chance.randbytes(150000)
        name = f"checkpoints/step-{step:09d}"
        digest = hashlib.sha256(content).hexdigest()
        manifest = {"files": {"model.pt": {"bytes": len(content), "sha256": digest}}}
        files |= {f"{name}/model.pt": content, f"{name}/manifest.json": json.dumps(manifest).encode()}
    files["checkpoints/.pending-step-000000030/model.pt"] = b"half"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "logs/link.log").symlink_to("/etc/passwd")
    return folder


@pytest.fixture
def run(tmp_path: Path, far: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    run = RunFolder.create(str(tmp_path / "runs"), "digits", "name: digits\ncheckpoint: {best: accuracy}\n")
    write_json(run.handle, {"platform": "kubernetes", "kind": "jobs.batch", "name": "digits-1", "run": str(run)})
    through(monkeypatch, far, plainly)
    return run


def through(monkeypatch: pytest.MonkeyPatch, far: Path, command: Command) -> None:
    @contextmanager
    def reach(*_: Any) -> Iterator[FarFolder]:
        yield FarFolder(str(far), command)

    monkeypatch.setattr(Kubernetes, "reach", reach)


def same(run: RunFolder, far: Path) -> list[str]:
    """The names of files that are here and there; what has a name here is whole, at any time."""
    names = []
    for path in far.rglob("*"):
        name = str(path.relative_to(far))
        here = run.path / name
        if path.is_file() and not path.is_symlink() and name not in ("job.yaml", "plan/source.json") and here.exists():
            assert here.read_bytes() == path.read_bytes(), name
            names.append(name)
    return sorted(names)


RESULTS_THERE = [
    "evaluation.json", "events/node-0-pod.jsonl", "logs/rank-0.log", "logs/ranks-100/rank-100.log", "metrics.jsonl",
    "tensorboard/events.x",
]  # fmt: skip


def test_results_come_and_what_the_run_was_made_from_stays(run: RunFolder, far: Path) -> None:
    before = run.job.read_text()
    said = pull(str(run), None)
    assert same(run, far) == RESULTS_THERE
    assert "tensorboard  1 files" in said and "2 checkpoints" in said and "--checkpoints best" in said
    assert run.job.read_text() == before and not (run.path / "secret").exists() and not run.exit.exists()
    assert not (run.logs / "link.log").exists() and not run.pull.exists()
    assert pull(str(run), None).startswith("nothing new")


@pytest.mark.parametrize(("which", "steps"), [("best", [10]), ("last", [20]), ("all", [10, 20])])
def test_the_chosen_checkpoints_come(run: RunFolder, far: Path, which: str, steps: list[int]) -> None:
    said = pull(str(run), which)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"step-{step:09d}" for step in steps]
    assert f"checkpoints/step-{steps[0]:09d}  2 files  0.1 MB" in said or "146" in said
    assert len(same(run, far)) == len(RESULTS_THERE) + 2 * len(steps)
    assert pull(str(run), which).startswith("nothing new")


def test_what_is_cut_off_goes_on_and_half_of_it_is_never_believed(
    run: RunFolder, far: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at random places, again and again: each try begins where the one before ended."""
    chance, tries, most = random.Random(1), 0, 0
    while True:
        cut = chance.randrange(60000, 90000)
        through(monkeypatch, far, cut_after(cut))
        try:
            pull(str(run), "all")
            break
        except CutOff as error:
            assert "goes on where it stopped" in str(error)
        same(run, far)
        assert all((path / "manifest.json").exists() for path in run.checkpoints.glob("step-*"))
        tries, most = tries + 1, max(most, cut)
        assert tries < 12
    assert tries >= 3
    assert len(same(run, far)) == len(RESULTS_THERE) + 4


def test_of_a_file_that_grew_only_the_rest_travels(run: RunFolder, far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(str(run), None)
    with (far / "tensorboard/events.x").open("ab") as file:
        file.write(b"more")
    through(monkeypatch, far, cut_after(9000))
    assert "tensorboard" in pull(str(run), None)
    assert same(run, far) == RESULTS_THERE


def test_what_is_newer_here_stays_and_what_is_other_there_comes(run: RunFolder, far: Path) -> None:
    pull(str(run), None)
    (run.logs / "rank-0.log").write_text("mine")
    (far / "metrics.jsonl").write_bytes(b'{"kind": "train"}\n')  # not what is here with something behind it
    (far / "tensorboard/events.x").write_bytes(b"x" * 80000)
    for name in ("metrics.jsonl", "tensorboard/events.x"):
        os.utime(far / name, (2**32, 2**32))
    said = pull(str(run), None)
    assert "newer here, so not brought: logs/rank-0.log" in said
    assert (run.logs / "rank-0.log").read_text() == "mine"
    assert (run.path / "tensorboard/events.x").read_bytes() == b"x" * 80000
    assert run.metrics.read_bytes() == b'{"kind": "train"}\n'


def test_a_checkpoint_that_is_not_its_manifests_is_not_taken(run: RunFolder, far: Path) -> None:
    content = bytearray((far / "checkpoints/step-000000020/model.pt").read_bytes())
    content[100] ^= 1
    (far / "checkpoints/step-000000020/model.pt").write_bytes(content)
    with pytest.raises(JobError, match=r"damaged there: model\.pt"):
        pull(str(run), "last")
    assert not run.checkpoints.exists() or list(run.checkpoints.iterdir()) == []
    (far / "checkpoints/step-000000020/manifest.json").write_text('{"files": [1]}')
    with pytest.raises(JobError, match="damaged there"):
        pull(str(run), "last")


BAD = [
    "../x", "/tmp/x", "events/../../x.jsonl", "logs/../../x", "logs/..", "logs/.hidden", "logs//x", "logs", "",
    "tensorboard/a/../../../x", "logs/a\0b", "logs/\n/../x", "secret", "handle.json", "job.yaml", "exit.json",
    "plan/kubernetes.txt", "code/a.py", ".pull/x", "sweep.json", "checkpoints/step-000000001/../../x",
    "checkpoints/../x/model.pt",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_names_that_are_none_of_a_run_are_not_taken(name: str) -> None:
    assert RESULTS.fullmatch(name) is None and OF_CHECKPOINT.fullmatch(name) is None


HOSTILE = """
import json, os, sys
print('{"started": true}')
verb, = [word for word in sys.argv if word in ("list", "read")]
def say(**line): print(json.dumps(line), flush=True)
if verb == "list":
    for name in NAMES: say(name=name, size=3, mtime_ns=1)
    say(end=True)
else:
    for name in NAMES:
        say(name=name, size=3, mtime_ns=1, offset=0); print("abc", end="", flush=True); say(sha256=HASH)
    say(end=True)
sys.stdin.read()
"""
SSH = """#!/bin/sh
case "$*" in *" -G "*|*" -O "*) exit 0;; esac
printf 'Welcome to this machine!\n$ '
for word; do :; done
exec sh -c "$word"
"""


def hostile(*names: str, digest: str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad") -> Command:
    text = HOSTILE.replace("NAMES", repr(names)).replace("HASH", repr(digest))
    return lambda words: [sys.executable, "-c", text, *words[4:]]


def test_a_hostile_listing_writes_nothing_but_results(
    run: RunFolder, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    through(monkeypatch, far, hostile(*BAD))
    assert pull(str(run), "all").startswith("nothing new")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_no_link_here_is_followed(run: RunFolder, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (run.path / "tensorboard").symlink_to(outside)
    run.metrics.symlink_to(outside / "metrics")
    through(monkeypatch, far, hostile("tensorboard/x", "metrics.jsonl"))
    assert "is a link" in pull(str(run), None)
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("digest", ["0" * 64, None])
def test_what_has_another_hash_gets_no_name(
    run: RunFolder, far: Path, monkeypatch: pytest.MonkeyPatch, digest: Any
) -> None:
    through(monkeypatch, far, hostile("logs/rank-7.log", digest=digest))
    with pytest.raises(CutOff, match=r"logs/rank-7\.log changed while it was read"):
        pull(str(run), None)
    assert not (run.logs / "rank-7.log").exists()


@pytest.mark.parametrize(
    "text", ["print('Welcome to this machine!')", "print('[1]')", 'print(\'{"error": "no"}\')', ""]
)
def test_what_is_no_answer_is_said(run: RunFolder, far: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    through(monkeypatch, far, lambda words: [sys.executable, "-c", text])
    with pytest.raises(JobError):
        pull(str(run), None)


def test_over_ssh_it_comes_behind_a_banner(
    run: RunFolder, far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An `ssh` that runs its command here, and prints what login scripts print."""
    there = far.rename(far.parent / "it's a run; exit")
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    write_json(run.handle, {
        "platform": "slurm", "ssh": "login", "ssh_config": None, "ssh_folder": "/home/me/.muster", "python": None,
        "environment": "python-0123456789abcdef", "submission": "0" * 16, "accepted": True, "there": {},
        "runs": str(there.parent), "name": there.name, "run": str(run),
    })  # fmt: skip
    monkeypatch.setitem(OverSsh.ids, "name", ".*")
    assert "logs  2 files" in pull(str(run), "all")
    assert len(same(run, there)) == len(RESULTS_THERE) + 4


def test_what_cannot_be_pulled_says_why(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="must be one of best, last, all"):
        pull(str(run), "newest")
    write_json(run.handle, {"platform": "local", "pid": 1, "started": "1", "run": str(run)})
    with pytest.raises(JobError, match="is here already: on local the nodes write to it"):
        pull(str(run), None)
    run.handle.unlink()
    with pytest.raises(JobError, match="was not submitted by muster"):
        pull(str(run), None)
