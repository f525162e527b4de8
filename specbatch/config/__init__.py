"""The configuration of a run: typed sections, read from a file and from the command line, and written again."""

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
    "Target",
    "Training",
    "dump_config",
    "load_config",
]
