"""Saving beside the training: a copy is taken between two steps, and a thread commits it while training goes on."""

import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trainer.data.nested import map_tensors
from trainer.parallel.module_state import is_dense

NICE = 15
"""Beside a training that uses all cores, writing gets 3 % of one."""


class Writer:
    """Commits one state after another, in a thread of its own or, when not `asynchronous`, at once."""

    def __init__(self, asynchronous: bool) -> None:
        """Nothing to write yet. The copy stays allocated: memory for one more state, on the CPU."""
        self.asynchronous = asynchronous
        self.thread: threading.Thread | None = None
        self.problem: BaseException | None = None
        self.copies: dict[tuple[Any, ...], Tensor] = {}

    def submit(self, state: Any, commit: Callable[[Any], None], beat: Callable[[], None]) -> None:
        """Let `commit` write `state`; first wait for the one before, with signs of life by `beat`.

        Raises Exception: what went wrong with the one before, or, without a thread, with this one.
        """
        self.wait(beat)
        taken = self._copy(state)
        if not self.asynchronous:
            commit(taken)
            return
        self.thread = threading.Thread(target=self._run, args=(taken, commit), name="checkpoint")
        self.thread.start()

    def wait(self, beat: Callable[[], None]) -> None:
        """Return when everything is committed. Raises Exception: what went wrong."""
        while self.thread is not None and self.thread.is_alive():
            self.thread.join(1)
            beat()
        self.thread = None
        problem, self.problem = self.problem, None
        if problem is not None:
            raise problem

    def _run(self, state: Any, commit: Callable[[Any], None]) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)  # of this thread alone, on Linux
        try:
            commit(state)
        except BaseException as error:
            self.problem = error

    def _copy(self, state: Any) -> Any:
        """The state as it is now: tensors copied to memory that is used again at each save, the rest is small."""
        before, self.copies = self.copies, {}

        def copy(tensor: Tensor) -> Tensor:
            if not is_dense(tensor):  # a sparse one has no place in memory to be known by
                return tensor.detach().to("cpu", copy=True)
            # Tied weights are one tensor under two names: they are copied, and written, once.
            origin = tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()
            if origin not in self.copies:
                self.copies[origin] = self._copy_tensor(tensor.detach(), before.get(origin))
            return self.copies[origin]

        taken = map_tensors(state, copy)
        if any(tensor.is_pinned() for tensor in self.copies.values()):
            torch.cuda.synchronize()
        return taken

    def _copy_tensor(self, tensor: Tensor, kept: Tensor | None) -> Tensor:
        if not self.asynchronous:
            return tensor.cpu()  # itself on a CPU; else a file that any machine can load
        if kept is None:
            kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return kept.copy_(tensor, non_blocking=True)
