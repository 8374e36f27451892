"""The Slurm platform."""
