"""What runs inside a job, and the `muster` command. Importing this package imports nothing else: `muster` is quick."""


def __getattr__(name: str) -> str:
    """`__version__`, looked up when somebody asks: that costs 20 ms."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trainer.version import __version__

    return __version__
