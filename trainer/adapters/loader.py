"""The data loader that a framework's loop is given: it reads the session's batches, epoch by epoch.

A framework's loop asks for a batch when it is done with the one before: with its update, and with what it logs,
evaluates and saves after that. So the session's boundary between two steps lies where it belongs.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from trainer.data.sampler import MicroBatch
from trainer.errors import JobError
from trainer.training.session import Session


class SessionLoader:
    """This rank's micro-batches of one epoch at each `iter`, the first time from where the training stands."""

    def __init__(
        self, session: Session, dataset: Any, given: DataLoader[Any], batch_size: int, accumulate: int, shuffle: bool,
        limits: Callable[[], dict[str, int]],
    ) -> None:  # fmt: skip
        """`given`: the framework's own loader, of which the collate function and the workers count.

        `limits` says when the training begins how long it will be: `epochs`, `steps`.
        """
        self.session, self.dataset, self.batch_size, self.accumulate = session, dataset, batch_size, accumulate
        self.options: dict[str, Any] = {
            "accumulate": accumulate, "shuffle": shuffle, "collate": given.collate_fn, "workers": given.num_workers,
        }  # fmt: skip
        self.limits = limits
        self.batches: Iterator[Any] | None = None
        self.waiting: deque[MicroBatch] = deque()
        """What the loop was given and has not computed yet."""

    def __len__(self) -> int:
        """Micro-batches in an epoch. Raises TypeError: a stream does not say."""
        return -(-len(self.dataset) // self.batch_size) * self.accumulate

    def __iter__(self) -> Iterator[Any]:
        session = self.session
        if self.batches is None:
            options: dict[str, Any] = {**self.options, **self.limits()}
            self.batches = session.batches(self.dataset, self.batch_size, **options)
        for batch in self.batches:
            assert session.micro is not None
            self.waiting.append(session.micro)
            ends = session.epoch_ends
            yield batch
            if ends:
                return

    def weigh(self, divided: int = 1) -> float:
        """What the loss of the micro-batch that comes next counts in the update, which is a sum over micro-batches.

        Of a mean over its samples that the framework divides by `divided`; 0 means that it is a sum already, and then
        it counts whole, or not at all where this rank's share of the batch is empty.
        """
        micro = self.waiting.popleft()
        share = micro.count * self.session.world_size / micro.step_count
        weight = share * divided if divided else float(micro.count > 0)
        self.session.gradients.set(weight, micro.last)
        return weight

    def close(self) -> None:
        """The loop is done with the last batch. Raises Stopped: see `Session`."""
        if self.batches is not None:
            self.session.enough = True
            next(self.batches, None)
            self.batches = None


Refusals = Iterable[tuple[str, Any, Any, str, str]]
"""A setting, its value, whether it is refused, the problem and the remedy."""


def refuse_settings(place: str, refused: Refusals) -> None:
    """Raises JobError: a framework was told to do what a session could not repeat; `place`: where it was told."""
    for key, value, wrong, problem, remedy in refused:
        if wrong:
            raise JobError(f"{place}.{key}", value, problem, remedy)


def say_if_changed(session: Session, given: int, kept: int) -> None:
    """Tell that the global batch is not what the script says now."""
    if given != kept:
        session.report.say(f"the global batch stays {kept}, as when the run began, though the script says {given} now")
