"""DFlash and DSpark: drafts that propose a block of tokens in one pass. The mathematics is in `model`'s docstring.

- `algorithm`: their interface to the rest of specbatch; `config`: their fields of the configuration;
- `contract`: what is captured, and the mask rule;
- `anchors`, `blocks`: the positions of blocks, and which slots learn what, in which order;
- `model`, `loss`, `chunked_backward`: the draft, its loss, and their backward pass chunk by chunk;
- `cost`, `memory`: operations, bytes and memory by formula; `files`: its checkpoints.
"""
