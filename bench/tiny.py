"""The training that the benches start: small, plain DDP on gloo, as it would be written for torchrun.

Every rank appends a line per thing done to a file: seconds since 1970, process id, rank, what, step. With `--state`
it saves, and after a restart goes on from what was saved.
"""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--marks", required=True, help="the file that lines are appended to")
parser.add_argument("--steps", type=int, default=1)
parser.add_argument("--state", help="a file to save in after every 10 steps")
parser.add_argument("--pause", type=float, default=0.0, help="seconds to sleep in each step")


def main(options: argparse.Namespace) -> None:
    """Train."""
    handle = os.open(options.marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def mark(what: str, step: int = 0) -> None:
        os.write(handle, f"{time.time():.4f} {os.getpid()} {os.environ['RANK']} {what} {step}\n".encode())

    mark("begin")
    ours = not dist.is_initialized()  # torchrunx has made its own, and wants its process back
    if ours:
        dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()
    mark("all-reduce")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0
    if options.state and os.path.exists(options.state):
        saved = torch.load(options.state)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    for step in range(first + 1, options.steps + 1):
        inputs, labels = torch.randn(16, 64), torch.randint(10, (16,))
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        mark("step", step)
        time.sleep(options.pause)
        if options.state and step % 10 == 0 and dist.get_rank() == 0:
            pending = options.state + ".pending"
            torch.save({"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, pending)
            os.replace(pending, options.state)
    dist.barrier()
    if ours:
        os._exit(0)  # of ends with threads of gloo left, some abort (torch 2.13), which torchrun takes for a failure


if __name__ == "__main__":
    main(parser.parse_args())
