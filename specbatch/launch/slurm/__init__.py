"""Runs as Slurm jobs.

`jobs` remembers which jobs are a run's; `states` reads what Slurm says about them.
"""
