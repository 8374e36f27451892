"""What is trained, in a loop of one's own. This one tells three kinds of flowers apart."""

import torch
from sklearn.datasets import load_iris
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import muster

flowers = load_iris()
measures, kinds = torch.tensor(flowers.data, dtype=torch.float32), torch.tensor(flowers.target)
held_out = torch.arange(len(kinds)) % 5 == 4
train_data = TensorDataset(measures[~held_out], kinds[~held_out])
test_data = TensorDataset(measures[held_out], kinds[held_out])

with muster.Session() as session:
    model = session.wrap(nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    session.track(model=model, optimizer=optimizer)
    for _ in session.epochs(10):
        for batch in session.batches(train_data, batch_size=8):
            loss = functional.cross_entropy(model(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            session.log(loss=loss)
        session.evaluate(test_data, lambda batch: {"accuracy": model(batch[0]).argmax(1) == batch[1]})
