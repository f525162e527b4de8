"""Errors of a cluster, with a one-line message."""


class LabError(Exception):
    """The cluster can't do what was requested."""
