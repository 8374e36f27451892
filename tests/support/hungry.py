"""The digits, with one rank that takes memory until the kernel ends it."""

import os

from torch import Tensor

from trainer.tasks.digits import Digits

PIECE = 32 * 2**20


class Hungry(Digits):
    """Takes memory from the first step on."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank

    def loss(self, output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The digits' loss, never reached on that rank."""
        taken = []
        while os.environ.get("RANK") == str(self.rank):
            taken.append(bytearray(os.urandom(1024) * (PIECE // 1024)))
        return super().loss(output, batch)
