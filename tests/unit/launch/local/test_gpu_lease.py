"""GPU leases: no device twice, all or none, inside the mask, free again when the holder is gone."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from trainer.config.job import Job
from trainer.errors import JobError
from trainer.launch.local.gpu_lease import lock_folder, try_lease
from trainer.launch.local.platform import Nodes
from trainer.launch.local.supervisor import Supervisor
from trainer.run.folder import RunFolder
from trainer.run.ownership import user_name
from trainer.wiring.devices import visible_devices, wanted_devices

FOUR = ["0", "1", "2", "3"]


def job(**keys: object) -> Job:
    return Job(task="a:B", parallel="ddp", **keys)  # type: ignore[arg-type]


def test_two_jobs_get_different_devices_and_a_third_waits(tmp_path: Path) -> None:
    first, second = try_lease(2, FOUR, tmp_path), try_lease(2, FOUR, tmp_path)
    assert first is not None and second is not None
    assert (first.devices, second.devices) == (["0", "1"], ["2", "3"])
    assert try_lease(1, FOUR, tmp_path) is None
    first.release()
    third = try_lease(1, FOUR, tmp_path)
    assert third is not None and third.devices == ["0"]


def test_too_few_are_none_at_all(tmp_path: Path) -> None:
    held = try_lease(["2"], FOUR, tmp_path)
    assert held is not None
    assert try_lease(4, FOUR, tmp_path) is None
    rest = try_lease(3, FOUR, tmp_path)
    assert rest is not None and rest.devices == ["0", "1", "3"]


def test_named_devices_keep_their_order(tmp_path: Path) -> None:
    found = try_lease(["2", "3", "1"], FOUR, tmp_path)
    assert found is not None and found.devices == ["2", "3", "1"]


def test_a_lease_ends_with_all_who_hold_it(tmp_path: Path) -> None:
    """With the supervisor and the agents that it handed its files to, however they end."""
    found = try_lease(1, ["0"], tmp_path)
    assert found is not None
    agent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=found.handles)
    found.release()
    assert try_lease(1, ["0"], tmp_path) is None
    agent.kill()
    agent.wait()
    assert try_lease(1, ["0"], tmp_path) is not None


def lease_as(user: int, wanted: int, folder: Path) -> list[str] | None:
    """The devices that another user, with a strict umask, gets and gives back; None while they are taken."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may go on here
        try:
            os.umask(0o077)
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            os.write(write, repr(getattr(try_lease(wanted, FOUR, folder), "devices", None)).encode())
        except BaseException as error:
            os.write(write, repr(f"{error!r}").encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as pipe:
        found: list[str] | None = ast.literal_eval(pipe.read())
    return found


def test_users_share_the_devices_whatever_their_umask() -> None:
    if os.geteuid():
        pytest.skip("needs root, to be two users")
    with tempfile.TemporaryDirectory() as shared:
        Path(shared).chmod(0o1777)  # as /tmp
        folder = Path(shared, "gpus")
        assert lease_as(1001, 2, folder) == FOUR[:2]
        assert lease_as(1002, 4, folder) == FOUR  # two files are the other's, two are new in the other's folder
        assert lease_as(1001, 4, folder) == FOUR
        held = try_lease(3, FOUR, folder)
        assert held is not None
        assert (lease_as(1002, 1, folder), lease_as(1001, 2, folder)) == (["3"], None)


def make_private(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 1001, 1001)


def make_others(folder: Path) -> None:
    """Where nobody else can make a file."""
    folder.mkdir(mode=0o755)
    os.chown(folder, 1001, 1001)


def make_link(folder: Path) -> None:
    folder.symlink_to("/")


def make_pipe(folder: Path) -> None:
    """Whoever opens it would wait for its other end."""
    folder.mkdir()
    folder.chmod(0o1777)
    os.mkfifo(folder / "1.lock")
    (folder / "1.lock").chmod(0o666)


def make_linked_lock(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o1777)
    (folder / "1.lock").symlink_to("/etc/passwd")
    os.chown(folder / "1.lock", 1002, -1, follow_symlinks=False)  # fs.protected_symlinks shall not be what refuses it


def make_file(folder: Path) -> None:
    folder.touch()


@pytest.mark.parametrize("make", [make_private, make_others, make_link, make_pipe, make_linked_lock, make_file])
def test_whatever_somebody_made_of_the_shared_folder_is_no_obstacle(make: Callable[[Path], None]) -> None:
    """Jobs of one user still get different devices, and what is not certain any more is said."""
    if os.geteuid():
        pytest.skip("needs root, to be two users")
    with tempfile.TemporaryDirectory() as outer:
        Path(outer).chmod(0o1777)  # as /tmp
        shared = Path(outer, "gpus")
        make(shared)
        found = as_user(1002, lambda: [str(part) for part in lock_folder(FOUR, shared)])
        folder, problem = found
        assert folder == f"{shared}-1002" and "jobs of other users may get the same GPUs" in problem
        assert lease_as(1002, 4, Path(folder)) == FOUR
        shutil.rmtree(folder)
        make_others(Path(folder))  # of user 1001, who was quicker there, too
        assert "Remove" in as_user(1002, lambda: str(lock_folder(FOUR, shared)))[0]


def as_user(user: int, work: Callable[[], object]) -> list[str]:
    """What another user gets from `work`: texts, or the one of an error in the job."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may go on here
        signal.alarm(20)  # nor may it wait for ever
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            os.write(write, repr(work()).encode())
        except JobError as error:
            os.write(write, repr([str(error)]).encode())
        except BaseException as error:
            os.write(write, repr([f"no error for a user: {error!r}"]).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as pipe:
        return list(ast.literal_eval(pipe.read()))


@pytest.fixture
def supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervisor:
    """Of a run on a machine with one GPU."""
    module = "trainer.launch.local.supervisor"
    monkeypatch.setattr(f"{module}.visible_devices", lambda: ["0"])
    monkeypatch.setattr(f"{module}.lock_folder", partial(lock_folder, shared=tmp_path / "gpus"))
    return Supervisor(RunFolder(tmp_path), job(), Nodes(RunFolder(tmp_path), job()))


def test_a_job_waits_for_its_devices_and_says_so(supervisor: Supervisor, tmp_path: Path) -> None:
    held = try_lease(1, ["0"], tmp_path / "gpus")
    assert held is not None
    soon = threading.Timer(0.7, held.release)
    soon.start()
    assert supervisor.take_lease()
    assert supervisor.lease.devices == ["0"] and not held.handles
    (event,) = RunFolder(tmp_path).read_events()
    me = f"{re.escape(user_name(os.geteuid()))}, which began [A-Z][a-z]{{2}} [0-9]{{2}} [0-9:]{{5}}"
    expected = (
        rf"waiting for GPUs: 1 of 0 \(held: 0: process {os.getpid()} of {me}\); it starts when other runs here .*"
    )
    assert event["event"] == "pending" and re.fullmatch(expected, event["reason"])
    soon.join()


def test_a_job_that_waits_can_be_stopped(supervisor: Supervisor, tmp_path: Path) -> None:
    held = try_lease(1, ["0"], tmp_path / "gpus")
    threading.Timer(0.2, supervisor.handle, (signal.SIGTERM, None)).start()
    assert not supervisor.take_lease()
    assert held is not None and held.handles


@pytest.mark.parametrize(
    ("mask", "expected"), [(None, FOUR), ("2,3", ["2", "3"]), ("", []), (" 3 , 1", ["3", "1"])]
)  # fmt: skip
def test_only_what_the_mask_shows(mask: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.wiring.devices.gpu_files", lambda: [f"nvidia{number}" for number in FOUR])
    if mask is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mask)
    assert visible_devices() == expected


def test_a_container_with_some_counts_them_from_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """Device files keep the machine's numbers there, CUDA does not."""
    monkeypatch.setattr("trainer.wiring.devices.gpu_files", lambda: ["nvidia10", "nvidia3"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_devices() == ["0", "1"]


def test_a_mask_without_a_gpu_shows_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.wiring.devices.gpu_files", list)
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", "0,1")
    assert visible_devices() == []


@pytest.mark.parametrize(
    ("keys", "visible", "expected"),
    [
        ({"devices_per_node": 2}, FOUR, 2),
        ({"devices_per_node": 2, "nodes": 2}, FOUR, 4),
        ({"devices_per_node": 2}, [], 0),
        ({"devices_per_node": 8}, FOUR, 0),
        ({"devices_per_node": 2, "device": "cpu"}, FOUR, 0),
        ({"devices_per_node": 3, "devices": [2, 3, 1]}, FOUR, ["2", "3", "1"]),
    ],
)
def test_what_a_job_wants(keys: dict[str, object], visible: list[str], expected: object) -> None:
    assert wanted_devices(job(**keys), visible) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"devices_per_node": 8, "device": "cuda"}, r"devices_per_node=8: 8 GPUs are needed .* shows 4"),
        ({"devices_per_node": 1, "devices": [7]}, r"devices=\[7\]: this machine has the devices 0, 1, 2, 3"),
    ],
)
def test_what_a_machine_cannot_give_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(JobError, match=message):
        wanted_devices(job(**keys), FOUR)
