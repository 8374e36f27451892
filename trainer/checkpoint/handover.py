"""What survivors of a failure hand to the next attempt: the state after the last step, so that no more is lost.

Under DDP every rank holds the weights, the optimizer and the position after the last update. When a peer dies, a
survivor leaves them in the memory of its agent (`trainer.checkpoint.memory`). Buffers, such as batch statistics,
differ between ranks, and those of rank 0 count (`BufferNotes`). On GPUs a process runs ahead of its device and cannot
tell which updates its weights have seen: there only checkpoints count.
"""

import io
import itertools
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.files import dump
from trainer.checkpoint.memory import ANSWERED, ASK, BUSY, NOTE, NOTE_HEAD, NOTES, ROOM, SILENT, Memory, keeps_state
from trainer.config.job import Job
from trainer.parallel.base import Parallel
from trainer.parallel.module_state import is_dense, saved_buffers

UPDATE_S = 1.0
"""For an update that is going on when the rank is asked."""
Key = tuple[int, int]
"""(attempt, moment): twice the steps done, plus one when the evaluation or checkpoint due after them is done too."""


class BufferNotes:
    """The buffers of a model that a checkpoint holds, and where each stands in a note of rank 0.

    DDP shares them before a forward pass only. Should rank 0 die, no survivor has those of the last step, so it notes
    them in the memory of its agent in every step. A model without buffers takes no notes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.memory: Memory | None = None
        self.buffers = self._noted()
        ends = [0, *itertools.accumulate(-(-buffer.nbytes // 64) * 64 for buffer in self.buffers.values())]
        self.offsets, self.size = dict(zip(self.buffers, ends, strict=False)), ends[-1]
        self.fit = self.size <= ROOM

    def _noted(self) -> dict[str, Tensor]:
        """The buffers that the model has now, without sparse ones, which are constant."""
        return {name: buffer for name, buffer in saved_buffers(self.model).items() if is_dense(buffer)}

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
        """Whether the notes are of all buffers: user code may have put others in their place, or made more."""
        now = self._noted()
        return now.keys() == self.buffers.keys() and all(now[name] is buffer for name, buffer in self.buffers.items())

    def put(self, note: bytes, contents: dict[str, Any]) -> None:
        """Give all models in a checkpoint's `contents` the noted buffers: the average copies the model's."""
        room = torch.frombuffer(bytearray(note), dtype=torch.uint8)
        average = contents["objects"].get("average")
        for weights in (contents["model"], *([average["state"]["model"]] if average else [])):
            weights.update({name: self._find(room, name) for name in self.buffers})


class Handover:
    """One rank's side. Without an agent, or on GPUs, it does nothing."""

    def __init__(
        self, job: Job, parallel: Parallel, model: nn.Module, attempt: int, contents: Callable[[], dict[str, Any]]
    ) -> None:
        """`model`: the unwrapped one, on its device. `contents` makes what is handed over."""
        self.parallel, self.attempt, self.contents = parallel, attempt, contents
        self.notes = BufferNotes(model)
        self.possible = keeps_state(job) and not parallel.cuda and self.notes.fit
        self.memory = Memory.find() if self.possible else None
        self.lock = threading.Lock()
        """Held while weights, optimizer and position are not those of one moment."""
        self.moment = -1
        if self.memory is not None:
            self.memory.answer(parallel.local_rank, SILENT)

    def start(self, step: int, finished: bool) -> None:
        """Training begins after `step`; `finished`: nothing is due there."""
        self.moment = 2 * step + finished
        if self.memory is None:
            return
        if self.parallel.rank == 0:
            self.notes.start(self.memory, self.attempt, step)
        threading.Thread(target=self._listen, name="handover", daemon=True).start()

    def note_buffers(self) -> None:
        """The forward passes of a step are done; its gradients are not yet contributed, so no rank can be further."""
        self.notes.write(self.moment // 2 + 1)

    def begin_update(self) -> None:
        """An update begins."""
        self.lock.acquire()

    def end_update(self, step: int) -> None:
        """The update to `step` is done."""
        self.moment = 2 * step
        self.lock.release()

    def finish_step(self) -> None:
        """What was due after the step is done."""
        self.moment |= 1

    def hand_over(self) -> None:
        """Hand over, unless another rank of the node has, or the state is not whole."""
        memory, local_rank = self.memory, self.parallel.local_rank
        if memory is None or self.moment < 0:
            return
        memory.answer(local_rank, BUSY)
        held = self.lock.acquire(timeout=UPDATE_S)
        try:
            if held and self.notes.hold():
                memory.write_state((self.attempt, self.moment), lambda file: dump(self.contents(), file))
        finally:
            memory.answer(local_rank, ANSWERED)
            if held:
                self.lock.release()

    def _listen(self) -> None:
        while True:
            signal.sigwait({ASK})
            try:
                self.hand_over()
            except Exception as error:  # the checkpoints are left
                print(f"could not hand over: {error!r}", flush=True)

    def take_over(self, committed: int) -> dict[str, Any] | None:
        """The contents that were handed over, unless rank 0's checkpoint of the step `committed` is newer.

        All ranks get the same. None in the first attempt, and when the memory that is needed is gone.
        """
        if not self.possible or not self.parallel.restarts:
            return None
        own = self.memory.read_state() if self.memory else None
        notes = self.memory.read_notes() if self.memory and self.parallel.rank == 0 else {}
        reports = self.parallel.gather_objects((own[0] if own else None, set(notes), committed))
        if self.memory and self.parallel.local_rank == 0:  # all have read it; should it not load, it is not tried again
            self.memory.clear_state()
        _, noted, committed = reports[0]
        sources: dict[Key, int] = {
            key: rank for rank, (key, _, _) in enumerate(reports)
            if key is not None and (not self.notes.buffers or (key[0], key[1] // 2) in noted)
        }  # fmt: skip
        if not sources or max(sources)[1] // 2 < committed:
            return None
        key = max(sources)
        data = own[1] if own else b""
        if any(other != key for other, _, _ in reports):
            data = self.parallel.share(data, sources[key])
        contents: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if self.notes.buffers:
            self.notes.put(self.parallel.share(notes.get((key[0], key[1] // 2))), contents)
        return {**contents, "evaluated": bool(key[1] & 1)}
