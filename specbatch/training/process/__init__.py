"""Ranks as processes: the agent of a node, rendezvous, signals, and exit codes."""
