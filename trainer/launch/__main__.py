"""`python -m trainer.launch`: the `muster` command, where its script is not on PATH."""

from trainer.launch.cli import main

main()
