"""The time of a DDP step predicted from its measured parts, checked on 1, 2 and 4 ranks; then predicted for N nodes.

The parts, each measured without the others: forward, backward (with the copy of gradients into buckets that DDP makes
in it) and update, by hand, in as many processes as there are ranks, which do not communicate: on fewer cores than
ranks they slow each other down, and that is no communication. And all-reduces of some sizes, nothing else running,
from which latency and bandwidth are fitted. Nothing is fitted to a step of DDP. An all-reduce of gloo needs the
processor that computes; for what share of its time is measured, too (`busy` in scale_model.py). Parts and steps take
turns, and a prediction is compared with the steps of its round: CPU time, and wall time where nothing else ran. For N
nodes, of one rank each, the link, the rate of failures and the times to save and to restart are options.

    python bench/scale.py [--rounds 15] [--bandwidth-gbit 25] [--latency-us 20] [--output bench/results/scale.json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import measure
import scale_model
import torch
import torch.distributed as dist
from measure import RESULTS, show, spread, table
from scale_model import Compute, Faults, Link
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.wiring.hardware import usable_processors

RANKS = (1, 2, 4)
NODES = (1, 2, 4, 8, 16, 64, 256)
WIDTH, LAYERS, BATCH = 1024, 8, 64
"""A perceptron with 4 MiB of gradients a layer; samples per rank, however many ranks there are."""
CAP = 8 * 2**20
"""DDP's bucket_cap_mb, in bytes; smaller than its default, so that this model fills several."""
SIZES_MB = (0.25, 1, 4, 16)
"""Of the all-reduces that are timed; the buckets lie between."""
STEPS, COMPUTE_S, REPEATS = 6, 0.4, 3
"""In a turn: steps of DDP, seconds of steps without communication, all-reduces of each size."""
GOAL = 0.15
QUIET = 0.9
"""Share of the cores that computing alone must have got; else others ran, and the round's wall times do not count."""
FAILURES = 6.5
"""Per 1,000 node-days: RSC-1 of Kokolis et al., arXiv 2410.21680 (RSC-2: 2.34). The Llama 3 paper, arXiv 2407.21783,
counts 419 unexpected interruptions in 54 days on 2,048 nodes: 3.8."""
SAVE_S, RESTART_S = 1.0, 60.0
"""Assumed where the other benches have not measured them here."""
CORES = usable_processors()[0]


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its optimizer, the same on all ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    return model, torch.optim.AdamW(model.parameters(), fused=True)


class Rank:
    """One process: the training by hand, and with DDP for each number of ranks that it takes part in."""

    def __init__(self, rank: int) -> None:
        """All ranks of the group must be here."""
        self.inputs, self.labels = torch.randn(BATCH, WIDTH), torch.randint(WIDTH, (BATCH,))
        self.reduced = [torch.zeros(int(size * 2**18)) for size in SIZES_MB]
        self.model, self.optimizer = make()
        self.ready: list[tuple[float, int]] = []
        for value in self.model.parameters():
            value.register_post_accumulate_grad_hook(self.bucketed(torch.empty_like(value)))
        self.groups = {ranks: dist.new_group(range(ranks)) for ranks in RANKS}
        self.wrapped = {}
        for ranks in RANKS:
            if rank < ranks:
                settings = {"bucket_cap_mb": CAP / 2**20, "gradient_as_bucket_view": True}
                model = DistributedDataParallel(make()[0], process_group=self.groups[ranks], **settings)
                self.wrapped[ranks] = model, torch.optim.AdamW(model.parameters(), fused=True)

    def bucketed(self, view: Tensor) -> Callable[[Tensor], None]:
        """What DDP does with a new gradient before it communicates: divide it into its place in a bucket."""

        def copy(value: Tensor) -> None:
            torch.mul(value.grad, 0.5, out=view)
            value.grad = view
            self.ready.append((time.perf_counter(), value.nbytes))

        return copy

    def step_by_hand(self) -> list[float]:
        """Seconds of forward, backward, update; then from the start of backward until each gradient was ready."""
        self.ready.clear()
        times = [time.perf_counter()]
        loss = nn.functional.cross_entropy(self.model(self.inputs), self.labels)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        times.append(time.perf_counter())
        return [*(after - before for before, after in pairwise(times)), *(when - times[1] for when, _ in self.ready)]

    def step_of_ddp(self, ranks: int) -> None:
        """The same with communication."""
        model, optimizer = self.wrapped[ranks]
        nn.functional.cross_entropy(model(self.inputs), self.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    def turn(self, ranks: int) -> dict[str, Any]:
        """Parts and steps for a number of ranks; of this rank, seconds of wall and of CPU time."""
        group, steps = self.groups[ranks], []

        def compute() -> None:
            end = time.perf_counter() + COMPUTE_S * max(1, ranks / CORES)
            while not steps or time.perf_counter() < end:
                cpu, step = time.process_time(), self.step_by_hand()
                if not steps or time.perf_counter() < end:  # only then all computed beside it
                    steps.append([time.process_time() - cpu, *step])

        timed(compute, group)
        found = {"compute": mean(steps), "sizes": [size for _, size in self.ready], "reduce": []}
        for tensor in self.reduced if ranks > 1 else ():
            taken = timed(lambda tensor=tensor: [dist.all_reduce(tensor, group=group) for _ in range(REPEATS)], group)
            found["reduce"].append([tensor.nbytes, *(value / REPEATS for value in taken)])
        taken = timed(lambda: [self.step_of_ddp(ranks) for _ in range(STEPS)], group)
        found["step"] = [value / STEPS for value in taken]
        return found


def timed(work: Callable[[], Any], group: Any) -> tuple[float, float]:
    """Wall and CPU seconds of this process, from when all ranks of the group are here."""
    dist.barrier(group)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def work(rank: int, folder: str, rounds: int) -> None:
    """One rank, from its start to its end; writes (round, ranks, what the turn found)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(RANKS))
    this, found = Rank(rank), []
    for number in range(rounds + 1):
        first = number % len(RANKS)
        for ranks in RANKS[first:] + RANKS[:first]:
            dist.barrier()
            if rank >= ranks:
                continue
            result = this.turn(ranks)
            if number:  # the first round allocates, and DDP rearranges its buckets in it
                found.append((number, ranks, result))
        if rank == 0:
            print(f"\rround {number} of {rounds}", end="", file=sys.stderr, flush=True)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def run(rounds: int) -> dict[int, list[list[dict[str, Any]]]]:
    """By number of ranks, for each round: what each rank found."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (folder, rounds), nprocs=max(RANKS))
        answers = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(max(RANKS))]
    print(file=sys.stderr)
    found = {ranks: [[] for _ in range(rounds)] for ranks in RANKS}
    for number, ranks, result in (turn for answer in answers for turn in answer):
        found[ranks][number - 1].append(result)
    return found


def mean(rows: list[list[float]]) -> list[float]:
    """Column by column."""
    return [fmean(column) for column in zip(*rows, strict=True)]


def compare(ranks: int, results: list[dict[str, Any]]) -> dict[str, Any]:
    """One round: what its parts predict beside what was measured in it; seconds, and the share of the cores we got."""
    cpu_s, forward_s, backward_s, update_s, *ready_s = mean([result["compute"] for result in results])
    compute = Compute(forward_s, backward_s, update_s, ready_s, results[0]["sizes"], cpu_s)
    reduces = [mean(list(rows)) for rows in zip(*(result["reduce"] for result in results), strict=True)]
    wall_s, step_cpu_s = mean([result["step"] for result in results])
    return {
        "compute": compute, "share": ranks * cpu_s / min(ranks, CORES) / compute.whole_s, "wall_s": wall_s,
        "cpu_s": step_cpu_s, "predicted": scale_model.predict(ranks, CORES, compute, CAP, reduces),
    }  # fmt: skip


def summarize(found: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each number of ranks: parts, prediction, measurement; wall times of quiet rounds alone."""
    rows = []
    for ranks, rounds in found.items():
        quiet = [one for one in rounds if one["share"] >= QUIET]
        row: dict[str, Any] = {"ranks": ranks, "rounds": len(rounds), "quiet": len(quiet)}
        row["cpu_ratio"] = spread([one["predicted"].cpu_s / one["cpu_s"] for one in rounds])
        row["cpu_measured_ms"] = spread([1000 * one["cpu_s"] for one in rounds])
        row["cpu_predicted_ms"] = spread([1000 * one["predicted"].cpu_s for one in rounds])
        row["share"] = spread([one["share"] for one in rounds])
        rows.append(row)
        if not quiet:
            continue
        for key in ("forward_s", "backward_s", "update_s", "whole_s"):
            row[f"{key[:-2]}_ms"] = spread([1000 * getattr(one["compute"], key) for one in quiet])
        row["measured_ms"] = spread([1000 * one["wall_s"] for one in quiet])
        row["predicted_ms"] = spread([1000 * one["predicted"].step_s for one in quiet])
        for key, predicted in (("ratio", "step_s"), ("all_hidden", "hidden_s"), ("none_hidden", "exposed_s")):
            row[key] = spread([getattr(one["predicted"], predicted) / one["wall_s"] for one in quiet])
        if ranks > 1:
            row["reduce_ms"] = spread([1000 * one["predicted"].reduce_s for one in quiet])
            row["latency_us"] = spread([1e6 * one["predicted"].link.latency_s for one in quiet])
            row["gb_per_s"] = spread([one["predicted"].link.bandwidth / 1e9 for one in quiet])
            row["busy"] = spread([one["predicted"].busy for one in quiet])
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """The parts, and what they predict beside what was measured, as text."""
    parts = [["ranks", "quiet rounds", "compute, ms", "all-reduces, ms", "latency, us", "GB/s", "busy"]]
    check = [["ranks", "predicted, ms", "measured, ms", "predicted / measured", "CPU time, likewise", "error of both"]]
    for row in rows:
        keys = ("whole_ms", "reduce_ms", "latency_us", "gb_per_s", "busy")
        parts.append([str(row["ranks"]), f"{row['quiet']} of {row['rounds']}", *(show(row.get(key)) for key in keys)])
        keys = ("predicted_ms", "measured_ms", "ratio", "cpu_ratio")
        errors = " and ".join(map(verdict, (row.get("ratio"), row["cpu_ratio"])))
        check.append([str(row["ranks"]), *(show(row.get(key)) for key in keys), errors])
    return f"{table(parts)}\n\n{table(check)}"


def verdict(ratio: dict[str, Any] | None) -> str:
    """What the ratio of predicted to measured says."""
    if ratio is None or ratio["noisy"]:
        return "unknown"
    error = ratio["median"] - 1
    return f"{error:+.0%}, {'outside' if abs(error) > GOAL else 'within'} {GOAL:.0%}"


def measured_here(bench: str, column: str, row_name: str, key: str, otherwise: float) -> tuple[float, str]:
    """The median seconds that another bench found, of the last of its rows of that name, and where they are from."""
    path = RESULTS / f"{bench}.json"
    for row in reversed(json.loads(path.read_text())["rows"] if path.exists() else []):
        if row[column] == row_name and row[key] and not row[key]["noisy"]:
            return row[key]["median"], f"bench/{bench}.py"
    return otherwise, "assumed"


def report_nodes(rows: list[dict[str, Any]]) -> str:
    """The table of N nodes, as text; from no overlap at all to as much as the order of the buckets allows."""
    lines = [["nodes", "step, ms, no overlap to full", "efficiency", "checkpoint every", "time that counts", "goodput"]]
    for row in rows:
        step, efficiency, goodput = row["step_s"], row["efficiency"], row["goodput"]
        lines.append([
            str(row["nodes"]), f"{1000 * step['exposed']:.1f} to {1000 * step['hidden']:.1f}",
            f"{efficiency['exposed']:.1%} to {efficiency['hidden']:.1%}", f"{row['interval_s'] / 60:,.1f} min",
            f"{row['useful']:.2%}", f"{goodput['exposed']:.1%} to {goodput['hidden']:.1%}",
        ])  # fmt: skip
    return table(lines)


def main() -> None:
    """Measure, predict, compare, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    save_s, save = measured_here("checkpoint", "way", "muster", "stall_s", SAVE_S)
    restart_s, restart = measured_here("recovery", "runner", "muster, task, two nodes", "s", RESTART_S)
    for name, default, text in (
        ("bandwidth-gbit", 25.0, "of a node's link"), ("latency-us", 20.0, "of a message between nodes"),
        ("failures-per-1000-node-days", FAILURES, "that end an attempt"),
        ("save-s", save_s, "that a checkpoint holds the training up"),
        ("restart-s", restart_s, "from a failure to the next step"),
        ("interval", None, "seconds between checkpoints"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{text}; default {default or 'the best'}")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    found = {ranks: [compare(ranks, results) for results in rounds] for ranks, rounds in run(options.rounds).items()}
    rows = summarize(found)
    print(report(rows))
    link = Link(options.latency_us / 1e6, options.bandwidth_gbit * 1e9 / 8)
    one = max(found[1], key=lambda one: one["share"])["compute"]
    faults = Faults(options.failures_per_1000_node_days / 1000, options.save_s, options.restart_s, options.interval)
    buckets = scale_model.make_buckets(one, CAP)
    nodes = [scale_model.prospect(count, one, buckets, link, faults) for count in NODES]
    given = {key: value for key, value in vars(options).items() if key not in ("output", "rounds")}
    print(f"""
{sum(one.sizes) / 1e6:.0f} MB of gradients, {options.bandwidth_gbit:g} Gbit/s, {options.latency_us:g} us a message
{options.failures_per_1000_node_days:g} failures per 1,000 node-days, {options.save_s:g} s a save (default: {save}), \
{options.restart_s:g} s a restart (default: {restart})
{report_nodes(nodes)}""")
    measure.write_results(options.output, rows=rows, nodes=nodes, given=given)


if __name__ == "__main__":
    main()
