"""A script on a session whose model is in shards where the job says so."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import muster

torch.manual_seed(1)
DATA = TensorDataset(torch.randn(50, 8, dtype=torch.float64), torch.randint(2, (50,)))


def main(accumulate: int) -> None:
    with muster.Session() as session:
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2)).double()
        model = session.wrap(model, shard=[model[0], model[2]] if session.world_size > 1 else None)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        session.track(model=model, optimizer=optimizer)
        for batch, labels in session.batches(DATA, batch_size=12, epochs=2, accumulate=accumulate):
            loss = functional.cross_entropy(model(batch), labels)
            loss.backward()
            session.log(loss=loss)
            if session.updates:
                nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
                if session.step % 4 == 1:
                    session.evaluate(DATA, lambda batch: {"hit": model(batch[0]).argmax(1) == batch[1]}, batch_size=8)


if __name__ == "__main__":
    main(int(sys.argv[1]))
