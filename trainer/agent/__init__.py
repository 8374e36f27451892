"""The agent: one process per node that wires, checks, starts and watches the ranks."""
