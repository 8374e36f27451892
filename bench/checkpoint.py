"""What a save costs the training: the step that waits for it, and those beside which it is written.

Ways of saving take turns on the same state in one process, whose steps are matrix products on one core. A stall is
the time of the call that saves; its limit is one copy of the state in memory. Everything goes to one folder on disk.

    python bench/checkpoint.py [--megabytes 400 2000] [--rounds 5] [--quick] [--output bench/results/checkpoint.json]
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from measure import show, spread, table

from trainer.agent.checkpoint_writer import CheckpointWriter
from trainer.agent.fork_server import ensure_fork_server, prepare_fork_server
from trainer.checkpoint.keeper import Keeper
from trainer.checkpoint.memory import Memory
from trainer.checkpoint.writer import Order
from trainer.config.job import Checkpoints, Job
from trainer.parallel.base import Parallel
from trainer.run.folder import RunFolder
from trainer.wiring.rank import rank_wiring

STEP_S = 0.02
TENSORS = 40
"""As many as in a model of some size; the state is cut into so many equal ones."""
Save = Callable[[dict[str, Any], Path], Callable[[], None]]
"""Saves a state in a new folder; returns what waits until it is on disk."""


def nothing() -> None:
    """No sign of life is expected here."""


class Ways:
    """The ways of saving; each keeps what it would keep from one save to the next."""

    def __init__(self, state: dict[str, Any], agent: CheckpointWriter) -> None:
        self.agent = agent
        self.keepers = {asynchronous: make_keeper(asynchronous) for asynchronous in (True, False)}
        self.copies = {name: torch.empty_like(tensor) for name, tensor in tensors(state).items()}

    def copy(self, state: dict[str, Any], folder: Path) -> Callable[[], None]:
        """The limit: nothing is written."""
        for name, tensor in tensors(state).items():
            self.copies[name].copy_(tensor)
        return nothing

    def ours(self, state: dict[str, Any], folder: Path) -> Callable[[], None]:
        """A copy, and a process that hashes, writes and commits it."""
        return self._save(True, state, folder)

    def _save(self, asynchronous: bool, state: dict[str, Any], folder: Path) -> Callable[[], None]:
        folder.mkdir()
        keeper, order = self.keepers[asynchronous], Order(str(folder), 1, 0, {}, 1, None)
        keeper.save(order, 2, {"model": state["model.pt"], "state": state["state.pt"]}, nothing)
        self.agent.look()
        return lambda: keeper.wait(nothing)

    def close(self) -> None:
        """Let the next ones begin anew."""
        for keeper in self.keepers.values():
            keeper.close(nothing)
        if self.agent.process is not None:
            self.agent.process.join()

    def ours_waiting(self, state: dict[str, Any], folder: Path) -> Callable[[], None]:
        """`checkpoint.asynchronous=false`."""
        return self._save(False, state, folder)

    def torch_save(self, state: dict[str, Any], folder: Path) -> Callable[[], None]:
        """What most scripts do; neither verified nor, but for the fsync that we add, surely on disk."""
        folder.mkdir()
        with (folder / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        return nothing

    def torch_async_save(self, state: dict[str, Any], folder: Path) -> Callable[[], None]:
        """torch.distributed.checkpoint, with its defaults."""
        from torch.distributed.checkpoint import async_save

        future = async_save(tensors(state), checkpoint_id=folder)
        return lambda: (future.result(), None)[1]


COPY, OURS, BESIDE = "memory copy", "muster", "muster, while another is written"
QUICK = (COPY, OURS, BESIDE)
GATE = 2.0
"""What fails `--quick`, on a machine that runs other tests too: a median ratio to the copy above it."""
WAYS: dict[str, Callable[[Ways], Save]] = {
    COPY: lambda ways: ways.copy, OURS: lambda ways: ways.ours, BESIDE: lambda ways: ways.ours,
    "muster, asynchronous=false": lambda ways: ways.ours_waiting, "torch.save": lambda ways: ways.torch_save,
    "torch async_save": lambda ways: ways.torch_async_save,
}  # fmt: skip


def tensors(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All of a state, flat."""
    return {f"{part}.{name}": tensor for part, values in state.items() for name, tensor in values.items()}


def make_state(megabytes: int) -> dict[str, Any]:
    """A third of it is the model, as with Adam."""
    each = megabytes * 10**6 // 4 // TENSORS
    values = [torch.randn(each) for _ in range(TENSORS)]
    return {"model.pt": {f"weight{n}": values[n] for n in range(TENSORS // 3)},
            "state.pt": {f"moment{n}": values[n] for n in range(TENSORS // 3, TENSORS)}}  # fmt: skip


def make_keeper(asynchronous: bool) -> Keeper:
    """As the only rank of an agent makes it."""
    job = Job(device="cpu", parallel="single", checkpoint=Checkpoints(asynchronous=asynchronous))
    return Keeper(job, Parallel(job, rank_wiring()), RunFolder(Path("bench")), 0, lambda: False, print)


def make_step() -> Callable[[], float]:
    """One step of a training on one core; returns its seconds."""
    side = 256
    left = torch.randn(side, side)

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            left @ left
        return time.perf_counter() - began

    run(50)
    count = max(1, round(STEP_S / (run(100) / 100)))
    return lambda: run(count)


def compare(
    names: Sequence[str], megabytes: int, rounds: int, folder: Path, agent: CheckpointWriter
) -> list[dict[str, Any]]:
    """Stalls, slow-down while writing, seconds until all is on disk; of each way over all rounds."""
    state, step = make_state(megabytes), make_step()
    ways = Ways(state, agent)
    found: dict[str, dict[str, list[float]]] = {name: {"stall": [], "slower": [], "whole": []} for name in names}
    for number in range(rounds + 1):  # the first allocates, and does not count
        for name in names:
            alone = statistics.median(step() for _ in range(20))
            target = folder / f"{number}-{name.replace(' ', '-')}"
            before = ways.ours(state, folder / "before") if name == BESIDE else nothing
            began = time.perf_counter()
            wait = WAYS[name](ways)(state, target)
            stall = time.perf_counter() - began
            beside = [step() for _ in range(20)]
            wait()
            before()
            whole = time.perf_counter() - began
            for done in (target, folder / "before"):
                shutil.rmtree(done, ignore_errors=True)
            os.sync()
            if number:
                for key, value in (("stall", stall), ("slower", statistics.median(beside) / alone), ("whole", whole)):
                    found[name][key].append(value)
    ways.close()
    limit = found[COPY]["stall"]
    return [
        {
            "way": name, "megabytes": megabytes, "rounds": rounds, "stall_s": spread(values["stall"]),
            "ratio": spread([a / b for a, b in zip(values["stall"], limit, strict=True)]),
            "slower": spread(values["slower"]), "whole_s": spread(values["whole"]),
        }
        for name, values in found.items()
    ]  # fmt: skip


def check(rows: Sequence[dict[str, Any]]) -> int:
    """Print the ratios of ours; 1 when one is beyond the gate."""
    code = 0
    for row in rows:
        ratio = row["ratio"]["median"]
        if row["way"] != COPY:
            code |= ratio > GATE
            print(f"{row['way']}: {ratio:.2f} of a copy in memory (must be <= {GATE})")
    return code


def main() -> int:
    """Measure, print a table, write JSON; 1 when `--quick` finds a save that is far too slow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", help="default 400 and 2000; 200 with --quick")
    parser.add_argument("--quick", action="store_true", help="only ours against a copy in memory, for CI")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "checkpoint.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    rows = []
    prepare_fork_server("task")
    ensure_fork_server()
    memory = Memory.make()  # the agent's part
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        agent = CheckpointWriter(Path(folder), memory)
        os.environ |= memory.environment() | agent.environment()
        for megabytes in options.megabytes or ([200] if options.quick else [400, 2000]):
            rows += compare(QUICK if options.quick else list(WAYS), megabytes, options.rounds, Path(folder), agent)
        agent.close(0)
    torch.distributed.destroy_process_group()
    if options.quick:
        return check(rows)
    head = ["way of saving", "state, MB", "stall, s", "stall / memory copy", "step beside it", "until on disk, s"]
    print(table([head, *(
        [row["way"], str(row["megabytes"]), *(show(row[key]) for key in ("stall_s", "ratio", "slower", "whole_s"))]
        for row in rows
    )]))  # fmt: skip
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of all ways together: {peak:,.0f} MiB; muster's own share is two copies of the state")
    measure.write_results(options.output, rows=rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
