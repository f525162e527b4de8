"""Observers of training: the metrics file, the recorder of steps, and trackers."""
