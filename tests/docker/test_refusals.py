"""What stands in the way of a container is one line that names the remedy, and exit code 64."""

import subprocess

import pytest
from docker_runs import Runs
from engine import cache_folder

from trainer.errors import JobError
from trainer.launch.submit import submit_job

pytestmark = pytest.mark.timeout(600)  # the first test of a session may have to make everything


def refused(runs: Runs, *words: str, prefix: tuple[str, ...] = ()) -> str:
    """The one line that `muster run` prints."""
    done = runs.muster("run", *runs.words("device=cpu", "train.steps=5", *words), check=False, prefix=prefix)
    assert done.returncode == 64, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_no_docker_command(runs: Runs) -> None:
    runs.environment["PATH"] = str(runs.folder)
    assert "Install Docker" in refused(runs)


def test_no_engine(runs: Runs) -> None:
    runs.environment["DOCKER_HOST"] = "unix:///nowhere/docker.sock"
    assert "systemctl start docker" in refused(runs)


def test_no_permission(runs: Runs) -> None:
    """Root without the capability to pass over a socket's mode is as everybody else."""
    runs.engine.socket.chmod(0)
    try:
        line = refused(runs, prefix=("setpriv", "--bounding-set=-dac_override,-dac_read_search"))
    finally:
        runs.engine.socket.chmod(0o660)
    assert "usermod -aG docker" in line


def test_no_image(runs: Runs) -> None:
    runs.set_site("image: nothing-of-that-name")
    assert "Run muster image" in refused(runs)


def test_no_script(runs: Runs) -> None:
    assert "script='nowhere.py': is not in" in refused(runs, "task=null", "script=nowhere.py")


def test_no_image_of_a_registry(runs: Runs) -> None:
    runs.set_site("image: muster:1", "registry: localhost:5000/team")
    assert "docker pull localhost:5000/team/muster:1" in refused(runs)


def test_no_gpu_toolkit(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is told that it has a GPU; its engine knows none."""
    monkeypatch.setattr("trainer.launch.docker.platform.visible_devices", lambda: ["0"])
    for name in ("PATH", "DOCKER_HOST", "DOCKER_CONFIG"):
        monkeypatch.setenv(name, runs.environment[name])
    with pytest.raises(JobError, match="NVIDIA container toolkit"):
        submit_job("jobs/digits.yaml", ["devices_per_node=1", f"runs={runs.folder}"], "docker", runs.site)


def test_no_gpu_driver_when_the_container_starts(runs: Runs) -> None:
    """Only its start tells, after the submission: the reason is the run's."""
    runs.set_site("extra_args: [--gpus=all]")
    status = runs.wait_end(runs.submit("parallel=single", "device=cpu"))
    assert (status["state"], status["code"]) == ("failed", 64)
    assert "NVIDIA container toolkit" in status["reason"]


def test_a_full_disk(runs: Runs) -> None:
    """The folder that the engine keeps containers in, in the engine's own view of the machine, has no room left."""
    inside = ["nsenter", f"--mount=/proc/{runs.engine.process_1}/ns/mnt", "--"]
    place = str(cache_folder() / "data" / "containers")
    subprocess.run([*inside, "mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", place], check=True)
    try:
        line = refused(runs)
    finally:
        subprocess.run([*inside, "umount", place], check=True)
    assert "docker system prune" in line


@pytest.mark.parametrize(
    ("setting", "word"),
    [("extra_args: [--no-such-option]", "no-such-option"), ("network: nowhere", "nowhere")],
    ids=["option", "network"],
)
def test_a_site_that_the_engine_refuses(runs: Runs, setting: str, word: str) -> None:
    runs.set_site(setting)
    line = refused(runs)
    assert word in line and "Correct docker/site.yaml" in line
