"""What a rank reports: heartbeats, metrics, progress."""
