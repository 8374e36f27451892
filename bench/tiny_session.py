"""The training of `tiny.py` with a session: the same marks, and nothing that saves, because the session does."""

from __future__ import annotations

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import TensorDataset

import muster

parser = argparse.ArgumentParser()
parser.add_argument("--marks", required=True, help="the file that lines are appended to")
parser.add_argument("--steps", type=int, default=1)
parser.add_argument("--state", help="of no use here: the session keeps it")
parser.add_argument("--pause", type=float, default=0.0, help="seconds to sleep in each step")
SAMPLES = 3_200


def main(options: argparse.Namespace) -> None:
    """Train."""
    handle = os.open(options.marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def mark(what: str, step: int = 0) -> None:
        os.write(handle, f"{time.time():.4f} {os.getpid()} {os.environ['RANK']} {what} {step}\n".encode())

    mark("begin")
    with muster.Session() as session:
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == session.world_size
        mark("all-reduce")
        model = session.wrap(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        session.track(model=model, optimizer=optimizer)
        data = TensorDataset(torch.randn(SAMPLES, 64), torch.randint(10, (SAMPLES,)))
        for inputs, labels in session.batches(data, 16 * session.world_size, steps=options.steps):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)
            mark("step", session.step + 1)
            time.sleep(options.pause)


if __name__ == "__main__":
    main(parser.parse_args())
