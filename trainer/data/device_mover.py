"""Batches to the device: as they come on a CPU, ahead of use on a GPU."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.data.nested import CLOSED, INSIDE, map_tensors, walk


def move_batch(
    batch: Any, device: torch.device, dtype: torch.dtype | None = None, channels_last: bool = False
) -> Any:  # fmt: skip
    """A batch on a device; objects that can move themselves do. `dtype`: of floating tensors, None for theirs."""

    def move(part: Any) -> Any:
        if isinstance(part, Tensor):
            wanted = dtype if dtype is not None and part.is_floating_point() else part.dtype
            tensor = part.to(device, wanted, non_blocking=True)
            return tensor.contiguous(memory_format=torch.channels_last) if channels_last and part.dim() == 4 else tensor
        closed = isinstance(part, (Mapping, tuple, list, *CLOSED)) or dataclasses.is_dataclass(part)
        if closed or device.type == "cpu" or not callable(getattr(part, "to", None)) or hasattr(part, "apply"):
            return INSIDE
        return part.to(device)

    return walk(batch, move)


class DeviceMover:
    """Moves batches to the device; to a GPU ahead of use, on a stream of its own, so that copies overlap."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None, channels_last: bool, ahead: int) -> None:
        """`dtype`: of floating tensors, None to keep theirs; `ahead`: batches in flight to a GPU."""
        self.device, self.dtype, self.channels_last, self.ahead = device, dtype, channels_last, ahead
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def move(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Each batch on the device."""
        if self.stream is not None:
            return self._move_ahead(batches, self.stream)
        if self.dtype is None and not self.channels_last:
            return batches
        return (self._move_batch(batch) for batch in batches)

    def _move_batch(self, batch: Any) -> Any:
        return move_batch(batch, self.device, self.dtype, self.channels_last)

    def _move_ahead(self, batches: Iterator[Any], stream: torch.cuda.Stream) -> Iterator[Any]:
        waiting: deque[tuple[Any, torch.cuda.Event]] = deque()
        for batch in batches:
            with torch.cuda.stream(stream):
                waiting.append((self._move_batch(batch), stream.record_event()))
            if len(waiting) > self.ahead:
                yield self._take(waiting)
        while waiting:
            yield self._take(waiting)

    def _take(self, waiting: deque[tuple[Any, torch.cuda.Event]]) -> Any:
        batch, event = waiting.popleft()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)

        def mark(tensor: Tensor) -> Tensor:
            tensor.record_stream(current)  # or the allocator gives the memory to another batch too early
            return tensor

        return map_tensors(batch, mark)
