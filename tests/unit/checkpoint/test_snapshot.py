"""A state in memory that processes share is the state that was put there, whatever it is made of."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from trainer.checkpoint.memory import Seal
from trainer.checkpoint.snapshot import Buffer, Layout, interpret, put_together, read_raw, take_apart


@dataclass
class Shared:
    """A buffer, from both sides."""

    handle: int
    buffer: Buffer
    layout: Layout

    def put(self, contents: Any) -> Seal:
        """As a rank does it."""
        tree, tensors = take_apart(contents)
        if not self.layout.fits(tensors):
            self.layout = Layout(tensors)
        head = self.buffer.write(self.handle, self.layout, tensors, tree)
        return Seal(2, 0, self.layout.size, len(head), 0)

    def get(self, seal: Seal) -> Any:
        """As the writer does it."""
        return put_together(*interpret(*read_raw(self.handle, seal)))


@pytest.fixture
def shared() -> Iterator[Shared]:
    handle = os.memfd_create("test")
    yield Shared(handle, Buffer(pinned=False), Layout([]))
    os.close(handle)


def saved(value: Any) -> bytes:
    """What torch.save makes of it."""
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def trained() -> dict[str, Any]:
    """A model with batch statistics and its optimizer."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "list": [1, (torch.ones(2), "x")]}


def test_a_file_of_it_is_the_file_of_the_state(shared: Shared) -> None:
    state = trained()
    assert saved(shared.get(shared.put(state))) == saved(state)


def test_the_last_one_counts_also_when_its_tensors_are_others(shared: Shared) -> None:
    state = trained()
    views = []
    for _ in range(2):
        for tensor in state["model"].values():
            tensor.add_(1)
        assert torch.equal(shared.get(shared.put(state))["model"]["0.weight"], state["model"]["0.weight"])
        views.append(shared.buffer.views)
    assert views[0] is views[1], "found once for all"
    for size in (3, 5, 100_000, 2):
        state["memory"] = torch.full((size,), float(size))
        assert saved(shared.get(shared.put(state))) == saved(state)


def test_tied_tensors_stay_one(shared: Shared) -> None:
    weight = torch.randn(4, 4)
    found = shared.get(shared.put({"one": weight, "two": weight}))
    assert found["one"] is found["two"] and shared.layout.size == weight.nbytes


KINDS = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.bool, torch.uint8, torch.int64,
    torch.float8_e4m3fn, torch.uint16,
]  # fmt: skip


def test_tensors_of_every_type_and_shape(shared: Shared) -> None:
    image = torch.randn(2, 3, 4, 5)
    state = {
        "types": [torch.ones(5).to(kind) for kind in KINDS], "scalar": torch.tensor(7), "empty": torch.empty(0, 3),
        "channels last": image.contiguous(memory_format=torch.channels_last), "transposed": torch.randn(3, 2).t(),
        "every other": image[:, ::2], "expanded": torch.ones(1).expand(1000), "conjugate": torch.randn(2) * 1j,
        "needs a gradient": nn.Parameter(torch.ones(2)),
    }  # fmt: skip
    found = shared.get(shared.put(state))
    for name, value in state.items():
        for one, other in zip(*([each] if isinstance(each, torch.Tensor) else each for each in (value, found[name])),
                              strict=True):  # fmt: skip
            assert one.dtype is other.dtype and torch.equal(one.detach().cfloat(), other.cfloat()), name
    assert found["channels last"].is_contiguous(memory_format=torch.channels_last)
    assert found["transposed"].stride() == (1, 2)


def test_sparse_tensors(shared: Shared) -> None:
    found = shared.get(shared.put({"grid": torch.eye(3).to_sparse(), "rows": torch.eye(3).to_sparse_csr()}))
    assert torch.equal(found["grid"].to_dense(), torch.eye(3)) and found["grid"].layout is torch.sparse_coo
    assert torch.equal(found["rows"].to_dense(), torch.eye(3)) and found["rows"].layout is torch.sparse_csr


class Bomb:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.abort, ()


def test_no_code_runs_when_it_is_read(shared: Shared) -> None:
    seal = shared.put({"bomb": Bomb()})
    with pytest.raises(Exception, match="Weights only load failed"):
        shared.get(seal)
