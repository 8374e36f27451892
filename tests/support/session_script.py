"""A script with a session whose weights and order say whether everything was exact, whatever happens to its ranks.

`session_script.py KIND ACCUMULATE STEPS...`: KIND is map, stream or stateful; the last rank kills itself before the
session sees that it is done with each of STEPS, once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import IterableDataset, TensorDataset

import muster

chance = torch.Generator().manual_seed(1)
FEATURES = torch.randn(83, 8, generator=chance, dtype=torch.float64)
LABELS = (FEATURES.sum(1) > 0).long()


class Stream(IterableDataset[Any]):
    """The samples one after the other."""

    first = 0

    def __iter__(self) -> Iterator[Any]:
        while self.first < len(FEATURES):
            self.first += 1
            yield FEATURES[self.first - 1], LABELS[self.first - 1]
        self.first = 0


class Stateful(Stream):
    """It can be asked where it is."""

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first = state["first"]


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note which files of checkpoints this process opens."""
    if event == "open" and "/checkpoints/step-" in str(arguments[0]):
        with open("opened.txt", "a") as file:
            file.write(f"{arguments[0]}\n")


def main(kind: str, accumulate: int, kills: list[int]) -> None:
    data = {"map": TensorDataset(FEATURES, LABELS), "stream": Stream(), "stateful": Stateful()}[kind]
    with muster.Session() as session:
        model = session.wrap(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).double())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        session.track(model=model, optimizer=optimizer)
        for _ in session.epochs(2):
            batches = session.batches(data, batch_size=4, accumulate=accumulate, shuffle=False)
            for features, labels in batches:
                functional.cross_entropy(model(features), labels).backward()
                if session.updates:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    optimizer.step()
                    optimizer.zero_grad()
                killed = session.run / f"killed-{session.step}"
                if session.step in kills and session.rank == session.world_size - 1 and not killed.exists():
                    killed.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            def measure(batch: Any) -> dict[str, Any]:
                outputs = model(batch[0])
                losses = functional.cross_entropy(outputs, batch[1], reduction="none")
                return {"accuracy": outputs.argmax(1) == batch[1], "loss": losses}

            found = session.evaluate(TensorDataset(FEATURES, LABELS), measure, batch_size=10)
        if session.is_primary:
            weights = nn.utils.parameters_to_vector(model.parameters()).tolist()
            (session.run / "found.json").write_text(json.dumps({"weights": weights, "evaluation": found}))


if __name__ == "__main__":
    sys.addaudithook(watch)
    main(sys.argv[1], int(sys.argv[2]), [int(step) for step in sys.argv[3:]])
