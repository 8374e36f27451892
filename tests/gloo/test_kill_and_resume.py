"""SIGKILL after any step, then resume: as if nothing had happened, bit by bit, and no sample is lost or seen twice."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from faults import Fault
from muster_runs import FULL
from ranks import Run, complete, evaluations, events, losses, make_job, order_of_samples, train
from states import difference, read_state, steps_saved

from trainer.errors import STOPPED

STEPS = 21
"""In epochs of five: 4 batches of 24 and one of 5."""
MODEL = [
    "task_args.dropout=0.3",
    "task_args.batchnorm=true",
    "train.optimizer=sgd",
    "train.optimizer_args={momentum: 0.9}",
    "train.lr=0.05",
]
MODES = {"single": ["parallel=single"], "ddp": ["devices_per_node=2"]}
if FULL:  # a few of these kills are in test_fsdp.py
    MODES["fsdp"] = ["parallel=fsdp", "fsdp.min_params=1", "devices_per_node=2"]


def assert_as_if_nothing_had_happened(run: Path, uninterrupted: Path) -> None:
    """Same weights, optimizer, losses and metrics; each sample once per epoch."""
    assert difference(read_state(uninterrupted), read_state(run)) == ""
    assert losses(run) == losses(uninterrupted)
    assert evaluations(run)[-1] == evaluations(uninterrupted)[-1]
    order = order_of_samples(run)
    assert order == order_of_samples(uninterrupted)
    for epoch in range(4):
        assert sorted(order[epoch]) == list(range(101)), epoch


def kill(folder: Path, job_keys: list[str], fault: Fault) -> Run:
    """Train until the fault."""
    job = make_job(*job_keys)
    run = train(folder, job, fault)
    assert run.codes[fault.rank] == -signal.SIGKILL
    assert all(run.codes), "a rank went on alone"
    return run


@pytest.mark.parametrize("every, moment", [(1, "before update"), (3, "after update")])
@pytest.mark.parametrize("mode", MODES)
def test_kill_after_each_step(tmp_path: Path, mode: str, every: int, moment: str) -> None:
    """With a checkpoint after each step, just after it; with one after every third, before it could be made.

    Unless FULL in a sample of steps, which has all places in three and in five, and both ranks.
    """
    keys = [*MODEL, *MODES[mode], f"checkpoint.every_steps={every}"]
    complete(tmp_path / "uninterrupted", make_job(*keys))
    for step in range(1, STEPS, 1 if FULL else 3 if (mode, every) == ("ddp", 1) else 4):
        folder = tmp_path / f"{step}"
        ranks = make_job(*keys).world_size
        kill(folder, keys, Fault(step + (moment == "before update"), moment, rank=step % ranks))
        complete(folder, make_job(*keys))
        done = step if moment == "before update" else step - 1
        saved = max(n for n in range(done + 1) if n % every == 0 or n % 5 == 0)
        if step % ranks and (done + 1) % every == 0 and (done + 1) % 5 and mode != "fsdp":
            saved = done + 1  # rank 0 saves without asking the dead rank, unless they were to evaluate first
        assert events(folder, "training")[-1]["step"] == saved, "it did not resume where it could"
        assert_as_if_nothing_had_happened(folder, tmp_path / "uninterrupted")


def test_kill_again_and_again(tmp_path: Path) -> None:
    keys = [*MODEL, *MODES["ddp"], "checkpoint.every_steps=2"]
    complete(tmp_path / "uninterrupted", make_job(*keys))
    for attempt, updates in enumerate((3, 4, 2, 5, 1, 6)):
        kill(tmp_path / "run", keys, Fault(updates, rank=attempt % 2))
    complete(tmp_path / "run", make_job(*keys))
    assert_as_if_nothing_had_happened(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.parametrize("mode", MODES)
def test_kill_in_an_evaluation(tmp_path: Path, mode: str) -> None:
    """The epoch's checkpoint comes after its evaluation, so the epoch is done again; or since the last one."""
    keys = [*MODEL, *MODES[mode], "checkpoint.every_steps=3"]
    complete(tmp_path / "uninterrupted", make_job(*keys))
    kill(tmp_path / "run", keys, Fault(4, "in evaluation", rank=make_job(*keys).world_size - 1))
    complete(tmp_path / "run", make_job(*keys))
    assert_as_if_nothing_had_happened(tmp_path / "run", tmp_path / "uninterrupted")


DRAWING = ["task=digit_tasks:Drawing", "task_args.dropout=0.3"]


@pytest.mark.parametrize("mode", MODES)
def test_random_numbers_of_the_users_code(tmp_path: Path, mode: str) -> None:
    """From every global generator, in losses, metrics and summary: none of it is in a checkpoint."""
    keys = [*DRAWING, *MODES[mode], "checkpoint.every_steps=2", "evaluation.every_steps=3"]
    complete(tmp_path / "uninterrupted", make_job(*keys))
    for fault in (Fault(3), Fault(2, "in evaluation"), Fault(4), Fault(3, number=signal.SIGTERM)):
        run = train(tmp_path / "run", make_job(*keys), fault)
        assert run.codes[0] in (STOPPED, -signal.SIGKILL)
    complete(tmp_path / "run", make_job(*keys))
    assert_as_if_nothing_had_happened(tmp_path / "run", tmp_path / "uninterrupted")
    shown = {tuple(values.items()) for values in evaluations(tmp_path / "run")}
    assert shown <= {tuple(values.items()) for values in evaluations(tmp_path / "uninterrupted")}
    assert len(shown) > 4


def test_an_evaluation_does_not_disturb_random_numbers(tmp_path: Path) -> None:
    keys = [*DRAWING, *MODES["ddp"]]
    complete(tmp_path / "few", make_job(*keys))
    complete(tmp_path / "many", make_job(*keys, "evaluation.every_steps=1"))
    assert difference(read_state(tmp_path / "few"), read_state(tmp_path / "many")) == ""


def test_random_numbers_of_an_evaluation_are_the_same_at_any_world_size(tmp_path: Path) -> None:
    """Without a step of training, whose random numbers depend on the rank."""
    found = []
    for ranks in (1, 2, 3):
        keys = [*DRAWING, f"devices_per_node={ranks}", "evaluation.batch_size=8", "train.steps=1", "train.lr=1e-30"]
        complete(tmp_path / f"{ranks}", make_job(*keys))
        found.append(evaluations(tmp_path / f"{ranks}"))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("mode", MODES)
def test_kill_while_a_checkpoint_is_written_beside_the_training(tmp_path: Path, mode: str) -> None:
    """Wherever the thread is, an older checkpoint or this one is whole."""
    keys = [*MODEL, *MODES[mode], "checkpoint.every_steps=1", "checkpoint.asynchronous=true"]
    complete(tmp_path / "uninterrupted", make_job(*keys))
    for step in range(2, STEPS, 3 if FULL else 6):
        folder = tmp_path / f"{step}"
        kill(folder, keys, Fault(step, "before update", rank=0))
        complete(folder, make_job(*keys))
        assert 0 <= events(folder, "training")[-1]["step"] < step
        assert_as_if_nothing_had_happened(folder, tmp_path / "uninterrupted")


@pytest.mark.parametrize("ranks", [3, 4])
def test_kill_among_more_ranks(tmp_path: Path, ranks: int) -> None:
    """The order of a sum over more than two ranks depends on where DDP puts an element in its buckets."""
    keys = [*MODEL, f"devices_per_node={ranks}", "checkpoint.every_steps=2", "ddp.bucket_mb=1"]
    complete(tmp_path / "uninterrupted", make_job(*keys))
    for updates in (1, 3, 7):
        kill(tmp_path / "run", keys, Fault(updates, rank=updates % ranks))
    complete(tmp_path / "run", make_job(*keys))
    assert_as_if_nothing_had_happened(tmp_path / "run", tmp_path / "uninterrupted")


def test_resume_at_another_world_size(tmp_path: Path) -> None:
    """The order of samples is that of the uninterrupted run, and so are, within rounding, the losses."""
    keys = ["train.precision=float64", "checkpoint.every_steps=4"]
    modes = [["devices_per_node=2"], ["parallel=single"], ["devices_per_node=3"], ["parallel=dp", "devices_per_node=2"]]
    complete(tmp_path / "uninterrupted", make_job(*keys, "parallel=single"))
    folder = tmp_path / "run"
    for mode in modes:
        kill(folder, [*keys, *mode], Fault(6))
    complete(folder, make_job(*keys, "devices_per_node=4"))
    assert [event["step"] for event in events(folder, "training")] == [0, 5, 10, 15, 20]
    assert order_of_samples(folder) == order_of_samples(tmp_path / "uninterrupted")
    assert losses(folder) == pytest.approx(losses(tmp_path / "uninterrupted"), rel=1e-12)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    job = make_job(*MODES["ddp"])
    complete(tmp_path, job)
    before = read_state(tmp_path), evaluations(tmp_path)
    complete(tmp_path, job)
    assert difference(before[0], read_state(tmp_path)) == ""
    assert evaluations(tmp_path) == before[1]
    assert steps_saved(tmp_path) == [20, 21]


def test_more_steps_continue_a_finished_run(tmp_path: Path) -> None:
    keys = [*MODEL, *MODES["ddp"], "train.schedule=constant"]
    complete(tmp_path / "long", make_job(*keys))
    complete(tmp_path / "run", make_job(*keys, "train.steps=13"))
    complete(tmp_path / "run", make_job(*keys))
    assert difference(read_state(tmp_path / "long"), read_state(tmp_path / "run")) == ""
    assert order_of_samples(tmp_path / "run") == order_of_samples(tmp_path / "long")
