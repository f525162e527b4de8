"""What goes wrong with a cluster, told in one line."""


class LabError(Exception):
    """The cluster can't do what was asked."""
