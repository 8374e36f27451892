"""Which layers are gathered, compiled or computed again one at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config.job import Job
from trainer.errors import JobError
from trainer.parallel.units import find_units, recompute_in_backward, replace_forward


class Net(nn.Module):
    """Blocks in a list inside of a part, and a head that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        blocks = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.body = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.heads = nn.ModuleList([nn.Linear(4, 7, bias=False)])
        self.heads[0].weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        found: Tensor = self.embedding(words)
        for block in self.body["blocks"]:  # type: ignore[union-attr]
            found = block(found)
        last: Tensor = self.heads[0](found)
        return last


def test_large_layers_in_containers_are_found() -> None:
    """A container in a container is looked into; a layer with a weight of another part is none."""
    assert list(find_units(Net(), None, 20)) == ["body.blocks.1.0", "body.blocks.0.0"]
    assert list(find_units(Net(), None, 21)) == []
    assert list(find_units(nn.Sequential(nn.Flatten(), nn.Linear(3, 3)), None, 1)) == ["1"]


def test_they_may_be_named() -> None:
    net = Net()
    named = [net.get_submodule(name) for name in ("body.blocks.0", "body.blocks.0.0")]
    assert list(find_units(net, named, 1)) == ["body.blocks.0.0", "body.blocks.0"]
    for names, problem in (((), "not a part of the model"), (("heads.0",), "shares weights"), (("",), "not a part")):
        with pytest.raises(JobError, match=problem) as caught:
            find_units(net, [net.get_submodule(name) for name in names] or [nn.Linear(1, 1)], 1)
        assert caught.value.key == "task.shard_modules"


def test_layers_are_computed_again_for_gradients() -> None:
    """The same gradients, without the activations in between; copies compute with their own weights."""
    calls: list[Any] = []
    plain, net = Net(), Net()
    net.load_state_dict(plain.state_dict())
    words = torch.arange(6).view(2, 3)
    plain(words).square().sum().backward()
    for part in net.modules():
        if isinstance(part, nn.Tanh):
            part.register_forward_pre_hook(lambda *_: calls.append(1))
    recompute_in_backward(find_units(net, list(net.body["blocks"]), 1), Job(task="a:B"))
    net(words).square().sum().backward()
    assert len(calls) == 4
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), net.parameters(), strict=True))  # type: ignore[arg-type]
    assert list(net.state_dict()) == list(plain.state_dict())
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.body["blocks"][0][0].weight.zero_()  # type: ignore[index, union-attr]
    assert not torch.equal(other(words), net(words))
    with pytest.raises(JobError, match="finds no layer"):
        recompute_in_backward({}, Job(task="a:B"))


def test_layers_of_a_class_are_of_one_class_when_they_are_changed() -> None:
    """What torch compiles for one of many equal layers serves the others: for each class it would compile again."""
    calls: list[Any] = []

    def count(forward: Any) -> Any:
        return lambda *given: calls.append(1) or forward(*given)

    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12)), nn.Tanh())
    inputs = torch.randn(2, 3)
    expected = net(inputs)
    for layer in net:
        replace_forward(layer, count)
    assert len({type(layer) for layer in net}) == 2
    assert torch.equal(net(inputs), expected) and len(calls) == 13
