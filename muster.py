"""What users import: `from muster import Task`.

The names are looked up when they are asked for, so that importing this module costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainer.task import Task

__all__ = ["Task"]


def __getattr__(name: str) -> Any:
    """Import the name from where it lives."""
    if name == "Task":
        from trainer.task import Task

        return Task
    if name == "__version__":
        from trainer import __version__

        return __version__
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
