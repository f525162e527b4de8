"""Runs as Slurm jobs.

`script` renders the batch script of a run, `engine_script` that of added engines, from the components' `parts` of the
job, their `directives` and their `steps`. `jobs` records which jobs belong to a run; `query` asks Slurm about them, and
`states` parses the answers; `scale` adds engines in separate jobs.
"""
