"""EAGLE-3 (arXiv:2503.01840). The mathematics is in `model`'s docstring.

- `config`: its fields of the configuration; `contract`: what is captured, and the mask rule;
- `columns`, `column_chunks`: the positions of a pack that are computed, and in which order;
- `model`, `chunked_backward`: the draft, its unrolled steps, and their backward pass chunk by chunk;
- `cost`, `memory`: operations, bytes and memory by formula; `published`, `hf_config`, `files`: its checkpoints;
- `algorithm`: the interface to the rest of specbatch.
"""
