"""`python -m hf_momentum`."""

from hf_momentum.cli import console

console()
