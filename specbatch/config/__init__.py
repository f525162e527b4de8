"""The configuration of a run: typed sections, read from a file and the command line, and written back."""

from specbatch.config.load import dump_config, load_config
from specbatch.config.sections import (
    Config,
    Data,
    Draft,
    Evaluate,
    Inference,
    Run,
    Slurm,
    Snapshot,
    Store,
    Sweep,
    Target,
    Training,
)

__all__ = [
    "Config",
    "Data",
    "Draft",
    "Evaluate",
    "Inference",
    "Run",
    "Slurm",
    "Snapshot",
    "Store",
    "Sweep",
    "Target",
    "Training",
    "dump_config",
    "load_config",
]
