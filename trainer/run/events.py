"""What happens to a run: the one table of the events in the folder `events`, each with its fields.

A line of its files is {"time": seconds since 1970, "event": name, **fields}. Fields that a kind lists may be missing:
older runs, and ranks that no agent watches, say less.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of event."""

    meaning: str
    fields: tuple[str, ...] = ()
    more: bool = False  # whether it also carries values that the user's code names, such as metrics


EVENTS = {
    # The submitting side.
    "submitted": Kind("The run folder was made.", ("by",)),
    "continued": Kind("A run that had ended was submitted again."),
    "cancel_requested": Kind("`muster cancel` asked the platform to end the run."),
    "preempt_requested": Kind("`muster preempt` asked the platform to stop and restart the run."),
    # The supervisor of a local or Docker run.
    "pending": Kind("The run waits for something, such as free GPUs.", ("reason",)),
    "requeued": Kind("All agents were started again, as a scheduler would.", ("launch",)),
    "agent_lost": Kind("An agent ended without a word, and another takes its place.", ("node", "code")),
    # The agents.
    "wired": Kind("An agent knows its place.", ("node", "master", "platform", "launch", "visible_devices", "pid")),
    "preflight": Kind("An agent checked its node.", ("node", "problems")),
    "attempt": Kind("All ranks start for the first time in this launch.", ("attempt", "round")),
    "restart": Kind("All ranks start again after a failure.", ("attempt", "round")),
    "ranks": Kind("An agent started its ranks.", ("node", "attempt", "agent", "pids")),
    "hung": Kind("A rank gave no sign of life for too long.", ("rank", "step", "attempt")),
    "failure": Kind("An attempt failed; this is its first cause.", ("node", "host", "rank", "code", "kind", "message",
                                                                    "log", "waiting", "cause", "at_step", "passing",
                                                                    "step", "restarts_left")),
    "separate_ranks": Kind("A script is done, and its ranks never joined a process group.", ("ranks",)),
    "ended": Kind("A node's part in the run ended, but not well.", ("node", "code", "reason")),
    # Rank 0, and other ranks about themselves.
    "process_group": Kind("Rank 0 of a script joined a process group.", ("attempt", "ranks")),
    "training": Kind("The training loop begins, or goes on.", ("attempt", "step", "steps", "steps_per_epoch", "device",
                                                               "world_size", "parallel")),
    "first_step": Kind("The first step of this attempt is done.", ("attempt", "step")),
    "checkpoint": Kind("A checkpoint was committed.", ("attempt", "step", "folder")),
    "resume": Kind("The state of an earlier attempt was loaded.", ("attempt", "step", "folder")),
    "checkpoint_refused": Kind("A checkpoint is damaged, and the one before is used.", ("attempt", "problem")),
    "checkpoint_failed": Kind("The last checkpoint could not be saved.", ("attempt", "problem")),
    "not_deterministic": Kind("Some operation has no deterministic kernel.", ("attempt", "problem")),
    "note": Kind("What was made of something in the user's code.", ("attempt", "message")),
    "notice": Kind("Something is not wrong, but may not be meant.", ("attempt", "message")),
    "nonfinite_loss": Kind("A loss was NaN or infinite.", ("attempt", "loss", "step", "rank", "samples")),
    "stopped": Kind("All ranks stopped on request, with a checkpoint.", ("attempt", "step")),
    "done": Kind("The run reached its end.", ("attempt", "step"), more=True),
}  # fmt: skip
