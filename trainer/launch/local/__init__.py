"""The local platform: processes on this machine."""
