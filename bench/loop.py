"""The cost of the loop: our trainer against the same training written by hand in plain PyTorch.

Blocks of steps of both alternate in the same processes, so that a noisy machine slows both; CPU time is compared,
block by block. The trainer runs with its defaults: metrics, TensorBoard, heartbeat, votes, checkpoints.

    python bench/loop.py [--pairs 40] [--output bench/results/loop.json]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES = {"small": (4, 16), "medium": (32, 64), "large": (64, 256)}
"""Name: width of the network, global batch; about 0.3, 3 and 30 ms a step on one core."""
NOISE = 0.10
"""Half the distance between the quartiles of the ratio above which no number is given."""


def make_task(width: int, repeat: int) -> Any:
    """The digits, repeated so that an epoch, and with it the checkpoint at its end, has a realistic length."""
    from torch.utils.data import TensorDataset

    from trainer.tasks.digits import Digits

    class Repeated(Digits):
        def train_dataset(self) -> TensorDataset:
            images, labels = super().train_dataset().tensors
            return TensorDataset(images.repeat(repeat, 1, 1, 1), labels.repeat(repeat))

    return Repeated(width)


def trainer_steps(job: Any, task: Any, run: Path, parallel: Any) -> Iterator[None]:
    """Our loop, a step at a time."""
    import torch

    from trainer.heartbeat import Pulse
    from trainer.loop import Trainer
    from trainer.optimize import autocast
    from trainer.parallel import Step
    from trainer.report import Report

    torch.manual_seed(0)
    model = task.model()
    parallel.wrap(Step(model, task, autocast("float32", parallel.device)))
    report = Report(job, run, 0, parallel, Pulse(parallel.local_rank))
    trainer = Trainer(job, task, parallel, report, model, lambda: False, task.train_dataset(), task.eval_dataset())
    report.start(trainer.position, trainer.steps, trainer.order.steps_per_epoch)
    while True:
        for micros in trainer.epoch():
            trainer.train_step(micros)
            yield


def raw_steps(task: Any, batch_size: int, rank: int, world_size: int) -> Iterator[None]:
    """The same training by hand, without a loader's cost, with the same fused optimizer and a loss that is read."""
    import torch
    from torch.nn import functional
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model: torch.nn.Module = task.model()
    if world_size > 1:
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    images, labels = task.train_dataset().tensors
    share = batch_size // world_size
    while True:
        order = torch.randperm(len(labels))
        for start in range(0, len(labels) - batch_size + 1, batch_size):
            chosen = order[start + rank * share : start + (rank + 1) * share]
            loss = functional.cross_entropy(model(images[chosen]), labels[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            yield


def measure(rank: int, world_size: int, port: int, size: str, pairs: int, folder: str, answer: Any) -> None:
    """One rank: warm up, alternate blocks; send (trainer, raw) CPU seconds of each pair and the wall time of a step."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
                   "MUSTER_HEARTBEAT": str(Path(folder) / "heartbeat")}  # fmt: skip
    import torch

    from trainer.config import Job, Log, Train
    from trainer.parallel import make_parallel
    from trainer.rules import check_job
    from trainer.wiring import rank_wiring

    torch.set_num_threads(1)
    width, batch = SIZES[size]
    job = Job(name="bench", task="trainer.tasks.digits:Digits", devices_per_node=world_size, device="cpu",
              train=Train(batch_size=batch, epochs=1000), log=Log())  # fmt: skip
    check_job(job)
    task = make_task(width, 100)
    parallel = make_parallel(job, rank_wiring() if world_size > 1 else _alone(), supervised=True)
    ours, raw = trainer_steps(job, task, Path(folder), parallel), raw_steps(task, batch, rank, world_size)
    for _ in range(30):
        next(ours), next(raw)
    started = time.perf_counter()
    for _ in range(10):
        next(raw)
    step_s = (time.perf_counter() - started) / 10
    block = max(10, min(300, int(0.3 / step_s)))
    times = []
    for pair in range(pairs):
        costs = {}
        for name, steps in (("ours", ours), ("raw", raw))[:: 1 if pair % 2 else -1]:
            before = time.process_time()
            for _ in range(block):
                next(steps)
            costs[name] = (time.process_time() - before) / block
        times.append((costs["ours"], costs["raw"]))
    answer.put((rank, times, step_s))
    answer.close()
    answer.join_thread()
    parallel.barrier()
    os._exit(0)  # the generators hold the process group


def _alone() -> Any:
    from trainer.wiring import RankWiring

    return RankWiring()


def compare(size: str, world_size: int, pairs: int) -> dict[str, Any]:
    """Medians over pairs of blocks, CPU time summed over ranks."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=measure, args=(rank, world_size, port, size, pairs, folder, answer))
                 for rank in range(world_size)]  # fmt: skip
        for process in ranks:
            process.start()
        results = [answer.get(timeout=600) for _ in ranks]
        for process in ranks:
            process.join(30)
    summed = [tuple(sum(times[pair][side] for _, times, _ in results) for side in (0, 1)) for pair in range(pairs)]
    ratios = [ours / raw for ours, raw in summed]
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "size": size, "ranks": world_size, "pairs": pairs, "step_ms": 1000 * results[0][2],
        "raw_cpu_ms": 1000 * statistics.median(raw for _, raw in summed), "ratio": median, "quartiles": [low, high],
        "noisy": (high - low) / 2 > NOISE,
    }  # fmt: skip


def main() -> None:
    """Measure all sizes on one and two ranks, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "loop.json")
    options = parser.parse_args()
    rows = []
    print(f"{'size':8} {'ranks':>5} {'raw step':>10} {'trainer / raw, CPU time':>25}")
    for size in options.sizes:
        for world_size in (1, 2):
            row = compare(size, world_size, options.pairs)
            rows.append(row)
            shown = (
                "noise too high"
                if row["noisy"]
                else f"{row['ratio']:.3f}  [{row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f}]"
            )
            print(f"{size:8} {world_size:5} {row['raw_cpu_ms']:7.2f} ms {shown:>25}", flush=True)
    import torch

    options.output.parent.mkdir(exist_ok=True)
    machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version(),
               "torch": torch.__version__, "load": os.getloadavg()}  # fmt: skip
    options.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
