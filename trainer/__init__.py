"""What runs inside a job, and the `muster` command. Importing this package imports nothing else: `muster` is quick."""


def __getattr__(name: str) -> str:
    """`__version__`, looked up when somebody asks: that costs 20 ms."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("muster-train")
    except PackageNotFoundError:  # a source tree on PYTHONPATH that was never installed
        return "0+uninstalled"
