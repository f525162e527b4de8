"""Checks for each architecture that a target passes through all of specbatch on a CPU."""
