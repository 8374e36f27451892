"""Muster's trainer: what runs inside a job.

Importing this package never imports torch, so that the submitting side (`trainer.launch`) stays quick.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("muster-train")
except PackageNotFoundError:  # a source tree on PYTHONPATH that was never installed
    __version__ = "0+uninstalled"
