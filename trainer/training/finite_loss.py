"""A loss that is NaN or infinite: all ranks see it, its samples are named, and no weights after it are saved."""

import math
from collections.abc import Sequence

from trainer.data.sampler import MicroBatch
from trainer.parallel.base import DeferredScalar
from trainer.reporting.rank_report import Report


class NonFiniteLoss(ArithmeticError):
    """A loss became NaN or infinite on some rank; no checkpoint holds the weights after it."""


class LossCheck:
    """Looks at the global loss of every step, on a GPU one step late rather than wait for it."""

    def __init__(self, on_nan: str, report: Report) -> None:
        """`on_nan`: of the job, "halt" or "skip"."""
        self.halts, self.report = on_nan == "halt", report
        self.deferred: tuple[DeferredScalar, int, list[MicroBatch]] | None = None

    def allows_update(self, loss: DeferredScalar | float, step: int, micros: Sequence[MicroBatch]) -> bool:
        """Whether the gradients of `step` may be applied; `micros`: what this rank computed.

        Raises NonFiniteLoss: this loss, or the deferred one before it, and the job says halt.
        """
        if isinstance(loss, DeferredScalar) and self.halts:
            self.read_deferred()
            self.deferred = loss, step, list(micros)
            return True
        return self._is_finite(loss, step, micros)

    def read_deferred(self) -> None:
        """Look at the loss that nobody has looked at yet: call it before weights are saved."""
        deferred, self.deferred = self.deferred, None
        if deferred is not None:
            self._is_finite(*deferred)

    def _is_finite(self, deferred: DeferredScalar | float, step: int, micros: Sequence[MicroBatch]) -> bool:
        loss = float(deferred)
        if math.isfinite(loss):
            return True
        rank = self.report.parallel.rank
        samples = [int(index) for micro in micros for index in micro.indices[: micro.count]]
        self.report.event("nonfinite_loss", loss=str(loss), step=step, rank=rank, samples=samples)
        if self.halts:
            raise NonFiniteLoss(
                f"the loss of step {step} is {loss} on some rank; this rank {rank} computed samples {samples}. "
                "The last checkpoint is from before. Lower train.lr, set train.clip_norm, look at these samples, or "
                "set train.on_nan=skip"
            )
        return False
