"""What a rank tells: heartbeat, metrics, progress lines, profile, and the result at the end."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.config.job import Job
from trainer.data.sampler import MicroBatch, Position
from trainer.parallel.modes import Late, Parallel
from trainer.records import Metrics, record_event, write_json
from trainer.reporting.heartbeat import Pulse


class Report:
    """One rank's side of the run folder; rank 0 writes what all share."""

    def __init__(self, job: Job, run: Path, attempt: int, parallel: Parallel, pulse: Pulse) -> None:
        """Nothing is opened before the training starts."""
        self.job, self.run, self.attempt, self.parallel, self.pulse = job, run, attempt, parallel, pulse
        self.first = parallel.rank == 0
        self.metrics: Metrics | None = None
        self.losses: list[Late | float] = []
        self.count = self.total = 0
        self.seconds = 0.0
        self.window = 0
        self.profiler: Any = None
        self.samples_file: Any = None

    def start(self, position: Position, steps: int, steps_per_epoch: int) -> None:
        """The loop begins at `position` of `steps`."""
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        if self.first:
            self.metrics = Metrics(self.run, self.attempt, position.step, self.job.log.tensorboard)
            self.event(
                "training",
                step=position.step,
                steps=steps,
                steps_per_epoch=steps_per_epoch,
                device=str(self.parallel.device),
                world_size=self.parallel.world_size,
                parallel=self.job.parallel,
            )
        if self.job.log.samples:
            self.samples_file = (self.run / f"samples-rank{self.parallel.rank}.jsonl").open("a", buffering=1)
        self._profile(position.step)
        self.started = self.mark = time.perf_counter()
        self.pulse.beat(position.step, "training")

    def step(self, position: Position, loss: Late | float, rate: float, samples: int) -> None:
        """A step is done; `loss` is the mean over its global batch."""
        self.pulse.beat(position.step, "training")
        self.total += samples
        if self.job.log.profile_steps:
            self._profile(position.step)
        if self.metrics is None:
            return
        if position.step - 1 == self.metrics.step:
            self.event("first_step", step=position.step)
        self.losses.append(loss)
        self.window += samples
        if position.step % self.job.log.every_steps and position.step != self.steps:
            return
        now = time.perf_counter()
        values = [float(value) for value in self.losses]
        speed = self.window / max(now - self.mark, 1e-9)
        self.metrics.write(position.step, "train", {
            "loss": values[-1], "mean_loss": sum(values) / len(values), "lr": rate, "samples_per_s": speed,
        })  # fmt: skip
        self.losses.clear()
        self.mark, self.window = now, 0

    def evaluation(self, position: Position, values: Mapping[str, float]) -> None:
        """An evaluation is done."""
        if self.metrics is None:
            return
        self.metrics.write(position.step, "evaluation", values)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        epoch = -(-position.step // self.steps_per_epoch)
        self.say(f"step {position.step}/{self.steps}  epoch {epoch}  {shown}")

    def phase(self, name: str, position: Position) -> None:
        """Tell the agent what this rank is busy with."""
        self.pulse.beat(position.step, name)
        self.position = position

    def pause(self, seconds: float) -> None:
        """Leave the time of an evaluation or a save out of the training speed."""
        self.mark += seconds
        self.seconds += seconds
        self.pulse.beat(self.position.step, "training")

    def samples(self, position: Position, micros: Sequence[tuple[MicroBatch, Any]]) -> None:
        """Record which samples this rank's part of the step consumed."""
        if self.samples_file is not None:
            numbers = [int(index) for micro, _ in micros for index in micro.indices[: micro.count]]
            line = {"attempt": self.attempt, "epoch": position.epoch, "step": position.step, "samples": numbers}
            self.samples_file.write(json.dumps(line) + "\n")

    def event(self, event: str, **facts: Any) -> None:
        """Append to events.jsonl; rank 0 speaks for all, others only of what is theirs."""
        if self.first or facts.get("rank") is not None:
            record_event(self.run, event, attempt=self.attempt, **facts)

    def warn(self, text: str, event: str, **facts: Any) -> None:
        """Say something loudly, and record it."""
        print(f"WARNING: {text}", file=sys.stderr, flush=True)
        self.event(event, **facts)

    def say(self, text: str) -> None:
        """Print a line to this rank's log."""
        if self.first:
            print(text, flush=True)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """The run is done: memory of all ranks, the result, the last event."""
        memory = [line for lines in self.parallel.gather_objects(self._memory()) for line in lines]
        if not self.first:
            return
        elapsed = time.perf_counter() - self.started
        speed = self.total / max(elapsed - self.seconds, 1e-9)
        write_json(self.run / "result.json", {
            "metrics": dict(metrics), "steps": self.steps, "samples_per_s": speed, "train_s": elapsed,
            "device": self.parallel.device.type, "world_size": self.parallel.world_size,
            "parallel": self.job.parallel, "peak_memory_mb": memory,
        })  # fmt: skip
        self.event("done", step=self.steps, **metrics)

    def _memory(self) -> list[dict[str, Any]]:
        """Peak memory, MiB, of each device that this rank used."""
        rank = self.parallel.rank
        if not self.parallel.cuda:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            return [{"rank": rank, "device": "cpu", "peak_mb": round(peak, 1)}]
        return [
            {"rank": rank, "device": str(device), "peak_mb": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}
            for device in self.parallel.devices
        ]

    def _profile(self, done: int) -> None:
        """Trace the steps that the job names, of which the first is 1, for chrome://tracing or Perfetto."""
        if not self.job.log.profile_steps:
            return
        first, last = self.job.log.profile_steps
        if self.profiler is None and first <= done + 1 <= last:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler is not None and done >= last:
            self._write_profile()

    def _write_profile(self) -> None:
        self.profiler.stop()
        folder = self.run / "profile"
        folder.mkdir(exist_ok=True)
        self.profiler.export_chrome_trace(str(folder / f"rank{self.parallel.rank}.json"))
        self.profiler = None

    def close(self) -> None:
        """Flush what is open."""
        if self.profiler is not None:  # the run ended before the last step to trace
            self._write_profile()
        if self.metrics is not None:
            self.metrics.close()
        if self.samples_file is not None:
            self.samples_file.close()
