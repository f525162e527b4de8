"""Engines: unmodified SGLang servers, the plugin that captures hidden states inside them, and the loop around them.

- `server`, `guard`: an SGLang server as a child process that leaves nothing behind.
- `platform`, `cpu_speculative`, `chain_drafting`: SGLang on a machine without an accelerator.
- `capture_request`: messages between loop and plugin.
- `plugin`, `prefill_capture`, `ring_buffer`, `sender`: inside SGLang's scheduler.
- `capture_server`: a server with the plugin. `inflight`, `engine`: claims and their results.

Everything here is tested on CPUs only. These parts never ran on a GPU: the gather of rows on the forward's stream,
their copy into pinned memory on SGLang's copy stream and the wait for it (`prefill_capture`), registering pinned memory
with an RDMA transport (`plugin.open_capture`), prefills replayed from CUDA graphs, and SGLang's own defaults for GPUs,
which `server` does not change. Their design follows SGLang's contract for auxiliary outputs
(``sglang.srt.managers.auxiliary_output``): tensors attached to a result must not alias buffers that a later forward
overwrites, hence the gather; SGLang queues their copy behind the forward, and calls back when it is done.
"""
