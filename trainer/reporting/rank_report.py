"""What a rank reports: heartbeats, metrics, events, progress lines, samples, and the result at the end.

The sinks of metrics are in `trainer.reporting.metrics`, heartbeats in `trainer.reporting.heartbeat`.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer.config.job import Job
from trainer.data.sampler import MicroBatch, Position
from trainer.parallel.base import DeferredScalar, Parallel
from trainer.records import is_count, write_json
from trainer.reporting.heartbeat import Pulse
from trainer.reporting.metrics import Sink, make_sinks
from trainer.reporting.traffic import Counts, read_counts, since
from trainer.run.event_files import write_as
from trainer.run.fence import Fence
from trainer.run.folder import RunFolder
from trainer.run.line_file import LineFile, warn
from trainer.wiring.variables import group_rank


class Report:
    """What one rank writes into the run folder. Rank 0 writes what all ranks share."""

    def __init__(self, job: Job, run: RunFolder, attempt: int, parallel: Parallel, pulse: Pulse) -> None:
        self.job, self.run, self.attempt, self.parallel, self.pulse = job, run, attempt, parallel, pulse
        self.is_first = parallel.rank == 0
        self.fence = Fence(run, attempt)
        write_as(group_rank())
        self.shown = bool(job.script) and pulse.heartbeat is not None
        """Whether `muster run` shows what this rank prints."""
        self.sinks: list[Sink] = []
        """Made when there is something to write: the first step need not wait for the import of TensorBoard."""
        self.profile = Profile(job.log.profile_steps, run.profile / f"rank{parallel.rank}.json")
        self.samples_file: LineFile | None = None
        self.trained = False
        self.samples_done = 0
        """In this attempt."""
        self.paused_s = 0.0
        """Spent on evaluations and saves."""
        self.losses: list[DeferredScalar | float] = []
        """Of the steps since metrics were last written, which had so many samples:"""
        self.samples_since = 0
        self.first_step, self.steps, self.steps_per_epoch = 1, 0, 1
        self.counts: Counts = {}
        self.traffic: dict[str, Any] = {}
        """Of this rank, in the steps after the first."""
        self.started = self.written = time.perf_counter()
        self.position = Position()

    def start(self, position: Position, steps: int, steps_per_epoch: int) -> None:
        """The loop begins at `position` and is to do `steps` in all."""
        self.first_step, self.steps, self.steps_per_epoch = position.step + 1, steps, steps_per_epoch
        self.event(
            "training", step=position.step, steps=steps, steps_per_epoch=steps_per_epoch,
            device=str(self.parallel.device), world_size=self.parallel.world_size, parallel=self.job.parallel,
        )  # fmt: skip
        if self.job.log.samples:
            self.samples_file = LineFile(self.run.samples(self.parallel.rank))
        self.profile.step(position.step)
        self.started = self.written = time.perf_counter()
        self.phase("beginning", position)

    def step(self, position: Position, loss: DeferredScalar | float, rate: float, samples: int) -> None:
        """A step is done; `loss` is the mean over its global batch."""
        self.done(position, samples)
        if not self.is_first:
            return
        self.losses.append(loss)
        if position.step % self.job.log.every_steps and position.step != self.steps:
            return
        losses = [float(loss) for loss in self.losses]
        values = {"loss": losses[-1], "mean_loss": sum(losses) / len(losses), "lr": rate}
        self.log(position, values | self.parallel.measurements())
        self.losses.clear()

    def done(self, position: Position, samples: int) -> None:
        """A step of so many samples is done, whatever came of it."""
        self.pulse.beat(position.step, "training")
        self.trained = True
        self.samples_done += samples
        self.samples_since += samples
        self.profile.step(position.step)
        if position.step == self.steps > self.first_step:
            sent, received = since(self.counts)
            steps = self.steps - self.first_step
            self.traffic = {"rank": self.parallel.rank, "steps": steps, "sent": sent, "received": received}
        if position.step == self.first_step:
            self.counts = read_counts()
            self.event("first_step", step=position.step)

    def log(self, position: Position, values: Mapping[str, float]) -> None:
        """Write values of the training, and its speed since they were last written."""
        now = time.perf_counter()
        speed = self.samples_since / max(now - self.written, 1e-9)
        self.written, self.samples_since = now, 0
        if self.is_first:
            self._write(position.step, "train", {**values, "samples_per_s": speed})

    def _write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        self.fence.check()
        if not self.sinks:
            self.sinks = make_sinks(self.run, self.attempt, self.first_step - 1, self.job.log.tensorboard)
        for sink in self.sinks:
            sink.write(step, kind, values)

    def evaluation(self, position: Position, values: Mapping[str, float]) -> None:
        """Write what an evaluation found, and say it; of a script `muster run` shows both, and would twice."""
        if self.is_first:
            self._write(position.step, "evaluation", values)
        if self.shown:
            return
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        epoch = -(-position.step // self.steps_per_epoch)
        self.say(f"step {position.step}/{self.steps}  epoch {epoch}  {shown}")

    def phase(self, name: str, position: Position) -> None:
        """Tell the agent what this rank is doing."""
        self.pulse.beat(position.step, name)
        self.position = position

    def pause(self, seconds: float) -> None:
        """An evaluation or a save is over. Its time does not count for the speed of the training.

        What was logged before a checkpoint is safe from here on: an attempt that resumes from it does not log it again.
        """
        for sink in self.sinks:
            sink.flush()
        self.written += seconds
        self.paused_s += seconds
        self.phase("training" if self.trained else "beginning", self.position)

    def samples(self, position: Position, micros: Sequence[tuple[MicroBatch, Any]]) -> None:
        """Record which samples this rank's part of the step consumed."""
        if self.samples_file is not None:
            self.fence.check()
            numbers = [int(index) for micro, _ in micros for index in micro.indices[: micro.count]]
            line = {"attempt": self.attempt, "epoch": position.epoch, "step": position.step, "samples": numbers}
            self.samples_file.write(line)

    def event(self, event: str, **fields: Any) -> None:
        """Record an event. Other ranks than the first record only what concerns themselves, by a field `rank`."""
        if self.is_first or fields.get("rank") is not None:
            self.run.record(event, attempt=self.attempt, **fields)

    def warn(self, text: str, event: str, **fields: Any) -> None:
        """Print a warning and record it."""
        print(f"WARNING: {text}", file=sys.stderr, flush=True)
        self.event(event, **fields)

    def notice(self, text: str) -> None:
        """Tell the user something that is not wrong, but may not be meant; rank 0 speaks for all."""
        if self.is_first:
            self.warn(text, "notice", message=text)

    def note(self, text: str) -> None:
        """Tell the user what Muster made of something; each launch of a run says it once."""
        self.say(f"NOTE: {text}")
        if not self.parallel.restarts and not self.shown:
            self.event("note", message=text)

    def was_training(self) -> bool:
        """Whether an earlier attempt came as far as its first step."""
        try:
            begun = [event for event in self.run.read_main_events() if event["event"] == "training"]
        except OSError:  # then everything is tried once more
            return False
        return any(attempt < self.attempt for event in begun if is_count(attempt := event.get("attempt")))

    def say(self, text: str) -> None:
        """Print a line to the first rank's log."""
        if self.is_first:
            print(text, flush=True)

    def finish(self, metrics: Mapping[str, float]) -> None:
        """The run is done: write the result and the last event."""
        memory = [line for lines in self.parallel.gather(self._memory()) for line in lines]
        traffic = [line for line in self.parallel.gather(self.traffic) if line]
        if not self.is_first:
            return
        self.fence.check()
        elapsed = time.perf_counter() - self.started
        speed = self.samples_done / max(elapsed - self.paused_s, 1e-9)
        result = {
            "metrics": dict(metrics), "steps": self.position.step, "samples_per_s": speed, "train_s": elapsed,
            "device": self.parallel.device.type, "world_size": self.parallel.world_size,
            "parallel": self.job.parallel, "peak_memory_mb": memory, "traffic_bytes": traffic,
        }  # fmt: skip
        try:
            write_json(self.run.result, result)
        except OSError as error:  # the training is done, and its weights are saved
            warn(f"{self.run.result} cannot be written: {error.strerror}. The result is {result}")
        self.event("done", step=self.position.step, **metrics)

    def _memory(self) -> list[dict[str, Any]]:
        """The peak memory, in MiB, of each device that this rank used."""
        if self.parallel.cuda:
            peaks = {str(device): torch.cuda.max_memory_allocated(device) / 2**20 for device in self.parallel.devices}
        else:
            peaks = {"cpu": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        rank = self.parallel.rank
        return [{"rank": rank, "device": device, "peak_mb": round(peak, 1)} for device, peak in peaks.items()]

    def close(self) -> None:
        self.profile.close()
        for sink in self.sinks:
            sink.close()
        if self.samples_file is not None:
            self.samples_file.close()


class Profile:
    """The trace of steps `first` to `last`, of which the first of a run is 1, for chrome://tracing or Perfetto."""

    def __init__(self, steps: Sequence[int], path: Path) -> None:
        """`steps`: (first, last), or none to trace nothing. `path`: the file to write."""
        self.first, self.last = steps or (1, 0)
        self.path = path
        self.profiler: torch.profiler.profile | None = None

    def step(self, done: int) -> None:
        """So many steps are done: begin or end the trace here, if it begins or ends here."""
        if self.profiler is None and self.first <= done + 1 <= self.last:
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        elif self.profiler is not None and done >= self.last:
            self.close()

    def close(self) -> None:
        """Write the trace, if one was begun. A run may end before the last step to trace."""
        if self.profiler is not None:
            self.profiler.stop()
            try:
                self.path.parent.mkdir(exist_ok=True)
                self.profiler.export_chrome_trace(str(self.path))
            except OSError as error:
                warn(f"{self.path} cannot be written: {error.strerror}")
            self.profiler = None
