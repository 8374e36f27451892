"""What is a new run, and what goes on."""

import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
from paths import ROOT

from trainer.errors import Cut, JobError, MaybeAccepted
from trainer.launch.submit import run_job, submit_job
from trainer.launch.sweep import run_sweep, submit_sweep
from trainer.records import write_json
from trainer.run.folder import RunFolder, last_event
from trainer.run.sweep import read_sweep


def test_a_folder_that_a_rendering_made_by_hand_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.launch.local.platform.Local.submit", lambda *_: {"pid": 1, "started": ""})
    by_hand = tmp_path / "digits-ID"
    by_hand.mkdir()
    (by_hand / "job.yaml").write_text("task: trainer.tasks.digits:Digits\n")
    (by_hand / "events.jsonl").touch()
    first, second = (submit_job(str(ROOT / "jobs/digits.yaml"), [f"runs={tmp_path}"], None, None) for _ in range(2))
    assert len({str(first), str(second), str(by_hand)}) == 3


def refuse(*_: object) -> NoReturn:
    raise JobError("--on", "local", "has had enough", "Come back later")


def test_a_refused_job_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.launch.local.platform.Local.submit", refuse)
    for start in (submit_job, run_job):
        with pytest.raises(JobError, match="enough"):
            start(str(ROOT / "jobs/digits.yaml"), [f"runs={tmp_path / 'runs'}"], None, None)
    assert list((tmp_path / "runs").glob("*/")) == []


def test_a_run_whose_continuation_is_refused_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.launch.local.platform.Local.submit", lambda *_: {"pid": 1, "started": ""})
    run = submit_job(str(ROOT / "jobs/digits.yaml"), [f"runs={tmp_path}"], None, None)
    for file in (run.exit, run.failure, run.result):
        write_json(file, {"code": 1, "reason": "so"})
    os.utime(run.job, (1000, 1000))
    before = {path: path.read_bytes() for path in (run.job, run.failure, run.result, run.platform)}
    monkeypatch.setattr("trainer.launch.local.platform.Local.submit", refuse)
    with pytest.raises(JobError, match="enough"):
        submit_job(str(run), ["train.epochs=9"], None, None)
    assert {path: path.read_bytes() for path in before} == before
    assert run.job.stat().st_mtime == 1000, "it is `latest` no more than before"
    ended = last_event(run.read_events(), "ended", "continued")
    assert ended is not None and ended["code"] == 64


def test_a_sweep_of_which_one_is_refused_keeps_those_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([{"pid": 1, "started": ""}] * 2)

    def submit(*_: object) -> dict[str, object]:
        for answer in answers:
            return dict(answer)
        return refuse()

    monkeypatch.setattr("trainer.launch.local.platform.Local.submit", submit)
    words = (str(ROOT / "jobs/digits.yaml"), [f"runs={tmp_path / 'runs'}"], None, None)
    with pytest.raises(JobError, match=r"Come back later\. This was run 3 of 3\. Those after it"):
        submit_sweep(*words, "train.lr=0.1,0.2,0.3")
    (sweep,) = (tmp_path / "runs").glob("*-sweep-*")
    kept = read_sweep(sweep)
    assert kept is not None and kept.values == ["0.1", "0.2"]
    assert sorted(path.name for path in (tmp_path / "runs").glob("*/")) == sorted(
        [sweep.name, *(run.name for run in kept.runs)]
    )
    with pytest.raises(JobError, match=r"Come back later$"):
        submit_sweep(*words, "train.lr=0.1,0.2")
    assert len([*(tmp_path / "runs").glob("*/")]) == 3, "nothing is left where the first was refused"


@pytest.mark.parametrize("kind", [Cut, MaybeAccepted])
@pytest.mark.parametrize("before", [0, 1])
def test_a_sweep_keeps_the_run_that_may_have_been_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[JobError], before: int
) -> None:
    """And no other, and says how to complete it: the same command would make another sweep."""
    answers = iter(range(before))

    def submit(*_: object) -> dict[str, object]:
        for _ in answers:
            return {"pid": 1, "started": ""}
        raise kind("ssh", "far", "the connection was cut", "The same command completes it")

    monkeypatch.setattr("trainer.launch.local.platform.Local.submit", submit)
    with pytest.raises(kind, match=rf"This was run {before + 1} of 3\. Those after it") as caught:
        submit_sweep(str(ROOT / "jobs/digits.yaml"), [f"runs={tmp_path}"], None, None, "train.lr=0.1,0.2,0.3")
    (folder,) = tmp_path.glob("*-sweep-*")
    kept = read_sweep(folder)
    assert kept is not None and kept.values == ["0.1", "0.2"][: before + 1]
    assert {path.name for path in tmp_path.glob("*/")} == {folder.name, *(run.name for run in kept.runs)}
    assert (f"`muster submit {kept.runs[-1]}`" in str(caught.value)) == (kind is Cut)
    assert ("The same command" in str(caught.value)) == (kind is not Cut)


def test_a_sweep_that_is_followed_shows_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Kubernetes and over ssh, the object that asks must know that somebody follows."""
    monkeypatch.setattr("trainer.launch.local.platform.Local.submit", lambda *_: {"pid": 1, "started": ""})
    asked = []

    def follow(run: RunFolder, job: object, ask: Any, *_: object) -> int:
        asked.append(ask.func.__self__.following)
        return 0

    monkeypatch.setattr("trainer.launch.sweep.follow", follow)
    run_sweep(str(ROOT / "jobs/digits.yaml"), [f"runs={tmp_path}"], None, None, "train.lr=0.1,0.2")
    assert asked == [True, True]


def test_a_run_is_continued_by_the_begin_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("trainer.launch.local.platform.Local.submit", lambda *_: {"pid": 1, "started": ""})
    run = submit_job(str(ROOT / "jobs/digits.yaml"), [], None, None)
    run.exit.write_text('{"code": 0}')
    for name in ("latest", run.name[:12], f"runs/{run.name[:12]}", str(run)):
        assert submit_job(name, [], None, None) == run
        note = "" if name == str(run) else f"note: {name} is the run {run.name}\n"
        assert capsys.readouterr().err == note, "it may have been meant to be a job file"
    with pytest.raises(JobError, match=r"no such file"):
        submit_job("jobs/digits.yaml", [], None, None)
