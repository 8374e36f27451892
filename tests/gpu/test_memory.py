"""Copies of a state that lies on a GPU: training does not wait for them, and goes on from them bit by bit."""

from __future__ import annotations

import time

import pytest
import torch

from trainer.checkpoint.copies import Copies, read_copy
from trainer.checkpoint.memory import MOMENTS, Memory


def test_a_copy_is_of_its_moment_though_nobody_waits_for_it() -> None:
    """The GPU is kept busy before and after; the seal comes when it has caught up."""
    told: list[str] = []
    device = torch.device("cuda")
    memory = Memory.make()
    copies = Copies(memory, 1, 0, [device], True, told.append)
    weight, factor = torch.zeros(1 << 26, device=device), torch.randn(4096, 4096, device=device)
    for step in range(1, 6):
        for _ in range(50):
            factor = factor @ factor / 64
        weight.fill_(step)
        copies.settle(True)
        began = time.perf_counter()
        index = copies.choose()
        assert index is not None and copies.fill(index, MOMENTS * step, lambda: {"weight": weight})
        called_s = time.perf_counter() - began
        copies.settle(False)
        weight.fill_(-1)
        if step > 2:  # the memory is there, and page-locked
            assert called_s < 0.02 and copies.filling is not None and memory.step < step
    copies.settle(True)
    assert memory.step == 5 and not told and all(buffer.registered for buffer in copies.buffers)
    for index, seal in memory.sealed().items():
        assert torch.equal(read_copy(memory, index, seal)["weight"], torch.full((1 << 26,), float(seal.step)))
    copies.close()
    torch.cuda.synchronize()


def test_memory_that_cannot_be_page_locked_is_used_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, told = Memory.make(), []  # type: ignore[var-annotated]
    copies = Copies(memory, 1, 0, [torch.device("cuda")], True, told.append)
    refuse = torch.cuda.cudart().cudaHostRegister
    monkeypatch.setattr(torch.cuda.cudart(), "cudaHostRegister", lambda *_: refuse(8, 4096, 0))
    assert copies.fill(copies.choose() or 0, MOMENTS, lambda: {"weight": torch.ones(1000, device="cuda")})
    copies.settle(True)
    assert not any(buffer.registered for buffer in copies.buffers)
    assert float((torch.ones(3, device="cuda") * 2).sum()) == 6.0, "the next kernel runs"
    assert torch.equal(read_copy(memory, 0, memory.sealed()[0])["weight"], torch.ones(1000))
