"""Runs as Slurm jobs.

`jobs` remembers which jobs are a run's; `ask` asks Slurm about them, and `states` reads what it says; `scale` adds
engines in jobs of their own.
"""
