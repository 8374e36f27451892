"""Strangers around a live job on two nodes: it ends as if nobody had been there, and nobody learns its secret.

They know all that `squeue`, `ps` and a port scan tell, and not the secret. Ranks trust each other no more than needed:
the last test has one that is a stranger.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import ranks
import strangers
import torch
from muster_runs import Run, command_line, descendants, end_all, kill, start_agent
from strangers import call, impostors, lingering, nonsense, scribble, stores

from trainer.config.job import Job
from trainer.wiring.network import candidate_ports

STEPS = 150
KEYS = ("task=slow_digits:SlowDigits", f"train.steps={STEPS}", "checkpoint.every_steps=50", "devices_per_node=1")
TRICKS = [[strangers.echo, strangers.replay], [strangers.greet], [strangers.relay], [strangers.close], [strangers.hang]]


@contextmanager
def agents(run: Run, *overrides: str, **variables: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two agents of a user who lets everybody read what is made, unless a program knows better."""
    run.folder.mkdir(mode=0o755, exist_ok=True)
    before = os.umask(0)
    try:
        yield [start_agent(run, node, 2, *KEYS, *overrides, **variables) for node in range(2)]
    finally:
        os.umask(before)
        end_all(run)


def weights(run: Run) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(
        run.folder / f"checkpoints/step-{STEPS:09d}/model.pt", weights_only=True
    )
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same training with nobody around; its agents make a secret, because they were given none."""
    run = Run(tmp_path_factory.mktemp("undisturbed") / "run")
    with agents(run, "task_args.step_s=0") as both:
        assert [agent.wait(60) for agent in both] == [0, 0], run.folder
    return run


def test_the_agents_make_a_secret_for_their_users_eyes_alone(undisturbed: Run) -> None:
    assert (undisturbed.folder / "secret").stat().st_mode & 0o777 == 0o600
    assert len((undisturbed.folder / "secret").read_text().strip()) == 64


def known_by(secret: str, run: Run) -> list[str]:
    """Where others than the agents have it: files of the run, command lines, the environments of what they start."""
    places = {str(path): path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    for agent in run.agents().values():
        started = descendants(agent)
        places |= {f"command line of {pid}": command_line(pid) for pid in (agent, *started)}
        places |= {f"environment of {pid}": Path(f"/proc/{pid}/environ").read_bytes() for pid in started}
    return [place for place, content in places.items() if secret.encode() in content]


def test_a_job_trains_on_among_strangers(tmp_path: Path, undisturbed: Run) -> None:
    """Impostors have all ports but one before it starts, and it starts again among callers that stay."""
    run, hacked, secret = Run(tmp_path / "run"), tmp_path / "hacked", secrets.token_hex(32)
    ports, public = candidate_ports(f"{run.job_id}/0"), f"muster {run.job_id}/0 ".encode()
    port = ports[len(TRICKS)]
    slow = ("task_args.step_s=0.5", f"task_args.until={tmp_path / 'go on'}")
    with ExitStack() as stack:
        false = stack.enter_context(impostors(ports, TRICKS, public))
        both = stack.enter_context(agents(run, *slow, MUSTER_SECRET=secret))
        run.wait("first_step")
        assert all(each.callers and not each.open for each in false), "one of them was taken for node 0"
        assert known_by(secret, run) == []
        stack.enter_context(lingering(port, public, 250))
        with ThreadPoolExecutor(8) as pool:
            for data in (*nonsense(public), b"".join(false[2].said)):
                pool.submit(call, port, data)
        kill(both[1].pid)
        both[1].wait()
        both[1] = start_agent(run, 1, 2, *KEYS, *slow, MUSTER_SECRET=secret)
        run.wait("first_step", 2)
        assert not any(each.open for each in false)
        (store,) = stores(both[0].pid)
        assert scribble(store, hacked)
        (tmp_path / "go on").touch()
        codes = [agent.wait(60) for agent in both]
        if codes != [0, 0]:  # who reaches the ranks' store may end a run, and nothing else: it goes on from there
            again = stack.enter_context(agents(run, *slow, MUSTER_SECRET=secret, MUSTER_LAUNCH="1"))
            assert [agent.wait(60) for agent in again] == [0, 0], run.folder
    assert not hacked.exists(), "a rank ran a stranger's code"
    expected, found = weights(undisturbed), weights(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert known_by(secret, run) == []


def _train_and_lie(file: Path, *arguments: Any) -> None:
    """A rank that trains, and whatever it tells the others is a pickle that makes `file`."""
    from torch.distributed import distributed_c10d

    lie = pickle.dumps(strangers.Payload(file), 0)
    told = torch.frombuffer(bytearray(lie), dtype=torch.uint8)
    distributed_c10d._object_to_tensor = lambda *_: (told, torch.tensor([len(lie)]))
    json.dumps = lambda *_, **__: lie.decode()  # type: ignore[assignment]
    ranks._train_rank(*arguments)


def test_a_rank_that_lies_runs_no_code_in_the_others(tmp_path: Path) -> None:
    job: Job = ranks.make_job("train.steps=4", "checkpoint.every_steps=2", "devices_per_node=2")
    hacked, folder = tmp_path / "hacked", tmp_path / "run"
    folder.mkdir()
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.free_port()),
              "MUSTER_ATTEMPT": "0", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}  # fmt: skip
    environment = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    liar = ranks.start(_train_and_lie, hacked, job, folder, environment[0], None)
    honest = ranks.start(ranks._train_rank, job, folder, environment[1], None)
    honest.join(30)
    for process in (liar, honest):
        process.kill()
        process.join()
    assert not hacked.exists(), "a rank ran a stranger's code"
    assert honest.exitcode not in (0, None, -9), "the lies did not reach it"
