"""What survivors of a failure hand to the next attempt: the state after the last step, so that no more is lost.

Under DDP every rank holds the weights, the optimizer and the position after the last update. When a peer dies, a
survivor leaves them in its agent's memory (`memory`). What differs from rank to rank - generators, and the
buffers, of which rank 0's count - each rank notes there in every step, before it contributes its gradients: so the
notes of a dead rank reach as far as any survivor got. On GPUs a process runs ahead of its device and could not tell
which updates its weights have seen; there, checkpoints alone count.
"""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.checkpoint.files import Hashing, dump
from trainer.checkpoint.memory import ANSWERED, ASK, BUSY, NOTE, NOTE_HEAD, NOTES, ROOM, STATE, Memory, keeps_state
from trainer.config.job import Job
from trainer.data import rng
from trainer.parallel.modes import Parallel

UPDATE_S = 1.0
"""For an update that is going on when the rank is asked."""
Key = tuple[int, int]
"""(attempt, moment): twice the steps done, plus one when the evaluation or checkpoint due after them is done too."""


@dataclass(frozen=True)
class Kept:
    """What a rank goes on from."""

    contents: dict[str, Any]
    generators: Tensor
    """This rank's."""
    evaluated: bool


class Handover:
    """One rank's side. Without an agent, or on GPUs, it does nothing."""

    def __init__(self, job: Job, parallel: Parallel, model: nn.Module, attempt: int) -> None:
        """`model`: the unwrapped one, on its device."""
        self.parallel, self.model, self.attempt = parallel, model, attempt
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        state = model.state_dict(keep_vars=True)
        self.buffers = {name: value for name, value in state.items() if name not in parameters}
        self.offsets: dict[str, int] = {}
        self.size = self.generators = rng.get_state(parallel.devices).numel()
        for name, buffer in self.buffers.items():
            self.offsets[name] = -(-self.size // 64) * 64
            self.size = self.offsets[name] + buffer.nbytes
        self.possible = keeps_state(job) and not parallel.cuda and self.size <= ROOM
        self.memory = Memory.find() if self.possible else None
        self.lock = threading.Lock()
        self.moment = 0
        self.whole = False
        """Whether weights, optimizer and position are those of one moment."""
        self.exact = True
        """Whether the notes have held so far."""

    def start(self, step: int, finished: bool, contents: Callable[[], dict[str, Any]]) -> None:
        """Training begins after `step`; `finished`: with nothing due any more. `contents` would be handed over."""
        self.moment, self.contents = 2 * step + finished, contents
        if self.memory is None:
            return
        memory, rank = self.memory, self.parallel.local_rank
        self.places = [memory.note_offset(rank, index) for index in range(NOTES)]
        self.views = [self._views(place) for place in self.places]
        self.watch = rng.Watch()
        generators = rng.get_state(self.parallel.devices).numpy().tobytes()
        for place in self.places:
            NOTE.pack_into(memory.notes, place, 0, -1, 0)
            memory.notes[place + NOTE_HEAD : place + NOTE_HEAD + len(generators)] = generators
        self.held = [b""] * NOTES
        self._write(self.moment)
        self.whole = True
        threading.Thread(target=self._listen, name="handover", daemon=True).start()

    def _views(self, place: int) -> list[Tensor]:
        """The buffers in a note of rank 0."""
        assert self.memory is not None
        if self.parallel.rank:
            return []
        room = torch.frombuffer(self.memory.notes, dtype=torch.uint8, count=self.size, offset=place + NOTE_HEAD)
        return [self._cut(room, name) for name in self.buffers]

    def _cut(self, room: Tensor, name: str) -> Tensor:
        """The buffer called `name` in a note."""
        buffer, offset = self.buffers[name], self.offsets[name]
        return room[offset : offset + buffer.nbytes].view(buffer.dtype).view(buffer.shape)

    def note(self) -> None:
        """The forward passes of a step are done; its gradients are not yet contributed."""
        if self.memory is not None:
            self._write((self.moment | 1) + 1)

    def _write(self, moment: int) -> None:
        assert self.memory is not None
        index = moment % NOTES
        notes, place, views = self.memory.notes, self.places[index], self.views[index]
        self.noted = generators = self._generators()
        if self.held[index] != generators or views:
            NOTE.pack_into(notes, place, 0, -1, 0)
            # Mostly torch's part alone, which is the last.
            end = place + NOTE_HEAD + self.generators
            notes[end - len(generators) : end] = self.held[index] = generators
            if views:
                torch._foreach_copy_(views, list(self.buffers.values()))
        NOTE.pack_into(notes, place, self.attempt, moment, self.size)

    def _generators(self) -> bytes:
        """The end of their state: what may have moved since the training began."""
        if self.watch.moved():
            return rng.get_state(self.parallel.devices).numpy().tobytes()
        # Python's and NumPy's, which take ten times as long to read, are as they were.
        if self.watch.torch_moved():
            self.drawn = torch.default_generator.get_state().numpy().tobytes()
        return self.drawn

    def open(self) -> None:
        """An update begins."""
        if self.memory is not None:
            self.lock.acquire()
            self.whole = False

    def close(self, step: int) -> None:
        """The update to `step` is done."""
        if self.memory is None:
            return
        self.moment = 2 * step
        # What was noted must be true still: nothing may draw random numbers in a backward pass or an update.
        self.exact = self.exact and self._generators() == self.noted
        self.whole = True
        self.lock.release()

    def finish(self) -> None:
        """What was due after the step is done."""
        self.moment |= 1
        if self.memory is not None:
            self._write(self.moment)

    def leave(self) -> None:
        """Hand over, unless another rank of the node has, or the state is not whole."""
        memory, local_rank = self.memory, self.parallel.local_rank
        if memory is None:
            return
        memory.answer(local_rank, BUSY)
        held = self.lock.acquire(timeout=UPDATE_S)
        try:
            state = self.model.state_dict(keep_vars=True)
            same = all(state[name] is buffer for name, buffer in self.buffers.items())
            if held and self.whole and self.exact and same:
                self._dump(memory, (self.attempt, self.moment))
        finally:
            memory.answer(local_rank, ANSWERED)
            if held:
                self.lock.release()

    def _dump(self, memory: Memory, key: Key) -> None:
        with memory.newer(key) as file:
            if file is not None:
                file.seek(STATE.size)
                hashing = Hashing(file)
                dump(self.contents(), hashing)
                memory.seal(file, key, hashing.bytes, hashing.digest.digest())

    def _listen(self) -> None:
        while True:
            signal.sigwait({ASK})
            try:
                self.leave()
            except Exception as error:  # the checkpoints are left
                print(f"could not hand over: {error!r}", flush=True)

    def recall(self, committed: int) -> Kept | None:
        """What was handed over, unless rank 0's checkpoint of the step `committed` is newer; the same on all ranks.

        None, too, in the first attempt, and when a node's memory is gone.
        """
        if not self.possible or not self.parallel.restarts:
            return None
        own = self.memory.read_state() if self.memory else None
        notes = self.memory.read_notes(self.parallel.local_rank) if self.memory else {}
        told = self.parallel.gather_objects((own[0] if own else None, set(notes), committed))
        if self.memory and self.parallel.local_rank == 0:  # all have read it; should it not load, it is not tried again
            self.memory.clear_state()
        noted = set.intersection(*(keys for _, keys, _ in told))
        # Weights are the same before and after an evaluation; before it, it is done again.
        handed = {key: rank for rank, (key, _, _) in enumerate(told) if key is not None}
        usable = {
            (key[0], moment): rank for key, rank in handed.items() for moment in (key[1], key[1] & ~1)
            if (key[0], moment) in noted
        }  # fmt: skip
        if not usable or max(usable)[1] // 2 < told[0][2]:
            return None
        key = max(usable)
        source = usable[key]
        data = own[1] if own else b""
        if any(other != told[source][0] for other, _, _ in told):
            data = self.parallel.share(data, source)
        contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        self._put_buffers(contents, self.parallel.share(notes[key]) if self.buffers else b"")
        generators = torch.frombuffer(bytearray(notes[key][: self.generators]), dtype=torch.uint8)
        return Kept(contents, generators, evaluated=bool(key[1] & 1))

    def _put_buffers(self, contents: dict[str, Any], note: bytes) -> None:
        """Give all models in `contents` rank 0's buffers: the average copies the model's at each update."""
        room = torch.frombuffer(bytearray(note), dtype=torch.uint8) if note else torch.empty(0)
        average = contents["average"]
        for name in self.buffers:
            for weights in (contents["model"], *([average["model"]] if average else [])):
                weights[name] = self._cut(room, name)
