"""Runs as Slurm jobs.

`jobs` records which jobs belong to a run; `query` asks Slurm about them, and `states` parses the answers; `scale` adds
engines in separate jobs.
"""
