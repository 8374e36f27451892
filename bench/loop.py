"""The cost of the loop: our trainer against the same training by hand and with Lightning Fabric, Lightning's Trainer
and accelerate.

All alternate in the same rank processes, in blocks of steps whose order changes from round to round, so that a noisy
machine slows all; CPU time of all ranks is compared, round by round. Ours runs with its defaults on: metrics,
TensorBoard, heartbeat, votes, checkpoints (its progress bar is drawn by the command, from what rank 0 writes, and is
not counted). Libraries are measured twice: as their documentation shows them, which includes a DataLoader, and lean,
with the raw loop's own batches and nothing beside the loop. What each does: `bench/loop_peers.py`.

    python bench/loop.py [--rounds 40] [--sizes small medium ten large] [--quick] [--output bench/results/loop.json]
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import measure
import torch
from loop_peers import OURS, PEERS, RAW, RAW_LOADER, SESSION, Case, Dense, begin, join
from measure import show, spread, table
from torch.utils.data import TensorDataset

from trainer.tasks.digits import Digits

SIZES: dict[str, tuple[type[Digits], int, int]] = {
    "small": (Dense, 32, 16), "medium": (Digits, 16, 64), "ten": (Digits, 16, 224), "large": (Digits, 32, 256)
}  # fmt: skip
"""Name: kind and width of the network, batch of each rank; about 0.3, 3, 10 and 30 ms a step on one core."""
GOALS = {"small": 1.10, "medium": 1.02}
GATES = {"small": 1.8, "medium": 1.5}
"""Of our ratio to the raw loop, on a machine that runs other tests too; a median above one fails `--quick`."""
BLOCK_S, WARM_UP = {1: 0.1, 2: 0.4}, 12
"""Wall time of a block of the raw loop by ranks, for two wait for each other; steps before anything counts."""
EPOCH = 100
"""The digits are repeated so often that an epoch, and with it the checkpoint at its end, has a realistic length."""
Plan = list[tuple[str, bool]]
"""Sizes and whether libraries run lean."""


def be_rank(
    rank: int, world_size: int, port: int, plan: Plan, names: list[str], rounds: int, folder: Path, answer: Connection
) -> None:
    """One rank: for each case of the plan send the CPU seconds that each contestant's step took in each round."""
    output = os.open(folder / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    parallel = join(world_size)
    for size, lean in plan:
        kind, width, batch_size = SIZES[size]
        task = kind(width)
        images, labels = task.train_dataset().tensors
        data = TensorDataset(images.repeat(EPOCH, 1, 1, 1), labels.repeat(EPOCH))
        own = folder / f"{size}-{lean}"
        own.mkdir(exist_ok=True)
        answer.send(alternate(Case(task, data, batch_size * world_size, parallel, own, lean), names, rounds))
    parallel.gather(None)  # wait for all
    os._exit(0)  # loops that never end hold the process group


def alternate(case: Case, names: list[str], rounds: int) -> dict[str, Any]:
    """Let all contestants do a block each, round by round, in an order that all ranks draw alike."""
    runs = {name: begin(name, case) for name in names}
    torch.set_num_threads(1)  # a library may have chosen another number
    for run in runs.values():
        run(WARM_UP)
    started = time.perf_counter()
    runs[RAW](WARM_UP)
    step_s = case.parallel.share((time.perf_counter() - started) / WARM_UP)  # ranks must agree on the length of a block
    block = max(3, min(300, round(BLOCK_S[case.world_size] / step_s)))
    gc.collect()
    gc.freeze()  # or each would pay for collecting among the objects of all
    costs = []
    for number in range(rounds):
        cost = {}
        for name in random.Random(number).sample(names, len(names)):
            before = time.process_time()
            runs[name](block)
            cost[name] = (time.process_time() - before) / block
        costs.append(cost)
    return {"costs": costs, "step_s": step_s, "block": block}


def measure_ranks(world_size: int, plan: Plan, names: list[str], rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Yield what the ranks of one process group answer for each case of the plan."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MUSTER_HEARTBEAT"] = str(folder / "heartbeat")  # the agent's part
        ranks, answers = [], []
        for rank in range(world_size):
            answer, end = context.Pipe(duplex=False)
            ranks.append(context.Process(
                target=be_rank, args=(rank, world_size, port, plan, names, rounds, folder, end), daemon=True
            ))  # fmt: skip
            ranks[-1].start()
            end.close()  # so that we notice when a rank has died
            answers.append(answer)
        try:
            for _ in plan:
                yield [answer.recv() for answer in answers]
        except EOFError:
            outputs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("output-*.txt")))
            raise SystemExit(f"a rank failed:\n{outputs}") from None
        finally:
            for process in ranks:
                process.join(30)
                process.kill()


def summarize(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row: CPU time summed over ranks, each contestant's ratio to the raw loop and ours to each, by rounds."""
    rounds = [
        {name: sum(cost[name] for cost in costs) for name in costs[0]}
        for costs in zip(*(answer["costs"] for answer in answers), strict=True)
    ]
    ours, raw = OURS, RAW
    others = [name for name in rounds[0] if name != raw]
    return {
        "rounds": len(rounds), "block": answers[0]["block"], "raw_wall_ms": 1000 * answers[0]["step_s"],
        "raw_cpu_ms": 1000 * statistics.median(cost[raw] for cost in rounds),
        "ratio": {name: spread([cost[name] / cost[raw] for cost in rounds]) for name in others},
        "ratio_of_sums": {name: sum(c[name] for c in rounds) / sum(c[raw] for c in rounds) for name in others},
        "ours_to": {name: spread([cost[ours] / cost[name] for cost in rounds]) for name in others if name != ours},
    }  # fmt: skip


def place(row: dict[str, Any], peers: Sequence[str]) -> str:
    """Ours among the libraries by median ratio, and which may be equal: with 1 between the quartiles of the ratio."""
    against = {name: row["ours_to"][name] for name in peers}
    number = 1 + sum(value["median"] > 1 for value in against.values())
    level = [name for name, value in against.items() if value["quartiles"][0] <= 1 <= value["quartiles"][1]]
    return f"{number} of {len(peers) + 1}" + (f", not apart from {' and '.join(level)}" if level else "")


def cell(value: dict[str, Any] | None) -> str:
    """The median with its quartiles: three digits, for a hundredth matters here."""
    if value is None or value["noisy"]:
        return show(value)
    low, high = value["quartiles"]
    return f"{value['median']:.3f} [{low:.3f}, {high:.3f}]"


def report(rows: Sequence[dict[str, Any]], columns: Sequence[str], peers: Sequence[str]) -> str:
    """The table, as text."""
    cells = [["CPU time / raw", "ranks", "libraries", "raw, ms", *columns, f"{OURS}'s place", "goal"]]
    for row in rows:
        goal, ours = GOALS.get(row["size"]), row["ratio"][OURS]
        met = "" if goal is None or ours["noisy"] else ": met" if ours["median"] <= goal else ": missed"
        cells.append([
            row["size"], str(row["ranks"]), "lean" if row["lean"] else "as documented", f"{row['raw_cpu_ms']:.2f}",
            *(cell(row["ratio"].get(name)) for name in columns), place(row, peers) if peers else "-",
            f"<= {goal}{met}" if goal else "-",
        ])  # fmt: skip
    return table(cells)


def check(rows: Sequence[dict[str, Any]]) -> int:
    """Print our ratio of each row; 1 when one is beyond its gate."""
    code = 0
    for row in rows:
        ratio, gate = row["ratio"][OURS], GATES.get(row["size"])
        failed = gate is not None and ratio["median"] > gate
        code |= failed
        limit = f" (must be <= {gate})" if gate else ""
        print(f"{row['size']}, {row['ranks']} ranks: {ratio['median']:.3f} of the raw loop's CPU time, with a session "
              f"{row['ratio'][SESSION]['median']:.3f}{limit}{': FAILED' if failed else ''}")  # fmt: skip
    return code


def main() -> int:
    """Measure, print, write; 1 when `--quick` finds a ratio that is far too high."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, help="default 40; 12 with --quick")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default all; small and medium with --quick")
    parser.add_argument("--quick", action="store_true", help="only ours against the raw loop, for CI")
    parser.add_argument("--output", type=Path, help="default bench/results/loop.json; none with --quick")
    options = parser.parse_args()
    # One arena: a thread's own would serve Lightning's Trainer otherwise than the loops in the main thread.
    variables = measure.environment(MALLOC_ARENA_MAX="1")
    os.environ.clear()
    os.environ |= variables
    peers, columns = [], [OURS, SESSION]
    if not options.quick:
        for name, package in PEERS.items():
            if measure.installed(package):
                peers.append(name)
            else:
                print(f"{name}: not installed, left out; `make bench` installs it (.ci/setup dev bench)")
        columns += [RAW_LOADER, *peers]
    sizes = options.sizes or list(GATES if options.quick else SIZES)
    plan = [(size, lean) for size in sizes for lean in ((False, True) if peers else (False,))]
    rows = []
    for ranks in (1, 2):
        rounds = options.rounds or (12 if options.quick else 40)
        results = measure_ranks(ranks, plan, [RAW, *columns], rounds)
        for (size, lean), answers in zip(plan, results, strict=True):
            rows.append({"size": size, "ranks": ranks, "lean": lean, **summarize(answers)})
            print(f"\r{len(rows)} of {2 * len(plan)} rows", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    output = options.output or (None if options.quick else measure.RESULTS / "loop.json")
    rows.sort(key=lambda row: (list(SIZES).index(row["size"]), row["lean"]))
    if output:
        measure.write_results(output, rows=rows)
    if options.quick:
        return check(rows)
    print(report(rows, columns, peers))
    return 0


if __name__ == "__main__":
    sys.exit(main())
