"""DistributedDataParallel itself, two ranks on gloo: bandwidth, gradient buckets, compression, bytes on the wire.

Everything takes turns in the same two processes, so that a noisy machine slows all of it; ratios are taken within a
round. The bandwidth of an all-reduce is nccl-tests' busbw = S/t * 2(n-1)/n. Its limit is what the same two processes
reach when they exchange as many bytes over one plain TCP connection. Bytes on the wire are what the kernel says that
the connections of a rank received, without headers (TCP_INFO). The loopback is copies in memory by the cores that
also compute: a network, and what buckets and compression save on one, cannot be measured here.

    python bench/ddp.py [--rounds 10] [--output bench/results/ddp.json]
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import measure
import torch
import torch.distributed as dist
from measure import show, spread, table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer.config.job import Ddp
from trainer.parallel.ddp import add_comm_hook
from trainer.signals import set_parent_death_signal

RANKS, TIMEOUT_S, LIMIT_S = 2, 30, 300
"""Ranks; seconds until one that waits for the other gives up; seconds for everything."""
MIB = 2**20
MESSAGES = {1: 100, 25: 4, 100: 1}
"""MiB of an all-reduce: how many of them in a block."""
STEPS, SETTLE_STEPS, POWERSGD_STEPS = 2, 2, 12
"""In a block; before all blocks, so that DDP has ordered its buckets; the same for PowerSGD to have begun."""
BASE = "default: 1, then 25 MiB"
BUCKETS = {"1 MiB": 1, "5 MiB": 5, "25 MiB": 25, "100 MiB": 100, BASE: Ddp().bucket_mb}
HOOKS = ("bf16", "fp16", "powersgd")
WAYS: dict[str, dict[str, Any]] = {name: {"bucket_cap_mb": size} for name, size in BUCKETS.items()} | {
    hook: {"bucket_cap_mb": Ddp().bucket_mb, "compression": hook} for hook in HOOKS
}
Act = Callable[[], None]
Found = dict[str, list[tuple[float, float, float]]]
"""Of each act, round by round: seconds, CPU seconds, bytes received."""


def make_model() -> nn.Module:
    """Four layers of a transformer, 50 MB."""
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(512, 8, dropout=0.0, batch_first=True), 4)


def make_step(bucket_cap_mb: float | None, compression: str = "none") -> Act:
    """A step of training of a copy of the model, wrapped as the trainer does it."""
    options = {} if bucket_cap_mb is None else {"bucket_cap_mb": bucket_cap_mb}
    ddp = DistributedDataParallel(make_model(), gradient_as_bucket_view=True, **options)
    add_comm_hook(ddp, Ddp(compression=compression))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-4)
    inputs, targets = torch.randn(2, 2, 16, 512)

    def step() -> None:
        nn.functional.mse_loss(ddp(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(POWERSGD_STEPS if compression == "powersgd" else SETTLE_STEPS):
        step()
    return step


def expected_bytes(compression: str) -> int:
    """What a rank receives in a step: 2(n-1)/n of what the hook hands to all-reduce."""
    shapes = [parameter.shape for parameter in make_model().parameters()]
    if compression == "powersgd":  # a matrix of a times b becomes two, of rank r: (a + b) r
        sizes = [Ddp().powersgd_rank * sum(shape) if len(shape) > 1 else shape.numel() for shape in shapes]
    else:
        sizes = [shape.numel() for shape in shapes]
    return sum(sizes) * (2 if compression in ("bf16", "fp16") else 4) * 2 * (RANKS - 1) // RANKS


def connect(rank: int) -> socket.socket:
    """A plain TCP connection of the two ranks over the loopback."""
    if rank == 0:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(TIMEOUT_S)
            dist.broadcast_object_list([server.getsockname()[1]])
            peer, _ = server.accept()
    else:
        port: list[Any] = [None]
        dist.broadcast_object_list(port)
        peer = socket.create_connection(("127.0.0.1", port[0]), TIMEOUT_S)
    peer.setblocking(False)
    return peer


def exchange(peer: socket.socket, ours: Tensor, theirs: Tensor) -> None:
    """Send and receive a tensor's bytes, both at once, on one thread."""
    out, into = (memoryview(tensor.numpy()).cast("B") for tensor in (ours, theirs))
    while out or into:
        readable, writable, _ = select.select([peer] if into else [], [peer] if out else [], [], TIMEOUT_S)
        if not readable and not writable:
            raise TimeoutError("the other rank sends and receives nothing")
        if readable:
            count = peer.recv_into(into)
            if not count:
                raise ConnectionError("the other rank has gone")
            into = into[count:]
        if writable:
            out = out[peer.send(out) :]


def received_bytes() -> int:
    """What all TCP connections of this process have received: tcpi_bytes_received of the kernel's linux/tcp.h."""
    total = 0
    for path in Path("/proc/self/fd").iterdir():
        if not (path.is_symlink() and os.readlink(path).startswith("socket:")):
            continue
        with socket.socket(fileno=os.dup(int(path.name))) as own:
            if own.family in (socket.AF_INET, socket.AF_INET6) and own.type == socket.SOCK_STREAM:
                info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                total += int.from_bytes(info[128:136], sys.byteorder)
    return total


def take_turns(acts: dict[str, tuple[Act, int]], rounds: int) -> Found:
    """Blocks of each by turns, after a round that does not count: seconds, CPU seconds, bytes received, of one act."""
    found: Found = {name: [] for name in acts}
    for number in range(rounds + 1):
        turn = number % len(acts)
        names = list(acts)
        for name in names[turn:] + names[:turn]:
            act, count = acts[name]
            dist.barrier()
            received, used, began = received_bytes(), time.process_time(), time.perf_counter()
            for _ in range(count):
                act()
            wall, cpu = time.perf_counter() - began, time.process_time() - used
            if number:
                found[name].append((wall / count, cpu / count, (received_bytes() - received) / count))
        if dist.get_rank() == 0:
            print(f"\rround {number} of {rounds}", end="\n" * (number == rounds), file=sys.stderr, flush=True)
    return found


def work(rank: int, folder: str, rounds: int, parent: int) -> None:
    """One rank; the first writes what both found."""
    set_parent_death_signal(parent, signal.SIGKILL)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=TIMEOUT_S), world_size=RANKS, rank=rank)
    acts: dict[str, tuple[Act, int]] = {}
    peer = connect(rank)
    for size, count in MESSAGES.items():
        ours, theirs = torch.ones(2, size * MIB // 4)
        acts[f"tcp {size}"] = (lambda ours=ours, theirs=theirs: exchange(peer, ours, theirs)), count
        acts[f"gloo {size}"] = (lambda ours=ours: dist.all_reduce(ours) and None), count
    found = take_turns(acts, rounds)
    found |= take_turns({name: (make_step(**options), STEPS) for name, options in WAYS.items()}, rounds)
    both: list[Any] = [None] * RANKS
    dist.all_gather_object(both, found)
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(both))
    dist.barrier()
    os._exit(0)  # gloo's destructors may wait for each other


def measure_all(rounds: int) -> Found:
    """Of each act, round by round: seconds of the slower rank, CPU seconds of both, bytes that a rank received.

    Raises:
        SystemExit: a rank failed, or both took too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.multiprocessing.spawn(work, (folder, rounds, os.getpid()), RANKS, join=False, daemon=True)
        end = time.monotonic() + LIMIT_S
        try:
            while not ranks.join(max(0, end - time.monotonic()), grace_period=2):
                if time.monotonic() > end:
                    raise SystemExit(f"the ranks did not end within {LIMIT_S} s")
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
            raise SystemExit(f"a rank failed: {error}") from None
        finally:
            for process in ranks.processes:
                process.kill()
        first, second = json.loads((Path(folder) / "found.json").read_text())
    turns = {name: zip(first[name], second[name], strict=True) for name in first}
    return {
        name: [(max(a[0], b[0]), a[1] + b[1], (a[2] + b[2]) / RANKS) for a, b in pairs] for name, pairs in turns.items()
    }


def ratio(found: Found, name: str, base: str, column: int) -> dict[str, Any]:
    """Of seconds (0) or CPU seconds (1), round by round."""
    return spread([a[column] / b[column] for a, b in zip(found[name], found[base], strict=True)])


def summarize(found: Found) -> dict[str, list[dict[str, Any]]]:
    """The rows of the three tables."""
    bandwidth = []
    for size in MESSAGES:
        names = {"gloo": f"gloo {size}", "tcp": f"tcp {size}"}
        factor = size * MIB / 1e9 * 2 * (RANKS - 1) / RANKS
        row = {f"{key}_gb_per_s": spread([factor / s for s, _, _ in found[name]]) for key, name in names.items()}
        share = ratio(found, names["tcp"], names["gloo"], 0)
        cpu = ratio(found, names["gloo"], names["tcp"], 1)
        bandwidth.append({"mib": size, "rounds": len(found[names["tcp"]]), **row, "share": share, "cpu": cpu})
    steps = {
        name: {"rounds": len(found[name]), "s": spread([s for s, _, _ in found[name]]),
               "cpu_s": spread([cpu for _, cpu, _ in found[name]]),
               "wall": ratio(found, name, BASE, 0), "cpu": ratio(found, name, BASE, 1),
               "bytes": round(statistics.median(count for _, _, count in found[name]))}
        for name in WAYS
    }  # fmt: skip
    return {
        "bandwidth": bandwidth,
        "buckets": [{"buckets": name, **steps[name]} for name in BUCKETS],
        "compression": [
            {"compression": hook, **steps[name], "expected_bytes": expected_bytes(hook)}
            for hook, name in {"none": BASE, **dict(zip(HOOKS, HOOKS, strict=True))}.items()
        ],
    }


def report(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Three tables, as text."""
    bandwidth = [["all-reduce", "busbw, GB/s", "plain TCP, GB/s", "share of it", "CPU time / plain TCP"]]
    for row in rows["bandwidth"]:
        keys = ("gloo_gb_per_s", "tcp_gb_per_s", "share", "cpu")
        bandwidth.append([f"{row['mib']} MiB", *(show(row[key]) for key in keys)])
    buckets = [["gradient buckets", "step, s", "CPU time, s", "step / default", "CPU time / default"]]
    for row in rows["buckets"]:
        buckets.append([row["buckets"], *(show(row[key]) for key in ("s", "cpu_s", "wall", "cpu"))])
    hooks = [["compression", "step / none", "CPU time / none", "MB received by a rank in a step", "expected"]]
    for row in rows["compression"]:
        counts = (f"{row[key] / 1e6:.2f}" for key in ("bytes", "expected_bytes"))
        ratios = ("1", "1") if row["compression"] == "none" else (show(row["wall"]), show(row["cpu"]))
        hooks.append([row["compression"], *ratios, *counts])
    return "\n\n".join(map(table, (bandwidth, buckets, hooks)))


def main() -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--output", type=Path, default=measure.RESULTS / "ddp.json")
    options = parser.parse_args()
    rows = summarize(measure_all(options.rounds))
    print(report(rows))
    print(f"{RANKS} ranks, one thread each beside gloo's own, on {len(os.sched_getaffinity(0))} cores")
    measure.write_results(options.output, **rows)


if __name__ == "__main__":
    main()
