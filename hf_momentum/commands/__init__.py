"""The commands of `hf-momentum`, one per module: `HELP`, `parser()`, and `main(words)`, which returns the exit status.

`hf_momentum/cli.py` has the table of their names and imports the one that is asked for.
"""
