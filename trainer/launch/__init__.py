"""What runs on the submitting machine: load, render, submit, follow. Never imports torch."""
