"""Draft algorithms: one folder each, or an installed package, found by the entry point group ``specbatch.drafts``.

`base` defines the interface of an algorithm; `base.algorithm_of` finds the one that a configuration names. Code that
algorithms share is here too: `pack`, `rope`, `loss`, `attention`, `fused`, `memory`, `checkpoint`, `vocabulary`.
"""
