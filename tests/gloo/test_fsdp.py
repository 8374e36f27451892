"""parallel: fsdp: the training of one process, to the last digits, however many ranks share the weights.

What a rank holds, writes, finds damaged, and gets back from memory.
"""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from faults import Fault
from muster_runs import FULL, HERE, Run, kill, result, submitted, wait_for
from ranks import complete, events, losses, make_job, order_of_samples, train
from session_runs import train_struck
from states import difference, read_state, steps_saved

from trainer.records import read_lines

FSDP = ["parallel=fsdp", "fsdp.min_params=1"]
RANKS = {
    "1 rank": [*FSDP],
    "2 ranks": [*FSDP, "devices_per_node=2", "fsdp.reshard_after_forward=false"],
    "3 ranks": [*FSDP, "devices_per_node=3", "train.checkpoint_activations=true"],
    "4 ranks": [*FSDP, "devices_per_node=4"],
    "hybrid": [*FSDP, "devices_per_node=2", "nodes=2", "fsdp.replicate=node"],
    "ddp": ["devices_per_node=2"],
}
TRIED = list(RANKS) if FULL else ["3 ranks", "hybrid"]
STEPS = 50 if FULL else 14
EXACT = ["train.precision=float64", "train.accumulate=2", "train.clip_norm=0.05", "train.schedule=constant"]


def largest_difference(one: Any, other: Any) -> float:
    """Of all tensors in two states."""
    if isinstance(one, torch.Tensor):
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if isinstance(one, dict):
        assert list(one) == list(other)
        return max((largest_difference(one[key], other[key]) for key in one), default=0.0)
    return 0.0


def test_every_number_of_ranks_gives_the_training_of_a_single_process(tmp_path: Path) -> None:
    """With accumulation and clipping; saved by each, and gone on with by others, to the same end."""
    keys = [*EXACT, f"train.steps={STEPS}", "checkpoint.asynchronous=true"]
    single = complete(tmp_path / "single", make_job(*keys, "parallel=single")).folder
    half = [*keys[:-2], f"train.steps={STEPS // 2}"]
    following = {"3 ranks": "ddp", "ddp": "2 ranks"}
    for number, name in enumerate(TRIED):
        folder = complete(tmp_path / name, make_job(*half, *RANKS[name])).folder
        others = [following.get(name, TRIED[number - 1])] if not FULL else list(RANKS)
        for other in others:
            go_on = tmp_path / f"{name}, {other}"
            shutil.copytree(folder, go_on)
            complete(go_on, make_job(*keys, *RANKS[other]))
            gaps = [abs(a - b) for a, b in zip(losses(single), losses(go_on), strict=True)]
            assert max(gaps) <= 1e-12, (name, other)
            for part in ("model", "objects"):
                assert largest_difference(read_state(single)[part], read_state(go_on)[part]) <= 1e-12, (name, other)
            assert order_of_samples(go_on).keys() == order_of_samples(single).keys()
            for epoch, samples in order_of_samples(single).items():
                assert sorted(order_of_samples(go_on)[epoch]) == sorted(samples), (name, other, epoch)


def test_a_checkpoint_of_ddp_is_gone_on_with_in_shards(tmp_path: Path) -> None:
    """And a killed training, bit by bit, and what a damaged shard is the end of."""
    keys = ["task_args.batchnorm=true", "task_args.dropout=0.3", "checkpoint.every_steps=3", "train.optimizer=sgd",
            "train.optimizer_args={momentum: 0.9}"]  # fmt: skip
    sharded = [*keys, *FSDP, "devices_per_node=2"]
    complete(tmp_path / "calm", make_job(*sharded))
    begun = tmp_path / "killed"
    complete(begun, make_job(*keys, "train.steps=3", "train.schedule=constant", "devices_per_node=2"))
    killed = train(tmp_path / "again", make_job(*sharded), Fault(8, "after update", rank=1))
    assert killed.codes[1] == -signal.SIGKILL and all(killed.codes)
    newest = killed.folder / f"checkpoints/step-{steps_saved(killed.folder)[-1]:09d}"
    shard = newest / "shard-00001-of-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    complete(killed.folder, make_job(*sharded))
    [refused] = events(killed.folder, "checkpoint_refused")
    assert shard.name in refused["problem"] and "bits have changed" in refused["problem"]
    assert events(killed.folder, "resume")[-1]["step"] < 6
    assert difference(read_state(tmp_path / "calm"), read_state(killed.folder)) == ""
    assert losses(killed.folder) == losses(tmp_path / "calm")
    for epoch in range(4):
        assert sorted(order_of_samples(killed.folder)[epoch]) == list(range(101)), epoch


def steps_done(run: Run, attempt: int) -> int:
    """Of an attempt, as far as it has logged them."""
    lines = read_lines(run.folder / "metrics.jsonl") if (run.folder / "metrics.jsonl").exists() else []
    return max((line["step"] for line in lines if line["attempt"] == attempt), default=0)


def test_a_killed_rank_gets_its_shard_from_memory(tmp_path: Path) -> None:
    """There is no checkpoint that could be read; a few steps are repeated, and the weights are those of a calm run."""
    where, kills = (["nodes=2", "devices_per_node=2"], 2) if FULL else (["devices_per_node=2"], 1)
    keys = [*FSDP, *where, "train.schedule=constant", "evaluation.every_steps=1000000"]
    keys += ["task_args.count=1600"]  # an epoch, at the end of which something is saved, has 67 steps
    end = 20 * kills + 10
    expected = complete(tmp_path / "calm", make_job(*keys, f"train.steps={end}", "train.lr=0.01")).folder
    keys += ["task=digit_tasks:Small", "train.batch_size=24", "train.weight_decay=0.1", "train.warmup_steps=3"]
    with submitted(tmp_path, *keys, f"train.steps={end}", "train.lr=0.01", "checkpoint.every_steps=1000000") as run:
        for attempt in range(kills):
            wait_for("steps", lambda attempt=attempt: steps_done(run, attempt) >= 20 * attempt + 8)
            kill(run.ranks()[attempt + 1])
            resume = run.wait("resume", attempt + 1)
            assert resume["folder"] == "memory" and resume["step"] > 20 * attempt - 16
            assert not run.events("checkpoint")
        assert result(run, 120) == 0, run.log("node-0.log")
    assert difference(read_state(expected)["model"], read_state(run.folder)["model"]) == ""


def test_a_script_shards_its_model(tmp_path: Path) -> None:
    """And is killed, and goes on from memory; its batches do not divide among its ranks.

    Its model returns its loss with what it was made of, and has a weight under two names.
    """
    found = {}
    for name, plan, keys in (
        ("single", "calm", ["devices_per_node=1"]),
        ("killed", "kill-in:4,kill-in:7" if FULL else "kill-in:4", ["parallel=fsdp", "devices_per_node=2"]),
    ):
        train_struck(tmp_path / name, plan, HERE / "sharded_script.py", ("2",), *keys, "checkpoint.every_steps=1000")
        found[name] = read_state(tmp_path / name)
        lines = read_lines(tmp_path / name / "metrics.jsonl")
        hits = [line["hit"] for line in lines if line["kind"] == "evaluation"]
        found[name]["hits"] = list(dict.fromkeys(hits))
    assert {event["folder"] for event in events(tmp_path / "killed", "resume")} == {"memory"}
    assert len(list((tmp_path / "killed/checkpoints").glob("step-*/shard-*-of-00002.safetensors"))) > 0
    assert found["single"]["hits"] == found["killed"]["hits"]
    for part in ("model", "objects"):
        assert largest_difference(found["single"][part], found["killed"][part]) <= 1e-12


if FULL:  # it measures megabytes

    def test_a_rank_holds_its_part_of_the_state(tmp_path: Path) -> None:
        """Weights, gradients and Adam's state, at their peak: a part of what DDP takes, and a gathered layer."""
        layer, state = 4, 4 * 64
        keys = [
            "task=model_tasks:Wide",
            "train.steps=6",
            "checkpoint.asynchronous=false",
            "evaluation.every_epochs=100",
        ]
        peaks = {}
        for ranks in (1, 2, 4):
            mode = ["parallel=fsdp", "fsdp.min_params=100000"] if ranks > 1 else ["parallel=ddp"]
            run = complete(tmp_path / str(ranks), make_job(*keys, *mode, f"devices_per_node={ranks}"))
            lines = [
                line for rank in range(ranks) for line in run.output(rank).splitlines() if line.startswith("highest")
            ]
            peaks[ranks] = [int(line.split()[1]) for line in lines]
        assert state <= max(peaks[1]) <= state * 1.2
        for ranks in (2, 4):
            assert max(peaks[ranks]) <= max(peaks[1]) / ranks * 1.1 + 2 * layer, peaks
