"""One rank's training, top to bottom."""
