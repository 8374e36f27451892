"""The job that an agent gave to this rank. A session in its script need not read and merge the file again: 50 ms."""

from trainer.config.job import Job

JOBS: list[Job] = []
"""One, in a rank that an agent started for a script."""
