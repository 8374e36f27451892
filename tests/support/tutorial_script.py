"""A training as tutorials of DDP build it, a class with a method for a batch and one for an epoch, on a session."""

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

import muster


class Noise(Dataset[tuple[Tensor, Tensor]]):
    """Random vectors of twenty numbers, each with a target."""

    def __init__(self, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.inputs, self.targets = (torch.rand(size, width, generator=generator) for width in (20, 1))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


class Trainer:
    """Owns the model, the optimizer and the data."""

    def __init__(self, session: muster.Session, data: Dataset[tuple[Tensor, Tensor]], batch_size: int) -> None:
        self.session, self.data, self.batch_size = session, data, batch_size
        self.model = session.wrap(nn.Linear(20, 1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        session.track(model=self.model, optimizer=self.optimizer)

    def run_batch(self, inputs: Tensor, targets: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = functional.mse_loss(self.model(inputs), targets)
        loss.backward()
        self.optimizer.step()
        self.session.log(loss=loss)

    def run_epoch(self, epoch: int) -> None:
        for inputs, targets in self.session.batches(self.data, self.batch_size):
            self.run_batch(inputs, targets)
        print(f"[rank {self.session.rank}] epoch {epoch} is over, after step {self.session.step}", flush=True)

    def train(self, epochs: int) -> None:
        for epoch in self.session.epochs(epochs):
            self.run_epoch(epoch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=2048)
    options = parser.parse_args()
    with muster.Session() as session:
        Trainer(session, Noise(options.samples), options.batch_size).train(options.epochs)


if __name__ == "__main__":
    main()
