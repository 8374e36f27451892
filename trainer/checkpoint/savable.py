"""Whether a checkpoint could hold what user code keeps, found out before it is needed."""

import io
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint.durable import dump
from trainer.data.nested import INSIDE, walk
from trainer.errors import JobError


def check_savable(contents: dict[str, Any], script: bool = False) -> None:
    """Refuse what a checkpoint could not hold; `script`: it was tracked by one, and does not come from a task.

    Raises JobError: it cannot be written, or not read again safely.
    """
    path = find_unsavable(walk(contents, lambda part: torch.empty(0) if isinstance(part, Tensor) else INSIDE))
    if path:
        path = path[path[0] == "objects" :]
        key = "session.track" if script else "train.optimizer" if path[0] == "optimizer" else "task"
        problem = "cannot be saved and read again by torch.load(weights_only=True)"
        remedy = "Keep tensors, numbers, texts, lists and dictionaries in state_dict() and in groups of parameters"
        raise JobError(key, ".".join(path), problem, remedy)


def find_unsavable(value: Any) -> list[str]:
    """The way to the smallest part that cannot be saved; empty when all can."""
    file = io.BytesIO()
    try:
        dump(value, file)
        file.seek(0)
        torch.load(file, map_location="cpu", weights_only=True)
        return []
    except Exception:
        pairs: Any = value.items() if isinstance(value, dict) else ()
        pairs = enumerate(value) if isinstance(value, (list, tuple)) else pairs
        ways = ([str(name), *way] for name, part in pairs if (way := find_unsavable(part)))
        return next(ways, [type(value).__name__])
