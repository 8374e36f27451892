"""What users import: `from muster import Task`. Names are looked up when asked for: importing this costs nothing."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.task import Task

__all__ = ["Task"]
HOMES = {"Task": "trainer.task", "__version__": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(HOMES[name]), name)
