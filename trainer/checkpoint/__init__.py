"""The state of a training, on disk and in memory."""
