"""Hugging Face's Trainer and Lightning's on a session: killed after every step, stopped, and resumed elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from muster_runs import FULL, HERE, environment
from paths import ROOT
from ranks import samples_of_steps
from session_runs import train_struck
from states import difference, read_state

from trainer.data.sampler import epoch_order
from trainer.errors import DONE, STOPPED

EPOCHS, STEPS, SEED = 2, 12, 3
HUGGING = "transformers.trainer, transformers.models.gpt2.modeling_gpt2"


class Script(NamedTuple):
    """Two epochs of six steps."""

    path: Path
    words: tuple[str, ...]
    preload: str
    samples: int
    batch_size: int
    accumulate: int


SCRIPTS = {
    "huggingface": Script(ROOT / "jobs/huggingface_script.py", ("--per-device-batch-size",), HUGGING, 44, 8, 2),
    "lightning": Script(HERE / "lightning_script.py", (), "lightning", 92, 16, 1),
}

REFUSED = [
    "TrainingArguments.dataloader_drop_last=True", "TrainingArguments.auto_find_batch_size=True",
    "TrainingArguments.train_sampling_strategy='group_by_length'", "Trainer.limit_train_batches=0.5",
    "Trainer.overfit_batches=2", "train_dataloader='drop_last=True'", "train_dataloader='WeightedRandomSampler'",
    "train_dataloader='Tensor'", "train_dataloader='several loaders'",
]  # fmt: skip
"""What each of the mistakes in `adapter_mistakes` is called."""


def train(folder: Path, framework: str, ranks: int, plan: str, batch_ranks: int = 0, code: int = DONE) -> str:
    """Train in `folder`, or go on there; return what was printed. `batch_ranks`: those that the script was made for."""
    script = SCRIPTS[framework]
    each = script.batch_size // (batch_ranks or ranks) // script.accumulate
    keys = f"devices_per_node={ranks}", f"preload=[{script.preload}]"
    return train_struck(folder, plan, script.path, (*script.words, str(each)), *keys, code=code)


def lasting(run: Path) -> Any:
    """The last state of a run, without what a trainer noted of how long things took."""
    state: Any = read_state(run)
    known = state["objects"]["trainer"]["state"]
    for entry in known["state"].pop("log_history", []) if "state" in known else ():
        assert entry["step"] <= STEPS
    return state


def assert_each_sample_once(run: Path, framework: str) -> None:
    """In the order that follows from the seed, whatever the number of ranks."""
    script, steps = SCRIPTS[framework], samples_of_steps(run)
    assert len(steps) == STEPS
    for (epoch, step), samples in steps.items():
        first = (step - epoch * STEPS // EPOCHS) * script.batch_size
        batch = epoch_order(SEED, epoch, script.samples)[first : first + script.batch_size]
        assert sorted(samples) == sorted(batch.tolist())


@pytest.mark.parametrize("framework", SCRIPTS)
@pytest.mark.parametrize("ranks", (1, 2, 4) if FULL else (2,))
def test_kill_after_each_step(tmp_path: Path, framework: str, ranks: int) -> None:
    """Weights, optimizer, scheduler, callbacks: bit by bit those of a training that nothing happened to.

    In every step if FULL; else a sample, because what differs from other sessions is what a trainer keeps.
    """
    every = 1 if FULL else 3
    train(tmp_path / "calm", framework, ranks, "calm")
    train(tmp_path / "run", framework, ranks, "kill:all" if FULL else f"kill:2/{every}")
    struck = {int(path.name.partition("-")[0]) for path in (tmp_path / "run/strikes").iterdir()}
    assert struck == set(range(0, STEPS, every)), "some step was never struck"
    assert difference(lasting(tmp_path / "calm"), lasting(tmp_path / "run")) == ""
    assert_each_sample_once(tmp_path / "run", framework)


@pytest.mark.parametrize("framework", SCRIPTS)
def test_stop_and_resume_with_fewer_ranks(tmp_path: Path, framework: str) -> None:
    """The global batch stays that of the beginning, and a run that is done does nothing when it is started again."""
    train(tmp_path, framework, 2, "stop-in:3", code=STOPPED)
    text = train(tmp_path, framework, 1, "kill-in:9", batch_ranks=2)
    assert f"the global batch stays {SCRIPTS[framework].batch_size}, as when the run began" in text
    assert_each_sample_once(tmp_path, framework)
    before = lasting(tmp_path)
    train(tmp_path, framework, 2, "calm")
    assert difference(before, lasting(tmp_path)) == ""


def test_what_a_session_could_not_repeat_is_refused(tmp_path: Path) -> None:
    """And that an extra is missing is said, too."""
    command = [sys.executable, str(HERE / "adapter_mistakes.py")]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400)
    said = [line.partition(": ")[0] for line in done.stdout.splitlines() if line.startswith("refused ")]
    assert said == [f"refused {key}" for key in REFUSED], done.stdout + done.stderr
    assert 'pip install "muster-train[lightning]"' in done.stdout
