"""The docker platform's site file: each key becomes the option that it says, in what `muster render` prints."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest
from paths import ROOT

from trainer.errors import JobError
from trainer.launch.docker.engine import refusal
from trainer.launch.submit import render_job

RUN = "/big/digits-ID"


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with four GPUs and no InfiniBand."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("trainer.wiring.devices.gpu_files", lambda: [f"nvidia{number}" for number in range(4)])
    monkeypatch.setattr("trainer.launch.docker.platform.INFINIBAND", Path("/nowhere"))
    monkeypatch.setattr(os, "getgroups", lambda: [os.getgid()])


def command_lines(folder: Path, text: str, *overrides: str) -> list[list[str]]:
    """The words of each docker command."""
    site = folder / "site.yaml"
    site.write_text(text)
    rendered = render_job("jobs/digits.yaml", ["runs=/big", *overrides], "docker", site)
    lines = [line for line in rendered.splitlines() if line.startswith("docker ")]
    return [shlex.split(line.removesuffix("\\").rstrip().removesuffix(";")) for line in lines]


def own(words: list[str]) -> list[str]:
    """Without what every container of a run gets."""
    return [word for word in words if not word.startswith("--env=MUSTER_") or "VISIBLE" in word]


def test_the_whole_command_line(tmp_path: Path) -> None:
    mount = tmp_path / "data"
    mount.mkdir()
    (tmp_path / "secrets").write_text("KEY=hush\n")
    text = (
        f"registry: host:5000/team/\nmounts: ['{mount}:/data:ro', '{mount}:/more']\nshm: 2g\nnetwork: lan\n"
        f"fabric: roce\nenv_file: {tmp_path / 'secrets'}\nextra_args: [--cpus=16]\n"
    )
    (words,) = command_lines(tmp_path, text, "device=cpu", "agent.grace_s=20")
    assert own(words) == [
        "docker", "run", "--rm", "--name=muster-digits-ID-0", "--network=lan", f"--user={os.getuid()}:{os.getgid()}",
        "--stop-timeout=35", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only", "--pids-limit=16384",
        f"--mount=type=bind,source={RUN},target={RUN}", f"--workdir={RUN}/code",
        "--hostname=node0", "--network-alias=node0", "--volume=/tmp", "--shm-size=2g",
        f"--mount=type=bind,source={mount},target=/data,readonly", f"--mount=type=bind,source={mount},target=/more",
        "--env=NCCL_IB_GID_INDEX=3", "--env=NCCL_IB_TC=106", f"--env-file={tmp_path / 'secrets'}", "--cpus=16",
        "host:5000/team/muster", f"{RUN}/job.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "devices", "visible"),
    [
        (["devices_per_node=2"], "0,1", "0,1"),
        # Inside, the GPUs are numbered from 0 in the machine's order; the primary stays the first.
        (["devices_per_node=3", "devices=[2,3,1]", "train.batch_size=60"], "2,3,1", "1,2,0"),
    ],
)
def test_gpus(tmp_path: Path, overrides: list[str], devices: str, visible: str) -> None:
    words = command_lines(tmp_path, "{}", *overrides)[-1]
    assert f'--gpus="device={devices}"' in words  # with quotes, or docker splits it at the comma
    assert f"--env=MUSTER_VISIBLE_DEVICES={visible}" in words
    assert not [word for word in words if "ulimit" in word or "infiniband" in word]


def test_each_node_gets_its_own_gpus(tmp_path: Path) -> None:
    network, *nodes = command_lines(tmp_path, "{}", "nodes=2", "devices_per_node=2")
    assert network == ["docker", "network", "create", "muster-digits-ID"]
    assert [word for words in nodes for word in words if word.startswith("--gpus")] == [
        '--gpus="device=0,1"', '--gpus="device=2,3"',
    ]  # fmt: skip


def test_infiniband_comes_with_the_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.launch.docker.platform.INFINIBAND", tmp_path)
    wanted = ["--ulimit=memlock=-1", "--ulimit=stack=67108864", "--device=/dev/infiniband"]
    assert set(wanted) <= set(command_lines(tmp_path, "{}")[-1])
    assert not set(wanted) & set(command_lines(tmp_path, "{}", "device=cpu")[-1])


@pytest.mark.parametrize(
    ("text", "overrides", "word"),
    [
        ("shm: host", [], "--ipc=host"),
        ("shm: auto", [], "--shm-size=256m"),
        ("shm: auto", ["data.workers=2", "data.prefetch=3"], "--shm-size=1024m"),
        ("network: host", [], "--network=host"),
    ],
)
def test_shared_memory_and_network(tmp_path: Path, text: str, overrides: list[str], word: str) -> None:
    words = command_lines(tmp_path, text, "device=cpu", *overrides)[-1]
    assert word in words
    assert ("--hostname=node0" in words) == (word != "--network=host")


def test_nodes_on_the_machines_own_network_are_on_this_machine(tmp_path: Path) -> None:
    for words in command_lines(tmp_path, "network: host", "nodes=2", "device=cpu"):
        assert "--env=MUSTER_HOSTNAMES=127.0.0.1,127.0.0.2" in words


OWN = f"--user={os.getuid()}:{os.getgid()}"
PODMAN = 'case "$*" in --version) echo podman version 4.9.4 ;; *Rootless*) echo {rootless} ;; *) exit 125 ;; esac'
DOCKER = """case "$*" in --version) echo Docker version 26.1.5 ;; info*) echo '["name=seccomp"{security}]' ;; esac"""


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (DOCKER.format(security=""), [OWN, "--group-add=4711"]),
        (DOCKER.format(security=',"name=userns"'), ["--userns=host", OWN, "--group-add=4711"]),
        (DOCKER.format(security=',"name=rootless","name=cgroupns"'), ["--userns=host", "--user=0:0"]),
        (PODMAN.format(rootless="true"), ["--userns=keep-id", OWN, "--group-add=keep-groups"]),
        (PODMAN.format(rootless="false"), [OWN, "--group-add=4711"]),
        ("echo Cannot connect >&2; exit 1", [OWN, "--group-add=4711"]),
    ],
    ids=["docker", "userns-remap", "rootless", "rootless podman", "podman", "no engine"],
)
def test_inside_it_is_the_same_user_whatever_the_engine_maps(
    program: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the groups that this user has here: data may be readable through one of them alone."""
    (tmp_path / "docker").write_text(f"#!/bin/sh\n{program}\n")
    (tmp_path / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "getgroups", lambda: [os.getgid(), 4711])
    words = command_lines(tmp_path, "{}", "device=cpu")[-1]
    assert words[5 : 5 + len(expected) + 1] == [*expected, "--stop-timeout=45"]


@pytest.mark.parametrize(
    ("text", "own"),
    [
        ("mounts: ['{tmp}:/tmp']", False), ("extra_args: ['--tmpfs=/tmp:size=1g']", False),
        ("extra_args: [-v, '/big:/tmp']", False), ("mounts: ['{tmp}:/tmpfiles']", True),
    ],
)  # fmt: skip
def test_what_a_site_puts_at_tmp_stays_alone_there(tmp_path: Path, text: str, own: bool) -> None:
    """The engine refuses two."""
    words = command_lines(tmp_path, text.format(tmp=tmp_path), "device=cpu")[-1]
    assert ("--volume=/tmp" in words) == own


def test_paths_with_commas(tmp_path: Path) -> None:
    """The value of --mount is CSV."""
    (tmp_path / "a,b").mkdir()
    words = command_lines(tmp_path, f"mounts: ['{tmp_path}/a,b:/data']", "device=cpu", "name=x", "runs=/big/1,2")[-1]
    assert f'--mount=type=bind,"source={tmp_path}/a,b",target=/data' in words
    assert '--mount=type=bind,"source=/big/1,2/x-ID","target=/big/1,2/x-ID"' in words


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("could not find an available, non-overlapping IPv4 address pool among the defaults", "docker network prune"),
        ("all predefined address pools have been fully subnetted", "docker network prune"),
        ("invalid mount config for type bind: bind source path does not exist: /home/me/runs", "DOCKER_HOST"),
        ("Mounts denied: the path /data is not shared from the host", "DOCKER_HOST"),
        ("newuidmap: write to uid_map failed: Operation not permitted", "/etc/subuid"),
        ("Got permission denied while trying to connect to the Docker daemon socket", "usermod"),
        ("Cannot connect to the Docker daemon at unix:///var/run/docker.sock", "systemctl start docker"),
        ("something new", "Correct docker/site.yaml"),
    ],
)
def test_a_refusal_of_the_engine_has_its_remedy(said: str, remedy: str) -> None:
    assert remedy in str(refusal(f"Error response from daemon: {said}"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mounts: [data:relative]", r"mounts='data:relative'.*absolute"),
        ("mounts: ['/nowhere:/data']", r"mounts=.*/nowhere does not exist here"),
        ("env_file: /nowhere", r"env_file='/nowhere'.*NAME=value"),
        ("fabric: token-ring", r"fabric='token-ring'"),
    ],
)
def test_what_the_engine_would_not_refuse_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        command_lines(tmp_path, text)


def test_the_commands_come_before_the_job(tmp_path: Path) -> None:
    """All of them on one line for the shell, which then reads the job from the lines below."""
    (tmp_path / "site.yaml").touch()
    words = [f"runs={tmp_path}", "nodes=2", "device=cpu"]
    lines = render_job("jobs/digits.yaml", words, "docker", tmp_path / "site.yaml").splitlines()
    assert [line.split()[0] for line in lines[:7]] == ["umask", "mkdir", "cat", "docker", "docker", "docker", "name:"]
    assert [line[-3:] for line in lines[3:5]] == ["; \\", "& \\"] and not lines[5].endswith(("\\", "&"))
    assert all(line.endswith("\\") for line in lines[:5])
