"""Snapshots of a run in HDF5: a step's model, optimizer, schedule, random generators and position."""
