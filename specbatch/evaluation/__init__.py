"""Measures drafts: statistics of acceptance, decoding with real engines, and the evaluations during training."""
