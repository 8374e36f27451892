"""A language model on one GPU: our trainer against the same training by hand; what switches and saves do to it.

`jobs/bytelm.yaml` at the size of GPT-2 small. Our trainer and a raw loop train the same configuration in turn, in
blocks of steps that begin and end with an idle GPU; wall time is compared. The blocks of all configurations alternate
in one process where their states leave half of the memory to activations, else one configuration follows the other.
`train.deterministic`, which is on by default, holds for both sides.

    python bench/gpu.py [--size gpt2] [--batch 16] [--rounds 10] [--configurations bf16 bf16-compiled]
    python bench/gpu.py --device cpu --size 1m --batch 2 --rounds 1 --block 0.1      # all of the code, no result
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import measure
import torch
from measure import show, spread, table
from torch import Tensor
from torch.nn import functional

from trainer.config import Job
from trainer.heartbeat import VARIABLE, Pulse
from trainer.load import load_job
from trainer.loop import Trainer
from trainer.optimize import autocast
from trainer.parallel import make_parallel
from trainer.rank_wiring import RankWiring
from trainer.report import Report
from trainer.step import Step
from trainer.tasks.bytelm import SIZES, VOCABULARY, ByteLM, Shape
from trainer.writer import Writer

JOB = Path(__file__).resolve().parents[1] / "jobs" / "bytelm.yaml"
BF16, COMPILED, ANY_ORDER = "train.precision=bf16", "train.compile=true", "train.deterministic=false"
CONFIGURATIONS: dict[str, tuple[str, ...]] = {
    "float32": (), "float32-compiled": (COMPILED,), "bf16": (BF16,), "bf16-unpinned": (BF16, "data.pin_memory=false"),
    "bf16-nondeterministic": (BF16, ANY_ORDER), "bf16-compiled": (BF16, COMPILED),
    "bf16-compiled-nondeterministic": (BF16, COMPILED, ANY_ORDER),
}  # fmt: skip
Row = dict[str, Any]
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0, "NVIDIA A100-SXM4-80GB": 312.0, "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0, "NVIDIA L4": 121.0, "NVIDIA L40S": 362.0, "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H100 PCIe": 756.5, "NVIDIA H100 NVL": 835.5, "NVIDIA H200": 989.5, "NVIDIA H200 NVL": 835.5,
    "NVIDIA B200": 2250.0,
}  # fmt: skip
"""bf16, dense, by the name that CUDA gives the GPU; a part of one (MIG) has another name and no entry.

Source: NVIDIA's data sheets of each product, November 2026; those of L4, H100, H200 and B200 print the rate with 2:4
sparsity, of which this is half.
"""


class LongEpochs(ByteLM):
    """Bytelm with its corpus several times over: no epoch, with evaluation and checkpoint, ends within a block."""

    @cached_property
    def corpora(self) -> dict[bool, Tensor]:
        """Of each epoch eight."""
        return {held_out: text.repeat(8) for held_out, text in super().corpora.items()}


class Training:
    """One side of one configuration: a training that goes on by a block at a time."""

    def __init__(self, job: Job, steps: Iterator[None], block_s: float) -> None:
        """Build, compile, warm up; choose the steps of a block, so many that losses are read equally often in each."""
        self.deterministic, self.steps, every = job.train.deterministic, steps, job.log.every_steps
        self.times: list[float] = []  # seconds of a step, for each block
        before = torch.cuda.memory_allocated()
        self.run(every)
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self.count = every * math.ceil(block_s / (every * self.run(every)))
        self.peak_gib = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)

    def run(self, count: int) -> float:
        """Do a block; return the seconds of a step."""
        if torch.cuda.is_initialized():  # as the trainer does it, see `trainer.rank`
            torch.use_deterministic_algorithms(self.deterministic, warn_only=True)
        synchronize()
        began = time.perf_counter()
        for _ in range(count):
            next(self.steps)
        synchronize()
        return (time.perf_counter() - began) / count


def synchronize() -> None:
    """Wait until the GPU is idle, where there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def make_trainer(job: Job, task: ByteLM, run: Path) -> Trainer:
    """Ours, with its defaults on: metrics, TensorBoard, heartbeat, a look at each loss."""
    run.mkdir()
    parallel = make_parallel(job, RankWiring(), supervised=True)
    torch.manual_seed(0)
    model = task.model().to(parallel.device)
    parallel.wrap(Step(model, task, autocast(job.train.precision, parallel.device), job.train.compile))
    report = Report(job, run, 0, parallel, Pulse(0))
    return Trainer(job, task, parallel, report, model, lambda: False, task.train_dataset(), task.eval_dataset())


def raw_steps(job: Job, task: ByteLM) -> Iterator[None]:
    """The same by hand. It waits for the GPU only to read losses, all of them as often as ours writes them.

    What ours does beyond that, such as its look at each loss one step late, counts as its overhead.
    """
    device, train, windows = torch.device(job.device), job.train, task.train_dataset()
    torch.manual_seed(0)
    model = task.model().to(device)
    betas = tuple(train.optimizer_args["betas"])
    optimizer = torch.optim.AdamW(model.parameters(), train.lr, betas, weight_decay=train.weight_decay, fused=True)
    compute = torch.compile(model) if train.compile else model
    pin = job.data.pin_memory and device.type == "cuda"

    def load() -> Tensor:
        batch = torch.stack([windows[index] for index in torch.randint(len(windows), (train.batch_size,)).tolist()])
        return (batch.pin_memory() if pin else batch).to(device, non_blocking=True)

    batch, losses = load(), []
    for step in itertools.count(1):
        with (autocast(train.precision, device) or nullcontext)():
            logits = compute(batch[:, :-1].long())
            loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].long().flatten())
        batch = load()  # while the GPU computes
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % job.log.every_steps == 0:
            torch.stack(losses).tolist()
            losses.clear()
        yield


def measure_speed(
    jobs: dict[str, Job], task: ByteLM, options: argparse.Namespace, peak: float | None, folder: Path
) -> list[Row]:
    """Both sides of all `jobs`, by configuration, in turn: a row for each. `peak`: of the GPU, TFLOP/s in bf16."""
    sides: dict[str, tuple[Training, Training]] = {}
    for name, job in jobs.items():
        ours = Training(job, make_trainer(job, task, folder / name).train(), options.block)
        sides[name] = ours, Training(job, raw_steps(job, task), options.block)
    for number in range(options.rounds):
        for ours, raw in sides.values():
            for side in (ours, raw)[:: -1 if number % 2 else 1]:
                side.times.append(side.run(ours.count))
    rows = []
    for name, (ours, raw) in sides.items():
        tokens = jobs[name].train.batch_size * task.shape.context
        tflop = tokens * flops_per_token(task.shape) / 1e12
        mfu = [100 * tflop / step_s / peak for step_s in ours.times] if peak and "bf16" in name else None
        rows.append({
            "configuration": name, "rounds": options.rounds, "block": ours.count, "configurations_in_turn": len(jobs),
            "ratio": spread([a / b for a, b in zip(ours.times, raw.times, strict=True)]),
            "kilotokens_per_s": spread([tokens / 1000 / step_s for step_s in ours.times]),
            "raw_kilotokens_per_s": spread([tokens / 1000 / step_s for step_s in raw.times]),
            "mfu_percent": spread(mfu) if mfu else None,
            "peak_gib": ours.peak_gib, "raw_peak_gib": raw.peak_gib,
        })  # fmt: skip
    return rows


def flops_per_token(shape: Shape) -> int:
    """Of forward and backward: 6 for each weight that multiplies, 12 x layers x width x context for attention.

    Source: Chowdhery et al., PaLM, 2022 (arXiv 2204.02311), appendix B: no recomputation, attention not halved.
    """
    weights = 12 * shape.layers * shape.width**2 + VOCABULARY * shape.width
    return 6 * weights + 12 * shape.layers * shape.width * shape.context


def ways_to_save(trainer: Trainer, folder: Path) -> dict[str, Callable[[], Callable[[], None]]]:
    """Each saves what the trainer holds, and returns what waits until all is on disk."""
    state, moments = trainer.state, [value for each in trainer.optimizer.state.values() for value in each.values()]
    tensors = [value for value in (*state.model.state_dict().values(), *moments) if isinstance(value, Tensor)]
    copies = [torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda) for tensor in tensors]

    def copy() -> Callable[[], None]:
        for kept, tensor in zip(copies, tensors, strict=True):
            kept.copy_(tensor, non_blocking=True)
        synchronize()
        return lambda: None

    def ours(writer: Writer) -> Callable[[], None]:
        state.writer = writer
        state.save()
        return lambda: writer.wait(lambda: None)

    def torch_save() -> Callable[[], None]:
        with (folder / "state.pt").open("wb", buffering=0) as file:
            torch.save({"model": state.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}, file)
            os.fsync(file.fileno())
        return lambda: None

    waiting, beside = Writer(asynchronous=False), Writer(asynchronous=True)
    return {"copy to the CPU": copy, "muster": partial(ours, beside),
            "muster, asynchronous=false": partial(ours, waiting), "torch.save": torch_save}  # fmt: skip


def measure_saves(job: Job, task: ByteLM, rounds: int, folder: Path) -> list[Row]:
    """The stall, by which a step that saves is longer, and the steps beside the writing; of each way, in turn."""
    trainer = make_trainer(job, task, folder / "saves")
    training = Training(job, trainer.train(), 0)
    ways = ways_to_save(trainer, folder)
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, save in ways.items():
            usual = statistics.median(training.run(1) for _ in range(10))
            began = time.perf_counter()
            wait = save()
            stall = time.perf_counter() - began
            beside = statistics.median(training.run(1) for _ in range(10))
            wait()
            found[name].append((stall, beside / usual, time.perf_counter() - began))
    limits = [stall for stall, _, _ in found["copy to the CPU"]]
    return [{
        "way": name, "rounds": rounds, "first_stall_ms": round(1000 * saves[0][0], 1),  # it allocates: counted apart
        "stall_ms": spread([1000 * stall for stall, _, _ in saves[1:]]),
        "ratio": spread([stall / limit for (stall, _, _), limit in zip(saves[1:], limits[1:], strict=True)]),
        "step_beside": spread([beside for _, beside, _ in saves[1:]]),
        "whole_s": spread([whole for _, _, whole in saves[1:]]),
    } for name, saves in found.items()]  # fmt: skip


def main() -> None:
    """Measure, print tables, write JSON; without a GPU say so."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="gpt2", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=16, help="windows of a step")
    parser.add_argument("--rounds", type=int, default=10, help="blocks of each training, and saves of each way")
    parser.add_argument("--block", type=float, default=1.0, help="seconds of a block, at least")
    parser.add_argument("--configurations", nargs="+", default=list(CONFIGURATIONS), choices=list(CONFIGURATIONS))
    parser.add_argument("--apart", action="store_true", help="one configuration after the other, to save memory")
    parser.add_argument("--output", type=Path, help="default: bench/results/gpu.json, gpu-on-cpu.json without one")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("skipped: no CUDA GPU")
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the trainer does it, see `trainer.rank`
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    peak, task = PEAK_TFLOPS.get(name), LongEpochs(options.size)
    given = ("parallel=single", f"device={options.device}", f"task_args.size={options.size}", "train.steps=1000000",
             f"train.batch_size={options.batch}", "train.lr=0.0006")  # fmt: skip
    jobs = {key: load_job(JOB, [*given, *CONFIGURATIONS[key]]) for key in options.configurations}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[VARIABLE] = str(Path(folder, "heartbeat"))
        states = 2 * len(jobs) * 16 * task.shape.parameters  # bytes of weights, gradients and both moments
        apart = options.apart or (options.device == "cuda" and states > torch.cuda.mem_get_info()[0] / 2)
        for part in [{key: job} for key, job in jobs.items()] if apart else [jobs]:
            rows += measure_speed(part, task, options, peak, Path(folder))
            torch.compiler.reset(), gc.collect(), torch.cuda.empty_cache()  # compiled models would stay
        saves = measure_saves(load_job(JOB, [*given, BF16]), task, options.rounds, Path(folder))
    gflop = flops_per_token(task.shape) / 1e9
    facts = {"device": name, "cuda": torch.version.cuda, "size": options.size, "batch": options.batch}
    output = options.output or measure.RESULTS / ("gpu.json" if options.device == "cuda" else "gpu-on-cpu.json")
    measure.write_results(output, **facts, gflop_per_token=gflop, peak_tflops=peak, speed=rows, saves=saves)
    head = ["configuration", "wall time / raw loop", "1,000 tokens/s", "raw loop's", "MFU, %", "peak GiB", "raw loop's"]
    shown = ("ratio", "kilotokens_per_s", "raw_kilotokens_per_s", "mfu_percent")
    print(table([head, *([row["configuration"], *(show(row[key]) for key in shown), str(row["peak_gib"] or "-"),
                          str(row["raw_peak_gib"] or "-")] for row in rows)]))  # fmt: skip
    print(f"MFU = tokens/s x {gflop:.3f} GFLOP / {peak} TFLOP/s, bf16 dense, {name}; arXiv 2204.02311, appendix B"
          if peak else f"no MFU: the peak of {name} is not in PEAK_TFLOPS; tokens/s stand without it")  # fmt: skip
    head = ["way of saving", "first stall, ms", "stall, ms", "stall / copy", "step beside it", "until on disk, s"]
    shown = ("stall_ms", "ratio", "step_beside", "whole_s")
    print(table([head, *([row["way"], str(row["first_stall_ms"]), *(show(row[key]) for key in shown)]
                         for row in saves)]))  # fmt: skip


if __name__ == "__main__":
    main()
