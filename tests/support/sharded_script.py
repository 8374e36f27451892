"""A script on a session whose model is in shards where the job says so."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import muster

torch.manual_seed(1)
DATA = TensorDataset(torch.randn(50, 8, dtype=torch.float64), torch.randint(2, (50,)))


class Net(nn.Module):
    """One that returns its loss with what it was made of, and has a weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
        self.there = self.back = nn.Parameter(torch.randn(16, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, batch: Tensor, labels: Tensor) -> dict[str, Any]:
        inner = self.body(batch)
        logits = self.head(torch.tanh(inner @ self.there) @ self.back.T)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits, "inner": [inner]}


def main(accumulate: int) -> None:
    with muster.Session() as session:
        net = Net().double()
        model = session.wrap(net, shard=[net.body[0], net.body[2]] if session.world_size > 1 else None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.track(model=model, optimizer=optimizer)
        for batch, labels in session.batches(DATA, batch_size=12, epochs=2, accumulate=accumulate):
            loss = model(batch, labels)["loss"]
            loss.backward()
            session.log(loss=loss)
            if session.updates:
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
                if session.step % 4 == 1:
                    hits = lambda batch: {"hit": model(*batch)["logits"].argmax(1) == batch[1]}  # noqa: E731
                    session.evaluate(DATA, hits, batch_size=8)


if __name__ == "__main__":
    main(int(sys.argv[1]))
