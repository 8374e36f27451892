"""The digits, slowly enough that a fault hits the middle of a training, and with faults of their own."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.tasks.digits import Digits


class SlowDigits(Digits):
    """Takes `step_s` a step while there is no file `until`. At step `at` of the first attempt, `rank` does `what`:
    raise, kill or stop; `once` is the file that remembers it.
    """

    def __init__(
        self, step_s: float = 0.3, until: str = "", what: str = "", rank: int = 1, at: int = 25, once: str = ""
    ) -> None:
        super().__init__(8)
        self.step_s, self.until = step_s, Path(until or "/nowhere")
        self.what, self.rank, self.at, self.once = what, rank, at, Path(once)
        self.steps = 0
        print(f"GPUs of this rank: {os.environ.get('CUDA_VISIBLE_DEVICES')}")

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        losses = super().loss(output, batch)
        if losses.requires_grad:
            self.steps += 1
            if self.step_s and not self.until.exists():
                time.sleep(self.step_s)
            if self.what and self.steps == self.at and int(os.environ["RANK"]) == self.rank:
                self.fail()
        return losses

    def fail(self) -> None:
        try:
            self.once.touch(exist_ok=False)
        except FileExistsError:
            return
        if self.what == "raise":
            raise ValueError("bad luck")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[self.what])
