"""Train the draft models of speculative decoding on Slurm clusters."""

__version__ = "0.1.0"
