"""Engines: unmodified SGLang servers, the plugin that captures hidden states inside them, and the loop around them.

- `server`, `guard`: an SGLang server as a child process that leaves nothing behind.
- `platform`, `cpu_speculative`, `chain_drafting`: SGLang on a machine without an accelerator.
- `orders`: what loop and plugin say to each other. `plugin`, `capture`, `ring`, `sender`: inside SGLang's scheduler.
- `capturing`: a server with the plugin. `work`, `engine`: claims, and what became of them.

Everything here is tested on CPUs only. What never ran on a GPU: the gather of rows on the forward's stream, their copy
into pinned memory on SGLang's copy stream and the wait for it (`capture`), registering pinned memory with an RDMA
transport (`plugin.open_capture`), prefills replayed from CUDA graphs, and SGLang's own defaults for GPUs, which
`server` leaves alone. Their design follows SGLang's contract for auxiliary outputs
(``sglang.srt.managers.auxiliary_output``): tensors that are hung on a result must not alias buffers that a later
forward overwrites, hence the gather; SGLang queues their copy behind the forward, and calls back when it is done.
"""
