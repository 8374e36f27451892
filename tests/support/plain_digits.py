"""Classify handwritten digits, in a loop of one's own."""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils import data

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=12)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--checkpoint", default="checkpoint.pt")
options = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
held_out = torch.arange(len(labels)) % 5 == 4
train_data = data.TensorDataset(images[~held_out], labels[~held_out])
test_data = data.TensorDataset(images[held_out], labels[held_out])


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1024, 10),
    )  # fmt: skip


def evaluate(model: nn.Module) -> float:
    model.eval()
    correct = torch.zeros((), device=device)
    with torch.no_grad():
        for batch in data.DataLoader(test_data, 256):
            correct += (model(batch[0].to(device)).argmax(1) == batch[1].to(device)).sum()
    model.train()
    return float(correct) / len(test_data)


def train() -> None:
    torch.manual_seed(0)
    net = build().to(device)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
    begin = 0
    if os.path.exists(options.checkpoint):
        saved = torch.load(options.checkpoint, map_location=device)
        begin = saved["epoch"]
        net.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    sampler = data.DistributedSampler(train_data)
    loader = data.DataLoader(train_data, options.batch_size // dist.get_world_size(), sampler=sampler)
    for epoch in range(begin, options.epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            batch = [part.to(device) for part in batch]
            loss = functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        schedule.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: loss {loss:.4f}, accuracy {evaluate(net):.4f}", flush=True)
            state = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
            torch.save({**state, "epoch": epoch + 1}, options.checkpoint)


cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
dist.init_process_group("nccl" if cuda else "gloo")
try:
    train()
finally:
    dist.destroy_process_group()
