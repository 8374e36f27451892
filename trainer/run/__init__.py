"""The run folder: what lies in it and how it is read."""
