"""The same training as one writes it by hand for `srun python`, as far as its first step; prints when that was done."""

import os
import sys
import time

os.environ |= {
    "MASTER_ADDR": sys.argv[1],
    "MASTER_PORT": "29500",
    "RANK": os.environ["SLURM_PROCID"],
    "WORLD_SIZE": os.environ["SLURM_NTASKS"],
    "OMP_NUM_THREADS": "1",
}

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from trainer.tasks.digits import Digits

dist.init_process_group("gloo")
torch.manual_seed(0)
task = Digits()
model = DistributedDataParallel(task.model())
optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.01)
dataset = task.train_dataset()
images, labels = next(iter(DataLoader(dataset, batch_size=16, sampler=DistributedSampler(dataset))))
functional.cross_entropy(model(images), labels).backward()
optimizer.step()
if dist.get_rank() == 0:
    print(f"first step: {time.time()}", flush=True)
dist.barrier()
os._exit(0)  # an end with threads of gloo left was seen to abort
