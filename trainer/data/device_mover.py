"""Batches to the device: as they come on a CPU, ahead of use on a GPU."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trainer.data.nested import map_tensors


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
        return (map_tensors(batch, self._move_tensor) for batch in batches)

    def _move_tensor(self, tensor: Tensor) -> Tensor:
        wanted = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        tensor = tensor.to(self.device, wanted, non_blocking=True)
        if self.channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    def _move_ahead(self, batches: Iterator[Any], stream: torch.cuda.Stream) -> Iterator[Any]:
        waiting: deque[tuple[Any, torch.cuda.Event]] = deque()
        for batch in batches:
            with torch.cuda.stream(stream):
                waiting.append((map_tensors(batch, self._move_tensor), stream.record_event()))
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
