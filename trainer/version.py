"""Which version of Muster this is."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("muster-train")
except PackageNotFoundError:  # a source tree on PYTHONPATH that was never installed
    __version__ = "0+uninstalled"
