"""A run's secret: where it is looked for, what is refused, and who may read it."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer.errors import JobError
from trainer.wiring import secret
from trainer.wiring.secret import make_secret, read_secret, shared_secret, source_of_secret

ONE, OTHER, THIRD = ("0123456789abcdef" * 4, "fedcba9876543210" * 4, "00ff" * 16)


def test_a_file_wins_over_the_variable_and_both_over_the_run_folder(tmp_path: Path) -> None:
    named, own = tmp_path / "named", tmp_path / "secret"
    assert read_secret(own, {}) is None
    named.write_text(f"{ONE}\n")
    own.write_text(f"{THIRD}\n")
    environ = {"MUSTER_SECRET_FILE": str(named), "MUSTER_SECRET": OTHER, "HOME": "/"}
    assert read_secret(own, dict(environ)) == ONE.encode()
    del environ["MUSTER_SECRET_FILE"]
    assert read_secret(own, environ) == OTHER.encode()
    assert environ == {"HOME": "/"}, "what the ranks inherit"
    assert read_secret(own, environ) == THIRD.encode()


def test_the_uid_of_a_kubernetes_job_is_one(tmp_path: Path) -> None:
    uid = "6F1b6f0c-3f5e-4f0e-9c3e-0d6b7c1f2a3b"
    assert read_secret(tmp_path / "secret", {"MUSTER_SECRET": uid}) == uid.lower().encode()


@pytest.mark.parametrize("text", ["hunter2", ONE[:-1], ONE + "0", ONE[:-1] + "g", " ", f"{ONE}\n{ONE}", "é" * 64, "\0"])
def test_another_form_is_refused_and_not_shown(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "WRITTEN_S", 0.05)
    file = tmp_path / "secret"
    file.write_text(text)
    for environ in ({"MUSTER_SECRET": text}, {"MUSTER_SECRET_FILE": str(file)}, {}):
        with pytest.raises(JobError, match=rf"{next(iter(environ), 'secret')}=.*64 hexadecimal digits") as caught:
            read_secret(file, environ)
        assert not text.strip() or text not in str(caught.value)


def test_a_named_file_that_is_not_there_is_no_reason_to_take_another(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"MUSTER_SECRET_FILE=.*No such file"):
        read_secret(tmp_path, {"MUSTER_SECRET_FILE": str(tmp_path / "gone"), "MUSTER_SECRET": ONE})


def test_what_is_made_is_for_its_owner_alone_and_stays(tmp_path: Path) -> None:
    file, before = tmp_path / "secret", os.umask(0)
    try:
        make_secret(file)
    finally:
        os.umask(before)
    made = read_secret(file, {})
    assert made is not None and len(made) == 64 and file.stat().st_mode & 0o777 == 0o600
    make_secret(file)
    assert read_secret(file, {}) == made
    make_secret(tmp_path / "another")
    assert read_secret(tmp_path / "another", {}) != made


def test_one_that_cannot_be_made_or_used_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret, "WRITTEN_S", 0.05)
    with pytest.raises(JobError, match="cannot be made"):
        make_secret(tmp_path / "nowhere" / "secret")
    (tmp_path / "secret").touch()
    with pytest.raises(JobError, match="does not hold a secret"):
        make_secret(tmp_path / "secret")


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_agents_that_make_it_at_once_have_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    file = tmp_path / "secret"

    def make(_: int) -> bytes | None:
        make_secret(file)
        return read_secret(file, {})

    with ThreadPoolExecutor() as pool:
        found = set(pool.map(make, range(40)))
    assert len(found) == 1 and None not in found
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_who_looks_while_another_agent_makes_it_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was seen to be missing replaces anything, nor is half of it taken for something else."""
    file, made = tmp_path / "secret", []

    def refuse(*_: object) -> None:
        if not made:  # another agent comes between our look and our try
            made.append("")
            make_secret(file)
            made[:] = [file.read_text().strip()]
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        patch.setattr(Path, "exists", lambda _: False)
        make_secret(file)
    assert read_secret(file, {}) == made[0].encode()
    file.write_text(ONE[:9])
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read_secret, file, {})
        time.sleep(0.05)
        file.write_text(f"{ONE}\n")
        assert reading.result() == ONE.encode()


def test_agents_without_one_make_it_where_they_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "secret"
    made = shared_secret(file, 2)
    assert shared_secret(file, 2) == made == read_secret(file, {})
    monkeypatch.setenv("MUSTER_RUN_SHARED", "0")
    with pytest.raises(JobError, match=r"MUSTER_SECRET=None: is not set.*Set the same one on all nodes\..*openssl"):
        shared_secret(file, 2)
    alone = tmp_path / "alone"
    assert shared_secret(alone, 1) != shared_secret(alone, 1) and not alone.exists()


def test_people_are_told_where_it_is_from_and_not_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    environ = {"MUSTER_SECRET_FILE": "/run/secret", "MUSTER_SECRET": ONE}
    assert source_of_secret(file, environ) == "/run/secret, named by MUSTER_SECRET_FILE"
    del environ["MUSTER_SECRET_FILE"]
    assert source_of_secret(file, environ) == "MUSTER_SECRET in the environment"
    assert source_of_secret(file, {}) == source_of_secret(None, {}) == ""
    file.write_text(ONE)
    assert source_of_secret(file, {}) == str(file)
