"""How the ranks compute one step together: single, dp, ddp."""
