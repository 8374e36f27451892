"""What a job file may say: its keys, how it is loaded, what is refused."""
