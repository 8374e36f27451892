"""The Docker platform: containers on this machine."""
