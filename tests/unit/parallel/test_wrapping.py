"""What a script's module returns is weighed, where it is in shards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.job import Job
from trainer.parallel.wrapping import Gradients, shard_module


class Net(nn.Module):
    """Returns a loss, twice, with what it was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, batch: Tensor) -> dict[str, Any]:
        inner = self.body(batch)
        logits = self.head(inner)
        loss = logits.square().mean()
        return {"loss": loss, "again": loss, "logits": logits, "inner": [inner]}


def test_a_loss_counts_once_beside_what_it_was_made_of() -> None:
    """Whatever else is returned. The caller may change it in place, as it may what any module returns."""
    gradients, net, batch = Gradients(), Net(), torch.randn(4, 3)
    net(batch)["loss"].backward()
    expected = [weight.grad.clone() / 4 for weight in net.parameters()]  # type: ignore[union-attr]
    sharder: Any = SimpleNamespace(shard_module=lambda *_: None, job=Job(task="a:B"))
    model = shard_module(net, sharder, [], gradients)
    gradients.set(0.25, last=True)
    for change in (False, True):
        net.zero_grad()
        found = model(batch)
        if change:
            found["loss"] *= 1
        found["loss"].backward()
        assert all(torch.equal(weight.grad, each) for weight, each in zip(net.parameters(), expected, strict=True))  # type: ignore[arg-type]
    net.zero_grad()
    found = model(batch)
    (found["loss"] + found["again"]).backward()
    assert all(torch.equal(weight.grad, 2 * each) for weight, each in zip(net.parameters(), expected, strict=True))  # type: ignore[arg-type]
    with torch.no_grad():
        assert not model(batch)["loss"].requires_grad
