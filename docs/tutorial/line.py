"""Fit a line with DDP, as a script that torchrun starts: it saves and resumes by itself."""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=100)
parser.add_argument("--save", type=Path, required=True)
options = parser.parse_args()

dist.init_process_group("gloo")
print(f"rank {dist.get_rank()} of {dist.get_world_size()} is ready", flush=True)
torch.manual_seed(dist.get_rank())
model = torch.nn.Linear(1, 1)
step = 0
if options.save.exists():
    saved = torch.load(options.save)
    step = saved["step"]
    model.load_state_dict(saved["model"])
ddp = DistributedDataParallel(model)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)

while step < options.steps:
    x = torch.rand(32, 1)
    loss = (ddp(x) - (3 * x + 1)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    step += 1
    if step % 20 == 0 and dist.get_rank() == 0:
        torch.save({"step": step, "model": model.state_dict()}, options.save.with_suffix(".new"))
        options.save.with_suffix(".new").replace(options.save)
        print(f"step {step}  loss {loss:.4f}", flush=True)
dist.destroy_process_group()
