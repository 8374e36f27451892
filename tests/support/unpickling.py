"""Nothing that another rank sends may be unpickled: a rank of the tests refuses to unpickle anything at all."""

from __future__ import annotations

import _pickle
import pickle
import sys
from typing import Any


class Refused(pickle.Unpickler):
    """Stands for all that would unpickle."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        raise AssertionError("something is unpickled in a rank")


def forbid() -> None:
    """Let all of it fail in this process from here on. torch.load with `weights_only` has an unpickler of its own."""
    from torch.distributed import distributed_c10d

    for module in (pickle, _pickle):
        for name in ("load", "loads", "Unpickler"):
            setattr(module, name, Refused)
    distributed_c10d._unpickler = Refused  # type: ignore[misc]
    sys.addaudithook(lambda event, _: Refused() and None if event == "pickle.find_class" else None)
