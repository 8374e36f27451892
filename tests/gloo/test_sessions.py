"""Scripts on a session: killed after every step, stopped and resumed at another world size, as if nothing happened."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from muster_runs import FULL, HERE, environment
from paths import ROOT
from ranks import events, order_of_samples, samples_of_steps
from session_runs import train_struck
from states import difference, read_state

from trainer.errors import DONE, FAILED, STOPPED
from trainer.records import read_lines

TORCHRUN = Path(sys.executable).with_name("torchrun")
EPOCHS, STEPS_PER_EPOCH = 2, 6
STEPS = EPOCHS * STEPS_PER_EPOCH


class Script(NamedTuple):
    """A training of two epochs with six steps each, the last of them smaller."""

    path: Path
    words: tuple[str, ...]
    samples: int
    moments: int = 3
    """At which `struck.py` may strike, in each step."""
    every: int = 5
    """In each so-manieth step it does, unless FULL; so that each rank is struck, and at one moment after the other."""


SCRIPTS = {
    "digits": Script(ROOT / "jobs/digits_script.py", ("--epochs=2", "--batch-size=240"), 1438, every=1),
    "gan": Script(ROOT / "jobs/gan_script.py", ("--steps=12", "--batch-size=300"), 1797, 5, 3),
    "tutorial": Script(HERE / "tutorial_script.py", ("--epochs=2", "--samples=203", "--batch-size=36"), 203),
    "gpt": Script(
        HERE / "gpt_script.py", ("--steps=12", "--samples=101", "--batch-size=18", "--accumulate=2"), 101, 4, 3
    ),
}
PRELOAD = "preload=[sklearn.datasets]"
ALWAYS = [*((name, 2) for name in SCRIPTS), ("gpt", 1)]
Calm = Callable[[str, int], Path]


def train(folder: Path, name: str, ranks: int, plan: str = "calm", *keys: str, code: int = DONE) -> str:
    """Train in `folder`, or go on there, as the agent of one node; return what it printed."""
    script = SCRIPTS[name]
    keys = f"devices_per_node={ranks}", PRELOAD, *keys
    return train_struck(folder, plan, script.path, script.words, *keys, code=code)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """The run that nothing happens to, of a script with a number of ranks; trained when it is first asked for."""

    @cache
    def trained(name: str, ranks: int) -> Path:
        folder = tmp_path_factory.mktemp(f"calm-{name}-{ranks}")
        train(folder, name, ranks)
        return folder

    return trained


def logged(run: Path) -> dict[tuple[str, int], dict[str, float]]:
    """What the script logged of each step and found in each evaluation; what a later attempt did again counts."""
    of_attempt = ("time", "attempt", "kind", "step", "samples_per_s")
    lines = read_lines(run / "metrics.jsonl")
    return {
        (line["kind"], line["step"]): {key: value for key, value in line.items() if key not in of_attempt}
        for line in lines
    }


def assert_as_if_nothing_had_happened(run: Path, calm: Path, name: str) -> None:
    """Same weights, optimizers, losses and order; each sample once in each epoch."""
    assert difference(read_state(calm), read_state(run)) == ""
    assert logged(run) == logged(calm) and len(logged(run)) >= STEPS
    assert_order(run, calm, name)


def assert_order(run: Path, calm: Path, name: str) -> None:
    """The same samples in each step; which rank and micro-batch has which depends on their number."""
    steps, calm_steps = (
        {at: sorted(samples) for at, samples in samples_of_steps(each).items()} for each in (run, calm)
    )
    assert steps == calm_steps and len(steps) == STEPS
    order = order_of_samples(run)
    assert all(sorted(order[epoch]) == list(range(SCRIPTS[name].samples)) for epoch in range(EPOCHS))


@pytest.mark.parametrize("name, ranks", [(name, ranks) for name in SCRIPTS for ranks in (1, 2, 4)] if FULL else ALWAYS)
def test_kill_after_each_step(tmp_path: Path, calm: Calm, name: str, ranks: int) -> None:
    """One rank after the other, now and then all at once; at one moment of a step, or FULL: at every one.

    The digits on two ranks are struck in each step; of the others a sample is, because what differs is what they keep.
    """
    run, expected = tmp_path / "run", calm(name, ranks)
    every = 1 if FULL else SCRIPTS[name].every if ranks == 2 else 5
    moments = "all" if FULL else f"{SCRIPTS[name].moments}/{every}"
    lines = [line for line in read_lines(expected / "metrics.jsonl") if line["kind"] == "train"]
    assert all(line["samples_per_s"] > 0 for line in lines)
    train(run, name, ranks, f"kill:{moments}")
    struck = {int(path.name.partition("-")[0]) for path in (run / "strikes").iterdir()}
    assert struck >= set(range(0, STEPS, every)), "some step was never struck"
    assert {event["folder"] for event in events(run, "resume")} == {"memory"}
    assert_as_if_nothing_had_happened(run, expected, name)


@pytest.mark.parametrize("name", SCRIPTS if FULL else ["digits", "gpt"])
def test_stop_and_resume_at_another_world_size(tmp_path: Path, calm: Calm, name: str) -> None:
    run, expected = tmp_path / "run", calm(name, 1)
    few = ((4, 4),) if name == "digits" else ((2, 4),)
    for ranks, step in ((2, 2), (1, 4), (4, 8)) if FULL else few:
        train(run, name, ranks, f"stop-in:{step}", code=STOPPED)
        assert events(run, "stopped")[-1]["step"] >= step
    train(run, name, 2 if few == ((4, 4),) else 1)
    assert_order(run, expected, name)
    if name == "digits":  # no random numbers of a rank's own
        pairs = zip(logged(run).items(), logged(expected).items(), strict=True)
        assert all(one == (at, pytest.approx(values, rel=1e-3, abs=0.01)) for one, (at, values) in pairs)


def start(folder: Path, code: int, plan: str, *command: str | Path) -> str:
    """Train the digits without an agent in `folder`, or go on there; return what was printed."""
    script = SCRIPTS["digits"]
    words = [folder / "strikes", plan, script.path, *script.words, f"--folder={folder}"]
    # Or the ranks that torchrun starts again would find in its store what those before them wrote (torch 2.13).
    variables = {**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        list(map(str, [*command, HERE / "struck.py", *words])), env=variables, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, timeout=400, cwd=folder.parent,
    )  # fmt: skip
    assert done.returncode == code, done.stdout
    return done.stdout


def test_the_same_script_as_a_plain_program(tmp_path: Path, calm: Calm) -> None:
    """Of Python, and of torchrun, which starts it again; if FULL it is asked to stop there, too."""
    run, torchrun = tmp_path / "run", [TORCHRUN, "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    start(run, STOPPED, "stop-in:2", sys.executable)
    said = start(run, FAILED if FULL else DONE, "kill-in:4,stop-in:9" if FULL else "kill-in:4", *torchrun)
    assert "(exitcode: -9)" in said, said
    if FULL:
        assert said.count(f"exitcode  : {STOPPED} ") > 0 and said.count("(exitcode: -9)") == 1, said
        start(run, DONE, "calm", sys.executable)
    assert_order(run, calm("digits", 1), "digits")
    assert [event["world_size"] for event in events(run, "training")] == [1, 2, 2, *([1] if FULL else [])]
