"""The launch contract: the same job file starts the same agents, wired alike, on every platform of the registry.

Each platform's rendering is read as its own tool would read it, and turned into what the agent of each node gets: a
command, a job file and an environment. Those environments are then wired by the code that runs on the nodes.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifest_rules import container, job_spec, only
from paths import ROOT

from trainer.config.job import Job
from trainer.config.load import merge_job, to_job, to_text
from trainer.launch.local.gpu_lease import Lease
from trainer.launch.local.platform import Nodes
from trainer.launch.platform import REGISTRY, Plan, find_platform
from trainer.run.folder import RunFolder
from trainer.wiring.node import Wiring, wire

NODES = 3
OVERRIDES = [f"nodes={NODES}", "devices_per_node=2", "train.batch_size=60", "train.lr=0.25", "seed=7", "task_args={}"]


@dataclass
class Launch:
    """What a platform starts on one node."""

    command: list[str]
    """From the interpreter on, without its folder."""
    job: Job
    environment: dict[str, str]
    grace_s: float
    """From the request to stop to the kill."""
    gpus: int | None = None
    """GPUs that the node is asked for; None when the rendering does not say."""


def words_after(words: list[str], head: str) -> list[str]:
    return words[next(index for index, word in enumerate(words) if Path(word).name == head) + 1 :]


def last_command(text: str) -> list[str]:
    """The words of the command that starts all, above what it is handed."""
    return shlex.split(next(line for line in text.splitlines() if not line.endswith("\\")))


def agent_command(words: list[str]) -> tuple[list[str], Path]:
    """The command without folders, and its job file."""
    return [re.sub(r"^python[\d.]*$", "python", Path(words[0]).name), *words[1:-1]], Path(words[-1])


def entrypoint() -> list[str]:
    """What our image starts, behind its init."""
    (line,) = re.findall(r"^ENTRYPOINT (\[.*\])$", (ROOT / "docker/Dockerfile").read_text(), re.M)
    words = yaml.safe_load(line)
    return words[words.index("--") + 1 :]


def local(plan: Plan, text: str) -> list[Launch]:
    """The supervisor that is rendered starts one process a node; it kills after the same grace."""
    assert last_command(text)[1:] == [str(ROOT / "muster.py"), "supervisor", str(plan.run)]
    launches = []
    for node in range(plan.job.nodes):
        words, variables = Nodes(plan.run, plan.job).command(node, 0, Lease([]))
        command, path = agent_command(words)
        launches.append(Launch(command, to_job(merge_job(path)), variables, plan.job.agent.grace_s))
    return launches


def docker(plan: Plan, text: str) -> list[Launch]:
    """Lines of `docker run`: options, image, and the job file for the image's entrypoint."""
    launches = []
    for line in text.splitlines():
        if line.startswith("docker run "):
            words = [word for word in shlex.split(line.removesuffix("\\")) if word != "&"]
            options = dict(
                word.removeprefix("--env=").partition("=")[::2] for word in words if word.startswith("--env=")
            )
            (stop,) = (word.partition("=")[2] for word in words if word.startswith("--stop-timeout="))
            command, path = agent_command([*entrypoint(), words[-1]])
            launches.append(Launch(command, to_job(merge_job(path)), options, float(stop)))
    return launches


def slurm(plan: Plan, text: str) -> list[Launch]:
    """The sbatch line behind the script, and the variables that slurmd gives to each task of its srun."""
    words = last_command(text)
    flags = dict(word.partition("=")[::2] for word in words_after(words, "sbatch") if word.startswith("--"))
    inner = [word for word in words_after(words, "job.sbatch") if not word.startswith("--")]
    command, path = agent_command(inner)
    gpus = flags.get("--gpus-per-node")
    shared = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_JOB_NUM_NODES": flags["--nodes"],
              "SLURM_STEP_NUM_NODES": flags["--nodes"], "SLURM_NTASKS": flags["--nodes"],
              "SLURM_JOB_NODELIST": f"node[0-{int(flags['--nodes']) - 1}]", "SLURM_LOCALID": "0"}  # fmt: skip
    return [
        Launch(command, to_job(merge_job(path)), {**shared, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)},
               float(flags["--signal"].partition("@")[2]), int(gpus) if gpus else None)
        for node in range(int(flags["--nodes"]))
    ]  # fmt: skip


def kubernetes(plan: Plan, text: str) -> list[Launch]:
    """The Job's pods: the Job controller adds the index, the kubelet resolves the downward API."""
    documents = list(yaml.safe_load_all(text))
    pod, spec = container(documents), job_spec(documents)
    command, _ = agent_command([*pod.get("command", entrypoint()), *pod["args"]])
    path = plan.run.path / "from-the-configmap.yaml"
    path.write_text(only(documents, "ConfigMap")["data"]["job.yaml"])
    labels = {"metadata.labels['batch.kubernetes.io/controller-uid']": "0f1e2d3c"}
    environment = {
        entry["name"]: entry["value"] if "value" in entry else labels[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in pod["env"]
    }
    gpus = pod["resources"]["limits"].get("nvidia.com/gpu")
    return [
        Launch(command, to_job(merge_job(path)), {**environment, "JOB_COMPLETION_INDEX": str(index)},
               spec["template"]["spec"]["terminationGracePeriodSeconds"], int(gpus) if gpus else None)
        for index in range(spec["completions"])
    ]  # fmt: skip


READERS: dict[str, Callable[[Plan, str], list[Launch]]] = {
    "local": local, "docker": docker, "slurm": slurm, "kubernetes": kubernetes,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def launch(platform_name: str, folder: Path, *overrides: str, **site: Any) -> list[Launch]:
    """What the platform starts for the same job, from what `muster render` prints of it."""
    platform = find_platform(platform_name)
    config = merge_job("jobs/digits.yaml", [*OVERRIDES, *overrides])
    run = folder / "digits-0123-456789-abcd"
    run.mkdir(exist_ok=True)
    (run / "job.yaml").write_text(to_text(config))
    facts = platform.load_site(None)
    plan = Plan(to_job(config), to_text(config), RunFolder(run), replace(facts, **site) if site else facts)
    return READERS[platform_name](plan, platform.render(platform.build(plan)))


def wire_node(found: Launch, monkeypatch: pytest.MonkeyPatch) -> Wiring:
    """Wire as the agent does, with nothing but the platform's variables."""
    with monkeypatch.context() as patch:
        for name in list(os.environ):
            patch.delenv(name)
        for name, value in found.environment.items():
            patch.setenv(name, value)
        return wire(found.job.nodes, found.job.devices_per_node, found.job.devices)


@pytest.mark.parametrize("platform", REGISTRY)
def test_the_same_job_is_launched_alike(platform: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert platform in READERS, f"say above how {platform} hands a launch over"
    monkeypatch.setattr("trainer.wiring.node.route_to", lambda address: ("10.0.0.1", "eth0"))
    launches = launch(platform, tmp_path, "device=cpu")
    expected = to_job(merge_job("jobs/digits.yaml", [*OVERRIDES, "device=cpu"]))
    assert len(launches) == NODES
    wirings = [wire_node(found, monkeypatch) for found in launches]
    for node, (found, wiring) in enumerate(zip(launches, wirings, strict=True)):
        by_path = platform in ("local", "slurm")  # the same environment
        assert found.command == ["python", *([str(ROOT / "muster.py")] if by_path else ["-m", "muster"]), "agent"]
        assert found.job == expected
        assert found.grace_s >= expected.agent.grace_s
        assert (wiring.platform, wiring.nodes, wiring.node_rank) == (platform, NODES, node)
        assert (wiring.devices_per_node, wiring.launch) == (2, 0)
        assert wiring.master_addr == wiring.hostnames[0]
        assert len(set(wiring.hostnames)) == NODES
    for name in ("job_id", "hostnames", "ports"):
        assert len({getattr(wiring, name) for wiring in wirings}) == 1, f"{name} differs between nodes"
    assert all(name not in found.environment for found in launches for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))


@pytest.mark.parametrize(("platform", "site"), [("slurm", {}), ("kubernetes", {"gpu": "nvidia.com/gpu"})])
def test_each_node_is_asked_for_its_devices(platform: str, site: dict[str, Any], tmp_path: Path) -> None:
    found = launch(platform, tmp_path, "device=cuda", **site)
    assert [node.gpus for node in found] == [2] * NODES
