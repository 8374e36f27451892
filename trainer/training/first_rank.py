"""Who goes first when ranks start: one rank of each node prepares what all of them read, and the others wait.

Two ranks that download the same file at once would read it half written. How long they wait is bounded by
`agent.start_timeout_s`, whatever prepares.
"""

from collections.abc import Callable
from typing import TypeVar

from trainer.parallel.base import Parallel
from trainer.reporting.heartbeat import Pulse
from trainer.task import Task
from trainer.wiring import variables

Built = TypeVar("Built")
PREPARED = "prepared"
"""A file in the agent's own folder: the node is prepared, so that restarted ranks all build at once."""


def build_in_turn(parallel: Parallel, pulse: Pulse, make: Callable[[], Task], build: Callable[[Task], Built]) -> Built:
    """`build(make())`, when it is this rank's turn; before it the first rank of each node calls `Task.prepare`.

    Rank 0 comes before the first ranks of other nodes, for nodes may share a disk. A task that has no `prepare` is
    built where one that has it is prepared. All ranks are here when the first of them returns.
    """
    heartbeat = variables.read_path(variables.HEARTBEAT)
    note = heartbeat and heartbeat.with_name(PREPARED)
    first = parallel.local_rank == 0 and not (note and note.exists())
    built: list[Built] = []
    for turn in (0, 1):
        if first and turn == min(parallel.rank, 1):
            task = make()
            if type(task).prepare is Task.prepare:
                built.append(build(task))
            else:
                task.prepare()
            del task  # what it set on itself would be missing after a restart, which prepares nothing
        parallel.meet()
        pulse.beat(0, "starting")
    if first and note:
        note.touch()
    result = built[0] if built else build(make())
    parallel.meet()
    pulse.beat(0, "starting")
    return result
