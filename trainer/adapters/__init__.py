"""Frameworks with a training loop of their own, made to stand on a session."""
