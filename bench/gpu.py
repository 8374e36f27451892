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
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from gpu_saves import measure_saves
from gpu_training import LongEpochs, Training, make_trainer, raw_steps, trainer_steps
from measure import show, spread, table

from trainer.config.job import Job
from trainer.config.load import merge_job, to_job
from trainer.tasks.bytelm import SIZES, VOCABULARY, ByteLM, Shape
from trainer.training.determinism import choose_kernels
from trainer.wiring.variables import HEARTBEAT

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


def measure_speed(
    jobs: dict[str, Job], task: ByteLM, options: argparse.Namespace, peak: float | None, folder: Path
) -> list[Row]:
    """Both sides of all `jobs`, by configuration, in turn: a row for each. `peak`: of the GPU, TFLOP/s in bf16."""
    sides: dict[str, tuple[Training, Training]] = {}
    for name, job in jobs.items():
        steps = trainer_steps(partial(make_trainer, job, task, folder / name))
        sides[name] = Training(job, steps, options.block), Training(job, raw_steps(job, task), options.block)
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
    choose_kernels("true", compiled=True)
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "the CPU"
    peak, task = PEAK_TFLOPS.get(name), LongEpochs(options.size)
    given = ("parallel=single", f"device={options.device}", f"task_args.size={options.size}", "train.steps=1000000",
             f"train.batch_size={options.batch}", "train.lr=0.0006")  # fmt: skip
    jobs = {key: to_job(merge_job(JOB, [*given, *CONFIGURATIONS[key]])) for key in options.configurations}
    gflop = flops_per_token(task.shape) / 1e9
    facts = {"device": name, "cuda": torch.version.cuda, "size": options.size, "batch": options.batch,
             "gflop_per_token": gflop, "peak_tflops": peak}  # fmt: skip
    output = options.output or measure.RESULTS / ("gpu.json" if options.device == "cuda" else "gpu-on-cpu.json")
    rows, saves = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ[HEARTBEAT] = str(Path(folder, "heartbeat"))
        states = 2 * len(jobs) * 16 * task.shape.parameters  # bytes of weights, gradients and both moments
        apart = options.apart or (options.device == "cuda" and states > torch.cuda.mem_get_info()[0] / 2)
        for part in [{key: job} for key, job in jobs.items()] if apart else [jobs]:
            rows += measure_speed(part, task, options, peak, Path(folder))
            measure.write_results(output, **facts, speed=rows, saves=saves)  # what follows may fail
            torch.compiler.reset(), gc.collect(), torch.cuda.empty_cache()  # compiled models would stay
        saves = measure_saves(to_job(merge_job(JOB, [*given, BF16])), task, options.rounds, Path(folder))
    measure.write_results(output, **facts, speed=rows, saves=saves)
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
