"""`muster compare`: its arithmetic and its verdict from given numbers, and what it refuses before anything starts."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import MUSTER

from trainer.config.load import merge_job, to_job
from trainer.errors import JobError
from trainer.launch.compare.runs import plan, speed
from trainer.launch.compare.table import WIDTH, text
from trainer.launch.compare.verdict import (
    MODES,
    NO_SYNC,
    bytes_per_step,
    choose,
    communication,
    compare_losses,
    is_faster,
    largest_difference,
    mean_of_end,
    peak_memory,
    span,
    summarize,
)

JOB = """
task: trainer.tasks.digits:Digits
devices_per_node: 2
device: cpu
train: {batch_size: 64, epochs: 2}
"""
FACTS = {
    "job": "digits", "folder": "/runs/x", "devices": 2, "batch_size": 64, "precision": "float32", "device": "cpu",
    "steps": 100, "warm_up_steps": 10, "rounds": 3, "processors": 2,
}  # fmt: skip
SAME = {"single": [2.0, 1.0], "dp": [2.0, 1.0], "ddp": [2.0, 1.0]}


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    file = tmp_path / "digits.yaml"
    file.write_text(JOB)
    return file


def line(step: int, samples_per_s: float) -> dict[str, Any]:
    return {"step": step, "samples_per_s": samples_per_s}


def timed(mode: str, *speeds: float) -> list[dict[str, Any]]:
    ranks = range(1 if mode in ("single", "dp") else 2)
    traffic = [{"rank": rank, "steps": 10, "sent": 10240 * (1 + rank), "received": 10240} for rank in ranks]
    return [
        {
            "speed": value, "traffic": traffic, "curve": [(0.0, 3.0), (200 / value, 2.0), (400 / value, 1.0)],
            "memory": [{"rank": rank, "device": "cpu", "peak_mb": 100.0 + value} for rank in ranks],
        }
        for value in speeds
    ]  # fmt: skip


def test_speed_leaves_out_the_warm_up_and_the_ends_of_epochs_and_of_the_run() -> None:
    lines = [line(5, 1), line(10, 1), line(15, 100), line(20, 110), line(25, 7), line(30, 120), line(32, 9)]
    assert speed(lines, 10, 23) == 110  # of 100, 110 and 120; an epoch ends at step 23
    assert speed(lines, 10, 2) == 100  # an epoch ends in every line: all count


def test_the_span_is_the_range_of_few_rounds_and_the_quartiles_of_more() -> None:
    assert span([3, 1, 2]) == (1, 3)
    assert span([1, 10, 11, 12, 100]) == (10, 12)


@pytest.mark.parametrize("some, others, expected", [
    ([110, 111, 112], [100, 101, 102], True),
    ([110, 100, 112], [100, 101, 102], False),  # the spans meet
    ([100, 140, 180], [97, 98, 99], False),  # apart by chance: further from each other than from the others
    ([100, 101, 102], [110, 111, 112], False),
])  # fmt: skip
def test_a_mode_is_faster_when_the_difference_exceeds_the_noise(
    some: list[float], others: list[float], expected: bool
) -> None:
    assert is_faster(some, others) is expected


def test_losses_are_compared_step_by_step_and_the_first_steps_more_strictly() -> None:
    assert largest_difference([2.0, 1.0], [2.0, 1.5]) == 0.5
    single = [1.0] * 30
    drift = [1.0] * 20 + [1.001] * 10
    assert compare_losses({"single": single, "dp": single, "ddp": drift}, "float32")["equal"]
    assert not compare_losses({"single": single, "dp": single, "ddp": drift}, "float64")["equal"]
    early = [1.0, 1.001] + [1.0] * 28
    found = compare_losses({"single": single, "dp": early, "ddp": single}, "float32")
    assert not found["equal"] and found["first_steps"]["dp"] == pytest.approx(1e-3)
    assert compare_losses({"single": single, "dp": early, "ddp": single}, "bf16")["equal"]


def test_communication_is_what_synchronisation_adds_to_a_step() -> None:
    found = communication([75, 74, 76], [100, 99, 101], 50, "")
    assert found["share"] == pytest.approx(0.25)
    assert found["step_without_ms"] == 500 and found["step_ms"] == pytest.approx(1000 * 50 / 75)
    hidden = communication([99, 80, 104], [100, 85, 102], 50, "")
    assert hidden["share"] is None and "noise" in hidden["reason"]
    refused = communication([75], [], 50, "ddp.compression: would not compress")
    assert refused["share"] is None and "would not compress" in refused["reason"]


def test_the_verdict_names_the_fastest_mode_and_gives_its_numbers() -> None:
    ddp = choose({"single": [100, 101, 99], "dp": [120, 121, 119], "ddp": [180, 181, 179]}, 2, 64, 0.12)
    assert ddp["winner"] == "ddp"
    for part in ("Use ddp", "1.80x", "90%", "dp 0.67x", "12% of a ddp step"):
        assert part in ddp["verdict"]
    single = choose({"single": [100, 101, 99], "dp": [80, 81, 79], "ddp": [50, 51, 49]}, 2, 64, 0.6)
    assert single["winner"] == "single" and "dp 0.80x" in single["verdict"] and "60% of" in single["verdict"]
    dp = choose({"single": [100, 101, 99], "dp": [150, 151, 149], "ddp": [50, 51, 49]}, 2, 64, None)
    assert dp["winner"] == "dp" and "one node" in dp["verdict"]
    other = {"single": [100, 101, 99], "ddp": [150, 151, 149], "server, async": [250, 251, 249]}
    assert choose(other, 2, 64, None)["winner"] == "ddp", "whose losses are others is not recommended"


def test_noise_and_too_few_rounds_have_no_winner() -> None:
    noisy = choose({"single": [100, 60, 140], "dp": [30, 31, 29], "ddp": [110, 70, 150]}, 2, 64, None)
    assert noisy["winner"] is None
    for part in ("Noise too high", "ddp is 10% faster than single", "Clearly slower: dp."):
        assert part in noisy["verdict"]
    few = choose({"single": [100, 100], "dp": [120, 120], "ddp": [180, 180]}, 2, 64, None)
    assert few["winner"] is None and "--rounds 3" in few["verdict"]


def test_the_tables_show_every_mode_and_say_what_a_cpu_cannot_show() -> None:
    rounds = {mode: timed(mode, 100 + place, 90, 101) for place, mode in enumerate(MODES) if mode != "pipeline"}
    refused = {"pipeline": "task.stages: is too short " * 5, NO_SYNC: "it is refused"}
    losses = {mode: [2.0, 1.0] for mode in rounds}
    found = summarize(FACTS, rounds | {"ddp": timed("ddp", 170, 160, 171)}, [], refused, losses)
    assert found["modes"]["ddp"]["speed_up"] == 1.7 and found["modes"]["ddp"]["efficiency"] == 0.85
    assert found["modes"]["single"]["efficiency"] == 1 and "pipeline" not in found["modes"]
    shown = text(found)
    assert max(map(len, shown.splitlines())) <= WIDTH
    flat = " ".join(shown.split())
    for part in ("160 - 171", "1.70x", "85%", "271", "it is refused", "Losses: equal", "Use ddp", "On CPU", "NCCL",
                 "imbalance", "kernel launches", "memory per device", "pipeline: task.stages: is too short",
                 "local sgd and server, async train differently"):  # fmt: skip
        assert part in flat, part
    assert re.search(r"^ddp +2 +3 +1\.0000 +1\.0000$", shown, re.MULTILINE), shown
    assert re.search(r"^single +- +- ", shown, re.MULTILINE), shown
    on_gpu = text(summarize(FACTS | {"device": "cuda"}, rounds, [], refused, losses))
    assert "On CPU" not in on_gpu
    apart = text(summarize(FACTS, rounds, [], refused, losses | {"dp": [2.0, 1.2]}))
    assert "Losses: not those of single" in apart
    other = text(summarize(FACTS, rounds, [], refused, losses | {"local sgd": [2.0, 1.2]}))
    assert "Losses: equal" in other
    late = {mode: [1.0] * 20 for mode in rounds} | {"ddp": [1.0] * 19 + [1.5]}
    assert "equal at first, apart later" in " ".join(text(summarize(FACTS, rounds, [], refused, late)).split())


def test_bytes_are_those_of_a_step_and_losses_those_before_a_time() -> None:
    assert bytes_per_step([{"rank": 0, "steps": 4, "sent": 400, "received": 200}]) == [150]
    curve = [(float(time), 10.0 - time) for time in range(10)] + [(float(time), 0.0) for time in range(10, 40)]
    assert mean_of_end(curve, 9.5) == 1.0
    assert mean_of_end(curve, 100.0) == 0.0
    assert mean_of_end(curve, -1.0) == 10.0


def test_the_memory_of_each_device_is_its_largest_over_the_rounds() -> None:
    def devices(first: float, second: float) -> list[dict[str, Any]]:
        return [{"rank": 0, "device": f"cuda:{i}", "peak_mb": mb} for i, mb in enumerate((first, second))]

    assert [item["peak_mb"] for item in peak_memory([devices(9, 2), devices(8, 3)])] == [9, 3]


def test_all_modes_train_the_same_number_of_steps_of_the_same_batch(job_file: Path) -> None:
    _, variants, refused = plan(str(job_file), ["ddp.bucket_mb=5", "pipeline.microbatches=4", "train.lr=0.5"], 70)
    jobs = {mode: to_job(merge_job(job_file, words)) for mode, words in variants.items()}
    assert list(jobs) == [*MODES, NO_SYNC] and not refused
    assert {(job.train.batch_size, job.train.steps, job.train.lr) for job in jobs.values()} == {(64, 70, 0.5)}
    assert [job.world_size for job in jobs.values()] == [1, 1] + [2] * (len(MODES) - 1)
    assert jobs["ddp"].ddp.bucket_mb == 5 and jobs["dp"].ddp.bucket_mb is None
    assert jobs["pipeline"].pipeline.microbatches == 4 and jobs["ddp"].pipeline.microbatches is None
    assert jobs["local sgd"].ddp.sync_every > 1 and not jobs["server, async"].server.synchronous


def test_some_modes_can_be_chosen(job_file: Path) -> None:
    _, variants, refused = plan(str(job_file), [], 70, ["server"])
    assert list(variants) == ["single", "ddp", "server", NO_SYNC] and not refused
    with pytest.raises(JobError, match=r"--mode='sever': is not a mode\. Use some of: single; dp; ddp"):
        plan(str(job_file), [], 70, ["sever"])


def test_a_job_that_some_modes_refuse_is_compared_in_the_others(job_file: Path) -> None:
    _, variants, refused = plan(str(job_file), ["ddp.compression=bf16", "train.compile=true"], 70)
    assert NO_SYNC not in variants and "ddp.compression" in refused[NO_SYNC]
    assert "dp" not in variants and "DataParallel" in refused["dp"]
    assert "pipeline" not in variants and "train.compile" in refused["pipeline"]


def test_devices_are_those_of_the_job_and_single_uses_the_primary(job_file: Path) -> None:
    _, variants, _ = plan(str(job_file), ["devices=[3,1]"], 70)
    assert to_job(merge_job(job_file, variants["single"])).devices == [3]
    assert to_job(merge_job(job_file, variants["dp"])).devices == [3, 1]


@pytest.mark.parametrize("words, expected", [
    (["task=null", "script=train.py"], ["script='train.py'", "a script has no modes", "Give a job with a task"]),
    (["devices_per_node=1"], ["devices_per_node=1", "nothing to compare", "Set it to 2"]),
    (["nodes=2"], ["nodes=2", "one node", "Set nodes=1"]),
    (["parallel=dp"], ["parallel='dp'", "compare sets this key itself", "Remove it"]),
    (["train.steps=5"], ["train.steps='5'", "compare sets this key itself", "--steps"]),
    (["train.batch_size=63"], ["train.batch_size=63", "does not divide", "62 or 64"]),
    (["trian.lr=1"], ["trian.lr", "Did you mean train.lr?"]),
])  # fmt: skip
def test_refusals(job_file: Path, words: list[str], expected: list[str]) -> None:
    with pytest.raises(JobError) as caught:
        plan(str(job_file), words, 70)
    for part in expected:
        assert part in str(caught.value)
    assert not (job_file.parent / "runs").exists()


def test_a_run_folder_is_no_job_to_compare(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    with pytest.raises(JobError, match="is a run"):
        plan(str(tmp_path), [], 70)


def test_the_command_answers_a_mistake_with_64_and_never_imports_torch(job_file: Path) -> None:
    wrong = subprocess.run([MUSTER, "compare", job_file, "--rounds", "0"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 64 and "--rounds=0" in wrong.stderr
    code = "import sys, trainer.launch.cli; assert 'trainer.launch.compare.runs' not in sys.modules; " \
           "import trainer.launch.compare.runs; assert not {'torch', 'matplotlib'} & set(sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)
