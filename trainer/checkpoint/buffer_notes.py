"""Rank 0's buffers of the last few steps, in the memory of its agent: DDP shares them before a forward pass only.

A checkpoint holds rank 0's. Should rank 0 die, no survivor has those of the last step; so rank 0 notes them in every
step. A model without buffers takes no notes.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.memory import NOTE, NOTE_HEAD, NOTES, ROOM, Memory


class BufferNotes:
    """The buffers of a model, and where each stands in a note."""

    def __init__(self, model: nn.Module) -> None:
        """Of all buffers that a checkpoint holds."""
        self.model = model
        self.memory: Memory | None = None
        saved = model.state_dict(keep_vars=True)
        self.buffers = {name: b for name, b in model.named_buffers(remove_duplicate=False) if name in saved}
        ends = [0, *itertools.accumulate(-(-buffer.nbytes // 64) * 64 for buffer in self.buffers.values())]
        self.offsets, self.size = dict(zip(self.buffers, ends, strict=False)), ends[-1]
        self.fit = self.size <= ROOM

    def start(self, memory: Memory, attempt: int, step: int) -> None:
        """Rank 0 begins after `step`; no other rank takes notes."""
        if not self.buffers:
            return
        self.memory, self.attempt, self.notes = memory, attempt, []
        for index in range(NOTES):
            place = memory.note_offset(index)
            NOTE.pack_into(memory.notes, place, 0, -1, 0)
            room = torch.frombuffer(memory.notes, dtype=torch.uint8, count=ROOM, offset=place + NOTE_HEAD)
            self.notes.append([(self._find(room, name), buffer) for name, buffer in self.buffers.items()])
        self.write(step)

    def _find(self, room: Tensor, name: str) -> Tensor:
        """The buffer called `name` in the contents of a note."""
        buffer, offset = self.buffers[name], self.offsets[name]
        return room[offset : offset + buffer.nbytes].view(buffer.dtype).view(buffer.shape)

    def write(self, step: int) -> None:
        """Note the buffers as they are after the forward passes of `step`."""
        if self.memory is None:
            return
        place = self.memory.note_offset(step)
        NOTE.pack_into(self.memory.notes, place, 0, -1, 0)
        for noted, buffer in self.notes[step % NOTES]:
            noted.copy_(buffer)
        NOTE.pack_into(self.memory.notes, place, self.attempt, step, self.size)

    def hold(self) -> bool:
        """Whether the model still has the tensors that are noted: user code may have put others in their place."""
        now = dict(self.model.named_buffers(remove_duplicate=False))
        return all(now.get(name) is buffer for name, buffer in self.buffers.items())

    def put(self, note: bytes, contents: dict[str, Any]) -> None:
        """Give all models in a checkpoint's `contents` the noted buffers: the average copies the model's."""
        room = torch.frombuffer(bytearray(note), dtype=torch.uint8)
        average = contents["average"]
        for weights in (contents["model"], *([average["model"]] if average else [])):
            weights.update({name: self._find(room, name) for name in self.buffers})
